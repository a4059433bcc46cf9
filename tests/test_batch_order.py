"""Which rows share a micro-batch, and by which path log-probabilities that are compared with each other are scored."""

import copy
import itertools
import logging

import numpy as np
import pytest
import tiny
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.overrides import TorchFunctionMode
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from trl import GRPOConfig, GRPOTrainer

from arpo_trl import ARPOConfig, ARPOTrainer
from arpo_trl.scoring import mixin, prefix_tree
from arpo_trl.scoring import shared_prefix as prefix_sharing
from arpo_trl.scoring.mixin import reordered as reorder
from arpo_trl.scoring.prefix_tree import token_sizes
from arpo_trl.scoring.shared_prefix import rows_may_change_micro_batch

NUM_IMAGES = [1, 2, 0, 1]  # of four rows, which two micro-batches hold


def of_row(row, *shape):
    return torch.full(shape, float(row))


def of_rows(sizes, *shape):
    return torch.cat([of_row(row, size, *shape) for row, size in enumerate(sizes)])


GRIDS = [[[1, 2, 2]], [[1, 2, 4], [1, 2, 2]], [], [[1, 4, 2]]]
TILES = [2, 3, 0, 1]
# What TRL keeps of images, for each way in which models lay them out: the tensors, and a row's number of lines in each
LAYOUTS = {
    "patches in a grid": ({"pixel_values": of_rows([4, 12, 0, 8], 3)}, {"pixel_values": [4, 12, 0, 8]}),
    "one line an image": (
        {"pixel_values": of_rows(NUM_IMAGES, 3, 2, 2), "image_sizes": of_rows(NUM_IMAGES, 2)},
        {"pixel_values": NUM_IMAGES, "image_sizes": NUM_IMAGES},
    ),
    "images with positions": (
        {"pixel_values": of_rows(NUM_IMAGES, 5, 3), "image_position_ids": of_rows(NUM_IMAGES, 5, 2)},
        {"pixel_values": NUM_IMAGES, "image_position_ids": NUM_IMAGES},
    ),
    "tiles with shapes": (
        {
            "pixel_values": of_rows(TILES, 5, 3),
            "pixel_attention_mask": of_rows(TILES, 5),
            "spatial_shapes": of_rows(TILES, 2),
            "num_tiles": TILES,
        },
        {"pixel_values": TILES, "pixel_attention_mask": TILES, "spatial_shapes": TILES},
    ),
    "tiles": ({"pixel_values": of_rows(TILES, 3, 2, 2), "num_tiles": TILES}, {"pixel_values": TILES}),
    "padded to a line a row": (
        {
            "pixel_values": of_rows([1] * 4, 2, 3, 2, 2)[[0, 1, 2, 3]],
            "pixel_attention_mask": of_rows([1] * 4, 2, 2, 2),
        },
        {"pixel_values": [1] * 4, "pixel_attention_mask": [1] * 4},
    ),
}


def micro_batches(tensors, lines):
    """Two micro-batches of two rows each, as TRL's `_prepare_inputs` leaves them."""
    batches = []
    for rows in ([0, 1], [2, 3]):
        batch = {"prompt_ids": torch.tensor(rows)[:, None], "token_type_ids": of_rows([1] * 4, 6)[rows]}
        batch |= {"num_items_in_batch": torch.tensor(7), "num_images": [NUM_IMAGES[row] for row in rows]}
        for name, value in tensors.items():
            if isinstance(value, list):
                batch[name] = [value[row] for row in rows]
            else:
                batch[name] = torch.cat([value.split(lines[name])[row] for row in rows])
        batches.append(batch)
    return batches


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("order", [[2, 0, 1, 3], [3, 1, 0, 2], [0, 1, 2, 3]])
def test_images_follow_their_row(layout, order):
    tensors, lines = copy.deepcopy(LAYOUTS[layout])
    if layout == "patches in a grid":
        tensors["image_grid_thw"] = torch.tensor([grid for row in GRIDS for grid in row])
        lines["image_grid_thw"] = NUM_IMAGES
    if layout == "padded to a line a row":
        images = [1, 2, 2, 1]  # lines are rows, not images
    else:
        images = NUM_IMAGES
    batches = micro_batches(tensors, lines)
    for index, batch in enumerate(batches):
        batch["num_images"] = images[2 * index : 2 * index + 2]
    reordered = reorder(batches, order, [2, 2])
    assert len(reordered) == 2
    for index, batch in enumerate(reordered):
        rows = order[2 * index : 2 * index + 2]
        assert batch["prompt_ids"].flatten().tolist() == rows
        assert batch["token_type_ids"][:, 0].tolist() == rows
        assert batch["num_items_in_batch"] == 7
        assert batch["num_images"] == [images[row] for row in rows]
        if "num_tiles" in batch:
            assert batch["num_tiles"] == [TILES[row] for row in rows]
        for name, sizes in lines.items():
            own = batch[name].split([sizes[row] for row in rows])  # fails if there are other lines than these
            for row, part in zip(rows, own, strict=True):
                if name == "image_grid_thw":
                    assert part.tolist() == GRIDS[row]
                else:
                    assert (part == row).all()


def test_a_batch_whose_images_were_dropped_is_reordered():
    batches = [{"prompt_ids": torch.tensor([[row], [row + 1]]), "num_images": None} for row in (0, 2)]
    first, second = reorder(batches, [3, 0, 1, 2], [2, 2])
    assert first["prompt_ids"].tolist() == [[3], [0]] and second["prompt_ids"].tolist() == [[1], [2]]
    assert first["num_images"] is None


def test_micro_batches_may_hold_more_rows_and_fewer():
    batches = [{"prompt_ids": torch.tensor([[row], [row + 1]]), "weight": [row, row + 1]} for row in (0, 2)]
    first, second = reorder(batches, [3, 0, 1, 2], [1, 3])
    assert first["prompt_ids"].tolist() == [[3]] and second["prompt_ids"].tolist() == [[0], [1], [2]]
    assert first["weight"] == [3] and second["weight"] == [0, 1, 2]


def length_reward(completions, **kwargs):
    return [float(len(str(completion)) % 7) for completion in completions]


# The prompts differ in length and in what a row of theirs is like, and are long enough for sharing to pay
PROMPTS = [{"prompt": [{"role": "user", "content": f"{i * 7919} " * (20 + 4 * i)}]} for i in range(4)]


def train(tokenizer, tmp_path, model=None, trainer_class=ARPOTrainer, prompts=PROMPTS, **settings):
    """One optimiser step over 4 groups of 4 rows in 4 micro-batches, of a model of random weights."""
    if model is None:
        model = tiny.build_model(tokenizer)
        for parameter in model.parameters():  # so that entropies differ between tokens
            if parameter.dim() == 2:
                parameter.data.mul_(6)
    model.save_pretrained(tmp_path / "model")  # from where TRL loads the reference too
    config = {
        "num_generations": 4,
        "num_initial_generations": 4,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 4,
        "max_steps": 1,
        "max_completion_length": 24,
        "tool_protocol": "tags",
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "model_init_kwargs": {"dtype": model.dtype, "attn_implementation": model.config._attn_implementation},
        **settings,
    }
    trainer = trainer_class(
        model=str(tmp_path / "model"),
        args=ARPOConfig(str(tmp_path), **config),
        reward_funcs=length_reward,
        train_dataset=Dataset.from_list(prompts),
        processing_class=tokenizer,
        tools=[tiny.add],
    )
    trainer.train()
    return trainer


@pytest.fixture
def log(caplog):
    prefix_sharing._log_once.cache_clear()
    with caplog.at_level(logging.WARNING, logger=prefix_sharing.__name__):
        yield lambda: [record.getMessage() for record in caplog.records if record.name == prefix_sharing.__name__]
    prefix_sharing._log_once.cache_clear()


def prompts_together(trainer):
    """The number of different prompts in each micro-batch."""
    return [len(batch["prompt_ids"].unique(dim=0)) for batch in trainer._buffered_inputs]


BY_MICRO_BATCH = {
    "quantile": ({"top_entropy_quantile": 0.2}, "`top_entropy_quantile=0.2` ranks"),
    "bnpo": ({"loss_type": "bnpo"}, "`loss_type='bnpo'` averages over"),
    "entropy bonus": ({"entropy_coef": 0.1}, "the entropy bonus averages over"),
    "adaptive entropy bonus": ({"use_adaptive_entropy": True}, "the entropy bonus averages over"),
}


@pytest.mark.parametrize("case", BY_MICRO_BATCH)
def test_rows_stay_where_they_are_if_the_loss_weighs_by_micro_batch(tokenizer, tmp_path, log, case):
    settings, reason = BY_MICRO_BATCH[case]
    shared, alone = (
        train(tokenizer, tmp_path / str(sharing), prefix_sharing=sharing, **settings) for sharing in (True, False)
    )
    for name in ("loss", "grad_norm"):
        assert shared.state.log_history[0][name] == pytest.approx(alone.state.log_history[0][name], rel=1e-3)
    for with_sharing, without in zip(shared._buffered_inputs, alone._buffered_inputs, strict=True):
        assert torch.equal(with_sharing["completion_ids"], without["completion_ids"])
    assert log() == [f"Rows that share a prefix are not brought together: {reason} the tokens of each micro-batch."]


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo", "luspo"])
def test_rows_that_share_a_prefix_come_together_if_the_loss_does_not(tokenizer, tmp_path, log, loss_type):
    shared, alone = (
        train(tokenizer, tmp_path / str(sharing), prefix_sharing=sharing, loss_type=loss_type)
        for sharing in (True, False)
    )
    for name in ("loss", "grad_norm"):
        assert shared.state.log_history[0][name] == pytest.approx(alone.state.log_history[0][name], rel=1e-3, abs=1e-6)
    assert prompts_together(shared) == [1, 1, 1, 1] and min(prompts_together(alone)) > 1
    assert not log()


@pytest.mark.parametrize("loss_type", ["dapo", "bnpo"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_whole_groups_are_dealt_where_asked_for(tokenizer, tmp_path, log, accumulation, loss_type):
    # Four micro-batches of four rows a generation batch, four or two optimiser steps. Weights do not move.
    settings = {"gradient_accumulation_steps": accumulation, "steps_per_generation": 4, "loss_type": loss_type}
    settings |= {"max_steps": 4 // accumulation, "learning_rate": 0.0}
    together, alone, stock = (
        train(tokenizer, tmp_path / name, prefix_sharing=sharing, keep_groups_together=keep, **settings)
        for name, sharing, keep in (("together", True, True), ("alone", False, True), ("stock", False, False))
    )
    assert prompts_together(together) == [1, 1, 1, 1] and min(prompts_together(stock)) > 1
    for ours, row_by_row in zip(together._buffered_inputs, alone._buffered_inputs, strict=True):
        assert torch.equal(ours["completion_ids"], row_by_row["completion_ids"]), "whether prefixes are shared or not"
    rows = [
        sorted(map(tuple, torch.cat([batch["completion_ids"] for batch in trainer._buffered_inputs]).tolist()))
        for trainer in (together, stock)
    ]
    assert rows[0] == rows[1], "the same rows in all"
    for ours, row_by_row in zip(together.state.log_history, alone.state.log_history, strict=True):
        for name in {"loss", "grad_norm"} & ours.keys():
            assert ours[name] == pytest.approx(row_by_row[name], rel=1e-3, abs=1e-6)
    assert not log()


def tokens_of(batch):
    """Tokens that a micro-batch computes, those that rows share counted once."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1).bool()
    rows = [row[own].tolist() for row, own in zip(ids, mask, strict=True)]
    return len({tuple(row[:end]) for row in rows for end in range(1, len(row) + 1)})


# The prompts differ much in length, so that equal numbers of rows are far from equal numbers of tokens
UNEVEN = [{"prompt": [{"role": "user", "content": f"{i * 7919} " * (10 + 60 * (i == 3))}]} for i in range(4)]


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo", "luspo", "sapo", "cispo"])
def test_micro_batches_by_tokens_are_even_and_their_step_is_the_same(tokenizer, tmp_path, log, loss_type):
    settings = {"loss_type": loss_type, "prompts": UNEVEN, "per_device_train_batch_size": 2, "beta": 0.1}
    settings |= {"gradient_accumulation_steps": 8}
    by_tokens, by_rows = (
        train(tokenizer, tmp_path / str(by_tokens), micro_batches_by_tokens=by_tokens, **settings)
        for by_tokens in (True, False)
    )
    sizes = [len(batch["prompt_ids"]) for batch in by_tokens._buffered_inputs]
    assert len(sizes) == 8 and sum(sizes) == 16 and len(set(sizes)) > 1
    assert max(map(tokens_of, by_tokens._buffered_inputs)) < max(map(tokens_of, by_rows._buffered_inputs))
    for name in ("loss", "grad_norm"):
        ours, theirs = (trainer.state.log_history[0][name] for trainer in (by_tokens, by_rows))
        assert ours == pytest.approx(theirs, rel=2e-3, abs=1e-6)
    for ours, theirs in zip(by_tokens.model.parameters(), by_rows.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2.5e-3)  # Adam's first step is the sign of a gradient
    assert by_tokens.state.log_history[0]["arpo/packed_token_fraction"] == 1
    assert not log()


def test_each_optimiser_step_keeps_its_rows_by_tokens(tokenizer, tmp_path):
    # Two steps of two micro-batches in a generation batch; weights do not move
    settings = {"prompts": UNEVEN, "gradient_accumulation_steps": 2, "steps_per_generation": 4, "max_steps": 2}
    by_tokens, by_rows = (
        train(tokenizer, tmp_path / str(by_tokens), micro_batches_by_tokens=by_tokens, learning_rate=0.0, **settings)
        for by_tokens in (True, False)
    )
    for step in (slice(0, 2), slice(2, 4)):
        ours, theirs = (
            sorted(
                map(tuple, torch.cat([batch["completion_ids"] for batch in trainer._buffered_inputs[step]]).tolist())
            )
            for trainer in (by_tokens, by_rows)
        )
        assert ours == theirs


@pytest.mark.parametrize(
    "setting, value",
    [("prefix_sharing", False), ("loss_type", "bnpo"), ("top_entropy_quantile", 0.2), ("entropy_coef", 0.1)],
)
def test_micro_batches_by_tokens_are_refused_where_rows_may_not_move(tmp_path, setting, value):
    with pytest.raises(ValueError, match=f"`micro_batches_by_tokens` does not go with `{setting}={value!r}`"):
        ARPOConfig(str(tmp_path), use_cpu=True, bf16=False, micro_batches_by_tokens=True, **{setting: value})


def arrays(*rows):
    return [np.array(row) for row in rows]


@pytest.mark.parametrize(
    "rows, parts, sizes",
    [
        (arrays([1] * 6, [2] * 2, [3] * 2, [4] * 2), 2, [1, 3]),  # 6 and 6
        (
            arrays([1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 6, 7], [8]),
            2,
            [2, 2],
        ),  # 4 + 1, and 4 + 1: nothing is shared over a cut
        (arrays([1], [2], [3]), 3, [1, 1, 1]),
        (arrays([1, 2], [1, 2], [1, 2], [1, 2]), 3, [2, 1, 1]),  # equal rows cost nothing, and no part is empty
        (arrays([1] * 9, [2]), 2, [1, 1]),
        (arrays([1, 1], [2, 2]), 1, [2]),
    ],
)
def test_rows_are_cut_where_the_tokens_are_even(rows, parts, sizes):
    assert token_sizes(rows, parts) == sizes


@given(
    st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=8), min_size=1, max_size=8), st.integers(1, 4), st.data()
)
def test_no_other_cut_has_a_smaller_largest_part(rows, parts, data):
    parts = min(parts, len(rows))
    rows = [np.array(rows[index]) for index in prefix_tree.shared_prefixes(arrays(*rows))[0]]

    def largest(sizes):
        ends = np.cumsum(sizes)
        return max(
            len({tuple(row[:end]) for row in rows[stop - size : stop] for end in range(1, len(row) + 1)})
            for stop, size in zip(ends, sizes, strict=True)
        )

    sizes = token_sizes(rows, parts)
    assert len(sizes) == parts and sum(sizes) == len(rows) and min(sizes) >= 1
    cuts = itertools.combinations(range(1, len(rows)), parts - 1)
    others = [np.diff([0, *cut, len(rows)]).tolist() for cut in cuts]
    assert largest(sizes) == min(map(largest, others))


def test_rows_may_change_micro_batch(log):
    assert rows_may_change_micro_batch("dapo", 1.0, False)
    assert not rows_may_change_micro_batch("bnpo", 1.0, False)
    assert not rows_may_change_micro_batch("dapo", 0.8, False)
    assert not rows_may_change_micro_batch("dapo", 1.0, True)
    assert not rows_may_change_micro_batch("dapo", 1.0, False, aux_loss=True)


def mixture(tokenizer, **settings):
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=64,
            moe_intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            num_experts=4,
            num_experts_per_tok=2,
            max_position_embeddings=2048,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            **settings,
        )
    )


def stretched(tokenizer):
    """A model whose rotary embedding depends on the length of the batch."""
    model = tiny.build_model(tokenizer)
    model.config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    return model


@pytest.mark.parametrize("build, reason", [(stretched, "rotary embedding"), (mixture, "load-balancing loss averages")])
def test_rows_stay_where_they_are_if_prefixes_are_not_shared(tokenizer, tmp_path, log, build, reason):
    shared, alone = (
        train(tokenizer, tmp_path / str(sharing), model=build(tokenizer), prefix_sharing=sharing)
        for sharing in (True, False)
    )
    for with_sharing, without in zip(shared._buffered_inputs, alone._buffered_inputs, strict=True):
        assert torch.equal(with_sharing["completion_ids"], without["completion_ids"])
    (line,) = log()
    assert reason in line


@pytest.fixture
def packed(monkeypatch):
    """Rows of each chunk that was scored packed, or asked for and declined (negative)."""
    chunks = []

    def spy(model, ids, *args, **kwargs):
        scores = prefix_sharing.shared_prefix_logps(model, ids, *args, **kwargs)
        chunks.append(len(ids) if scores is not None else -len(ids))
        return scores

    monkeypatch.setattr(mixin, "shared_prefix_logps", spy)
    return chunks


@pytest.mark.parametrize("router_logits", [False, True])
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_mixtures_of_experts(tokenizer, tmp_path, log, packed, router_logits, beta):
    # Every log-probability is packed, with the load-balancing loss and without: old, the reference's, new
    settings = {"num_iterations": 2, "beta": beta, "max_steps": 2, "optim": "sgd"}
    kinds = {"balanced": {}, "alone": {"prefix_sharing": False}, "free": {"router_aux_loss_coef": 0.0}}
    balanced, alone, free = (
        train(
            tokenizer,
            tmp_path / name,
            model=mixture(tokenizer, output_router_logits=router_logits),
            **settings,
            **kind,
        )
        for name, kind in kinds.items()
    )
    assert packed == [4] * 2 * (4 + 4 * bool(beta) + 8)
    for ours, row_by_row in zip(balanced.state.log_history[:2], alone.state.log_history[:2], strict=True):
        assert ours["arpo/packed_token_fraction"] == 1
        for name in ("aux_loss", "loss", "grad_norm"):
            assert ours[name] == pytest.approx(row_by_row[name], rel=1e-4, abs=1e-6)
    assert "aux_loss" not in free.state.log_history[0]
    assert not [line for line in log() if "one by one" in line]


class Compared(ARPOTrainer):
    """Keeps, of each micro-batch, the new log-probabilities beside the old ones and the reference's."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.differences = {"old_per_token_logps": [], "ref_per_token_logps": []}

    def _compute_loss(self, model, inputs):
        self.inputs = inputs
        try:
            return super()._compute_loss(model, inputs)
        finally:
            self.inputs = None

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        scores = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        inputs = getattr(self, "inputs", None)
        for name, differences in self.differences.items():
            if inputs is not None and name in inputs:
                difference = (scores[0].detach().float() - inputs[name].float()) * inputs["completion_mask"]
                differences.append(difference.abs().max().item())
        return scores


@pytest.mark.parametrize("margin", [0.0, 0.6])  # sharing never pays, or for rows of one prompt alone
def test_one_path_scores_old_reference_and_new_log_probabilities(tokenizer, tmp_path, packed, monkeypatch, margin):
    monkeypatch.setattr(prefix_sharing, "_MARGIN", margin)
    model = tiny.build_model(tokenizer).to(torch.bfloat16)
    # Weights never move, so that one path gives the same numbers each time. A step is one micro-batch, and so rows
    # stay where TRL's shuffle puts them: chunks of one prompt become micro-batches of several.
    settings = {"learning_rate": 0.0, "num_iterations": 2, "beta": 0.1, "max_steps": 8}
    settings |= {"gradient_accumulation_steps": 1, "steps_per_generation": 4}
    trainer = train(tokenizer, tmp_path, model=model, trainer_class=Compared, **settings)
    assert packed == [4] * 16  # 4 chunks of old ones, 4 of the reference, 8 of new ones
    for differences in trainer.differences.values():
        assert len(differences) == 8 and max(differences) < 1e-3


def test_evaluation_leaves_the_path_of_training_alone(tokenizer, tmp_path, packed, monkeypatch):
    monkeypatch.setattr(prefix_sharing, "_MARGIN", 0.6)
    trainer = train(tokenizer, tmp_path, loss_type="bnpo", beta=0.1)
    del packed[:]
    trainer.evaluate(Dataset.from_list(PROMPTS[:1]))
    assert packed and all(rows > 0 for rows in packed)


def test_the_modelled_cost_decides_where_nothing_is_compared(tokenizer, tmp_path, packed, monkeypatch):
    monkeypatch.setattr(prefix_sharing, "_MARGIN", 0.0)
    train(tokenizer, tmp_path)
    assert packed == [-4] * 4


def test_wrappers_of_the_trained_model_decide_for_old_log_probabilities_too(tokenizer, tmp_path, packed):
    trainer = train(tokenizer, tmp_path)
    ids = torch.arange(3, 43).repeat(4, 1)
    arguments = (trainer.model, ids, torch.ones_like(ids), 10)
    del packed[:]
    with torch.no_grad():
        trainer._get_per_token_logps_and_entropies(*arguments)
        assert packed == [4]
        trainer.model_wrapped = torch.compile(trainer.model)  # as `Trainer` wraps it: the old ones bypass the wrapper
        scores = trainer._get_per_token_logps_and_entropies(*arguments)
        expected = GRPOTrainer._get_per_token_logps_and_entropies(trainer, *arguments)
    assert packed == [4] and torch.equal(scores[0], expected[0])


def vision_processor(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    tokenizer.chat_template = (
        "{% for message in messages %}{% if message.content is string %}{{ message.content }}{% else %}"
        "{% for part in message.content %}{{ '<image>' if part.type == 'image' else part.text }}{% endfor %}"
        "{% endif %}{% endfor %}"
    )
    return LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=tokenizer.chat_template,
    )


def test_two_images_a_prompt_train_as_with_grpo(tokenizer, tmp_path):
    processor = vision_processor(tokenizer)
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"vocab_size": len(processor.tokenizer), "num_key_value_heads": 1, "head_dim": 16, **shape}
    config = LlavaConfig(
        text_config={"model_type": "qwen3", "pad_token_id": 0, "eos_token_id": 2, **text},
        vision_config={"model_type": "clip_vision_model", "image_size": 28, "patch_size": 14, **shape},
        image_token_id=processor.tokenizer.convert_tokens_to_ids("<image>"),
    )
    draw = np.random.default_rng(0)

    def image():
        return Image.fromarray(draw.integers(0, 255, (28, 28, 3), dtype=np.uint8))

    rows = [{"prompt": [{"role": "user", "content": "what?"}], "images": [image(), image()]} for _ in range(4)]
    weights = []
    for trainer_class, config_class, extra in (
        (GRPOTrainer, GRPOConfig, {}),
        (ARPOTrainer, ARPOConfig, {"num_initial_generations": 4}),
    ):
        torch.manual_seed(0)
        args = config_class(
            str(tmp_path / trainer_class.__name__),
            num_generations=4,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            max_completion_length=8,
            max_steps=2,
            learning_rate=1e-2,
            bf16=False,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            **extra,
        )
        trainer = trainer_class(
            LlavaForConditionalGeneration(config),
            args=args,
            processing_class=processor,
            reward_funcs=length_reward,
            train_dataset=Dataset.from_list(rows),
        )
        trainer.train()
        weights.append(trainer.model.state_dict())
    assert all(torch.equal(weights[0][name], value) for name, value in weights[1].items())


class WithoutFloat64(TorchFunctionMode):
    """A device that has no float64, as MPS."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        return result


def test_rollout_metrics_need_no_float64(tokenizer, tmp_path):
    trainer = train(tokenizer, tmp_path)
    rollout = next(iter(trainer._metrics["train"].values()), None)
    assert rollout is None  # all were logged
    with WithoutFloat64():
        advantages = list(trainer._logs["advantages"])
        trainer._reporter.metrics(trainer._groups, trainer._engine.lookups, advantages)
    logged = trainer.state.log_history[0]
    for name, values in trainer._metrics["train"].items():
        assert values[0] == pytest.approx(logged[name]), name
    assert logged["arpo/initial"] == 4
