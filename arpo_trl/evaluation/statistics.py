"""What the scores of an evaluation say: accuracy, pass@k, calls, and how sure they are."""

import math
import random
from collections.abc import Sequence
from typing import Any


def summarize(records: Sequence[dict[str, Any]], ks: Sequence[int] = (1,)) -> dict[str, float]:
    """
    Mean score, accuracy, pass@k, each with its 95 % bootstrap interval over questions (`…_low`, `…_high`), calls and
    seconds per question.

    Completions without a score are counted in `unscored` and left out of the rest; pass@k is over the questions that
    have k scored completions.

    Args:
        records (`Sequence[dict]`): What [`evaluate`] returned.
        ks (`Sequence[int]`): Values of k; those above the number of completions are left out.
    """
    scores = [[value for value in record["scores"] if value is not None] for record in records]
    right = [[value for value in record["correct"] if value is not None] for record in records]
    if not any(right):
        raise ValueError("No completion has a score: `records` is empty, or the score function returned only None.")
    calls = [len(calls) for record in records for calls in record["tool_calls"]]
    summary: dict[str, float] = {
        "questions": len(records),
        "completions_per_question": len(calls) / len(records),
        "unscored": len(calls) - sum(map(len, right)),
        **_with_interval("score", [sum(row) / len(row) for row in scores if row]),
        **_with_interval("accuracy", [sum(row) / len(row) for row in right if row]),
        "calls_per_completion": sum(calls) / len(calls),
        "truncated": sum(sum(record["truncated"]) for record in records) / len(calls),
        "seconds_per_question": sum(record["seconds"] for record in records) / len(records),
    }
    for k in ks:
        estimates = [pass_at_k(len(row), sum(row), k) for row in right if len(row) >= k]
        if estimates:
            summary |= _with_interval(f"pass@{k}", estimates)
    return summary


def _with_interval(name: str, values: Sequence[float]) -> dict[str, float]:
    low, high = bootstrap_interval(values)
    return {name: sum(values) / len(values), f"{name}_low": low, f"{name}_high": high}


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    """
    Probability that at least one of k samples is right, estimated without bias from `num_samples` of which `num_right`
    are: 1 − C(n − c, k) / C(n, k) ([Chen et al., 2021](https://huggingface.co/papers/2107.03374), Eq. 1).
    """
    return 1.0 - math.comb(num_samples - num_right, k) / math.comb(num_samples, k)


def bootstrap_interval(values: Sequence[float], resamples: int = 1000, level: float = 0.95) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of `values`; resampling is seeded, so that it repeats."""
    rng = random.Random(0)
    means = sorted(sum(rng.choices(values, k=len(values))) / len(values) for _ in range(resamples))
    tail = (1 - level) / 2
    return means[int(tail * resamples)], means[min(int((1 - tail) * resamples), resamples - 1)]
