"""Shared-prefix scoring without ARPO: over plain `GRPOTrainer`, with the metrics that say what it saved."""

import logging
from collections import Counter

import multimodal
import pytest
import tiny
import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from arpo_trl.scoring import SharedPrefixMixin
from arpo_trl.scoring import shared_prefix as prefix_sharing
from arpo_trl.scoring.tally import NotPacked, chunk_counts, scoring_metrics


class Trainer(SharedPrefixMixin, GRPOTrainer):
    pass


def length_reward(completions, **kwargs):
    return [float(len(completion[0]["content"]) % 7) for completion in completions]


# Long prompts, of different lengths
PROMPTS = [{"prompt": [{"role": "user", "content": f"{i * 7919} " * (40 + 4 * i)}]} for i in range(4)]


def train(trainer_class, tokenizer, folder, model=None, **settings):
    """Two optimiser steps, each over 4 groups of 4 rows in 4 micro-batches."""
    model = model or tiny.build_model(tokenizer)
    model.save_pretrained(folder / "model")  # from where TRL loads the reference too
    config = {
        "num_generations": 4,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 4,
        "max_steps": 2,
        "max_completion_length": 12,
        "optim": "sgd",  # so that rounding stays rounding
        "learning_rate": 0.1,
        "logging_steps": 1,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "model_init_kwargs": {"dtype": "float32", "attn_implementation": model.config._attn_implementation},
        **settings,
    }
    trainer = trainer_class(
        model=str(folder / "model"),
        args=GRPOConfig(str(folder), **config),
        reward_funcs=length_reward,
        train_dataset=Dataset.from_list(PROMPTS),
        processing_class=tokenizer,
    )
    trainer.train()
    return trainer


def weights(trainer):
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])


@pytest.mark.parametrize("settings", [{}, {"beta": 0.1, "num_iterations": 2}], ids=["grpo", "old and reference"])
def test_the_mixin_trains_a_grpo_trainer_as_trl_does_with_fewer_tokens(tokenizer, tmp_path, settings):
    ours, stock = (train(cls, tokenizer, tmp_path / cls.__name__, **settings) for cls in (Trainer, GRPOTrainer))
    assert not torch.equal(weights(ours), weights(stock)), "prefixes were shared"
    assert torch.allclose(weights(ours), weights(stock), atol=1e-6)
    moved = (weights(stock) - torch.cat([p.flatten() for p in tiny.build_model(tokenizer).parameters()])).abs().max()
    assert moved > 1e-4, "the steps are larger than the tolerance"
    for own, trl in zip(ours.state.log_history[:2], stock.state.log_history[:2], strict=True):
        for name in ("loss", "grad_norm", "entropy"):
            assert own[name] == pytest.approx(trl[name], rel=1e-3, abs=1e-6)
        assert own["arpo/packed_token_fraction"] == 1
        assert own["arpo/computed_token_fraction"] < 0.4, "4 rows share a prompt that is most of their tokens"
        assert own["arpo/seconds/loss"] > 0
        assert not [name for name in trl if name.startswith("arpo/")]
    phases = {name for log in ours.state.log_history for name in log if name.startswith("arpo/seconds/")}
    compared = {"arpo/seconds/old_logps", "arpo/seconds/ref_logps"} if settings else set()
    assert phases == {"arpo/seconds/loss"} | compared


def test_the_fraction_of_computed_tokens_is_counted(tokenizer, tmp_path):
    trainer = train(Trainer, tokenizer, tmp_path, max_steps=1)
    computed = row_by_row = 0
    for batch in trainer._buffered_inputs:
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
        rows = [tuple(row[kept.bool()].tolist()) for row, kept in zip(ids, mask, strict=True)]
        computed += len({row[: n + 2] for row in rows for n in range(len(row) - 1)})  # one for each distinct prefix
        row_by_row += ids.numel()
    assert trainer.state.log_history[0]["arpo/computed_token_fraction"] == pytest.approx(
        computed / row_by_row, rel=0.02
    )


def test_sharing_that_is_switched_off_is_trls_to_the_bit(tokenizer, tmp_path):
    class Off(Trainer):
        share_prefixes = False

    off, stock = (train(cls, tokenizer, tmp_path / cls.__name__) for cls in (Off, GRPOTrainer))
    assert torch.equal(weights(off), weights(stock))
    own = {name for log in off.state.log_history for name in log if name.startswith("arpo/")}
    assert own == {"arpo/seconds/loss"}


def stretched(tokenizer):
    """A model whose rotary embedding depends on the length of the batch."""
    model = tiny.build_model(tokenizer)
    model.config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    return model


def test_the_reason_of_a_fall_back_is_told_in_the_log_and_in_the_metrics(tokenizer, tmp_path, caplog):
    prefix_sharing._log_once.cache_clear()
    with caplog.at_level(logging.WARNING, logger=prefix_sharing.__name__):
        trainer = train(Trainer, tokenizer, tmp_path, model=stretched(tokenizer))
    told = [record.getMessage() for record in caplog.records if record.name == prefix_sharing.__name__]
    assert len(told) == 1 and "rotary embedding" in told[0]
    for log in trainer.state.log_history[:2]:
        assert log["arpo/not_packed/rotary_embedding"] == 1 and log["arpo/packed_token_fraction"] == 0
        assert log["arpo/computed_token_fraction"] == 1


@pytest.mark.parametrize("family", ["Qwen3.5, no thinking", "Gemma 4"])
def test_rows_of_text_of_a_multimodal_checkpoint(tmp_path, family):
    model, processor = multimodal.build(family)
    ours, stock = (
        train(cls, processor, tmp_path / cls.__name__, model=model, max_steps=1) for cls in (Trainer, GRPOTrainer)
    )
    log = ours.state.log_history[0]
    assert log["arpo/packed_token_fraction"] == 1 and log["arpo/computed_token_fraction"] < 0.5
    assert log["loss"] == pytest.approx(stock.state.log_history[0]["loss"], rel=1e-3, abs=1e-6)
    assert torch.allclose(weights(ours), weights(stock), atol=1e-5)


def test_fractions_add_up_where_some_micro_batches_are_packed(tokenizer, tmp_path, monkeypatch):
    calls = iter(range(1000))
    judged = prefix_sharing.pack

    def pack(*args, **kwargs):  # every other micro-batch is said to cost too much
        tree = judged(*args, **kwargs)
        tree.cost *= 1 if next(calls) % 2 else float("inf")
        return tree

    monkeypatch.setattr(prefix_sharing, "pack", pack)
    # Both steps are logged together: a reason that is new in the midst of them counts in full
    log = train(Trainer, tokenizer, tmp_path, logging_steps=2).state.log_history[0]
    assert 0.2 < log["arpo/not_packed/cost"] < 0.8
    assert log["arpo/not_packed/cost"] + log["arpo/packed_token_fraction"] == pytest.approx(1)
    assert 0.4 < log["arpo/computed_token_fraction"] < 0.9


def test_scoring_metrics_by_hand():
    counts = Counter()
    counts.update(chunk_counts(scored=30, row_by_row=100, outcome=40))
    counts.update(chunk_counts(scored=10, row_by_row=60, outcome=NotPacked("cost", "…")))
    counts.update(chunk_counts(scored=0, row_by_row=20, outcome=NotPacked("no_completion", "…")))
    assert scoring_metrics(counts) == {
        "arpo/packed_token_fraction": 0.75,
        "arpo/computed_token_fraction": 120 / 180,
        "arpo/not_packed/cost": 0.25,
        "arpo/not_packed/no_completion": 0.0,
    }
    assert scoring_metrics(Counter()) == {}
