"""The small agent, trained with rollouts that run through vLLM, and transformers' view of what the engine sampled."""

import math
from concurrent.futures import FIRST_COMPLETED, wait
from pathlib import Path

import pytest
import tiny
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

from arpo_trl import ARPOConfig, ARPOTrainer
from arpo_trl.viewer.records import read_file

ROWS = [{"prompt": tiny.question(a, b), "a": a, "b": b} for a in range(4) for b in range(4)]
TEMPERATURE = 0.8  # not 1, so that engine and trainer have to agree on it
# Log-probabilities in float32 of two implementations
TOLERANCE = 5e-5
LONGEST = 120


# Contexts that no training has made the model sure of
GENERATOR = torch.Generator().manual_seed(0)
STRANGE = [torch.randint(10, 300, (20,), generator=GENERATOR).tolist() for _ in range(8)]


def correct(completions, a, b, **kwargs):
    texts = [completion[-1].get("content") or "" if completion else "" for completion in completions]
    return [float(str(x + y) in text) - 0.01 * len(text) for text, x, y in zip(texts, a, b, strict=True)]


def trainer(
    folder: Path,
    checkpoint: str,
    protocol: str,
    peft_config=None,
    tools=(tiny.add,),
    reward=correct,
    processing_class=None,
    rows=ROWS,
    **settings,
) -> ARPOTrainer:
    defaults = {
        "use_vllm": True,
        "tool_protocol": protocol,
        "num_generations": 8,
        "num_initial_generations": 4,
        "per_device_train_batch_size": 8,
        "max_completion_length": LONGEST,
        "temperature": TEMPERATURE,
        "learning_rate": 3e-4,
        "lr_scheduler_type": "constant",
        "branch_rule": "random",
        "branch_probability": 1.0,  # every tool result asks for a fork
        "max_steps": 2,
        "logging_steps": 1,
        "log_rollouts": True,
        "model_init_kwargs": {"dtype": "float32"},
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    return ARPOTrainer(
        model=checkpoint,
        args=ARPOConfig(str(folder), **{**defaults, **settings}),
        reward_funcs=reward,
        train_dataset=Dataset.from_list(rows),
        processing_class=processing_class,
        tools=list(tools),
        peft_config=peft_config,
    )


@torch.no_grad()
def exact(model, context: list[int], ids: list[int]) -> torch.Tensor:
    """Log-probabilities (T, V) at the sampling temperature, where `ids` were sampled after `context`."""
    logits = model(torch.tensor([context + ids])).logits[0, len(context) - 1 : -1]
    return torch.log_softmax(logits.float() / TEMPERATURE, dim=-1)


def sampled(logprobs: torch.Tensor, ids: list[int]) -> torch.Tensor:
    return logprobs.gather(1, torch.tensor(ids).unsqueeze(1)).squeeze(1)


def entropy_errors(logprobs: torch.Tensor, told: list[float], top_k: int) -> torch.Tensor:
    """
    By how much the engine's entropies exceed the exact ones, which holds them within their bounds: an even tail is the
    most unsure one that there can be, so the error is not below 0, and with r the mass of the tail not above r ln(V −
    K).
    """
    logprobs = logprobs[: len(told)]
    errors = torch.tensor(told) - torch.special.entr(logprobs.exp()).sum(-1)
    rest = 1 - logprobs.topk(top_k).values.exp().sum(-1)
    assert (errors > -1e-4).all()
    assert (errors < rest * math.log(logprobs.size(1) - top_k) + 1e-4).all()
    return errors


def check_two_steps(logs: list[dict], steps: list[list[dict]], tolerance: float = TOLERANCE):
    """What must hold of two steps, from their logs and rollout records."""
    logs = [log for log in logs if "loss" in log]
    assert len(logs) == len(steps) == 2
    for log, rows in zip(logs, steps, strict=True):
        # TRL's own comparison, over all rows; the second step's sees whether the engine got the first one's update
        assert 0 < log["sampling/sampling_logp_difference/max"] < tolerance
        for part in ("min", "mean", "max"):
            assert log[f"sampling/importance_sampling_ratio/{part}"] == pytest.approx(1, abs=20 * tolerance)
        assert [row["row"] for row in rows] == list(range(8)), "the group is full"
        forks = [row for row in rows if row["kind"] == "fork"]
        assert forks and len(forks) == log["arpo/forks"]
        for fork in forks:
            shared = fork["fork_token"]
            assert fork["completion_ids"][:shared] == rows[fork["parent"]]["completion_ids"][:shared]
            assert fork["tool_mask"][shared - 1] == 0 and len(fork["completion_ids"]) > shared
        assert all(len(row["completion_ids"]) <= LONGEST for row in rows)
        assert all(segment["entropy"] > 0 for row in rows for segment in row["segments"])


def streamed(engine, contexts: list[list[int]], limits: list[int]) -> list:
    """Samples of a stream to which the contexts come one by one; one more is given up as soon as it runs."""
    with engine.rollout(), engine.stream() as stream:
        futures = []
        for context, limit in zip(contexts, limits, strict=True):
            futures.append(stream.start(context, limit))
            stream.step(list)
        while not all(future.done() for future in futures):
            if not stream.step(list):  # a server samples on its own
                wait(futures, timeout=120, return_when=FIRST_COMPLETED)
        given_up = stream.start(STRANGE[0], 400)
    assert given_up.cancelled() or not given_up.done(), "nobody waited for its 400 tokens"
    return [future.result() for future in futures]


def check_samples(
    trainer: ARPOTrainer, checkpoint: str, contexts: list[list[int]], limits: list[int], by_stream: bool = False
):
    """
    Sample after each context with a trainer that has taken steps, and hold what the engine tells against transformers.

    Args:
        by_stream (`bool`): Each context for itself rather than all as a batch.

    Returns:
        `list[Sample]`: what was sampled.
    """
    trainer.model.eval()
    before = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    engine = trainer._engine
    samples = streamed(engine, contexts, limits) if by_stream else engine.sample(contexts, limits)
    assert len(samples) == len(contexts)
    of_the_start = []
    for context, limit, sample in zip(contexts, limits, samples, strict=True):
        assert 1 <= len(sample.ids) <= limit
        assert len(sample.entropies) == min(len(sample.ids), trainer.args.entropy_window)
        told, logprobs = torch.tensor(sample.logprobs), exact(trainer.model, context, sample.ids)
        assert (told - sampled(logprobs, sample.ids)).abs().max() < TOLERANCE
        entropy_errors(logprobs, sample.entropies, trainer.args.vllm_entropy_top_k)
        of_the_start.append((told - sampled(exact(before, context, sample.ids), sample.ids)).abs().max())
    assert max(of_the_start) > 100 * TOLERANCE, f"as told by the weights that training began with: {of_the_start}"
    return samples


def records(folder: Path, step: int, suffix: str = "") -> list[dict]:
    return read_file(Path(folder) / "rollouts" / f"step-{step:06d}{suffix}.jsonl.gz")[0]
