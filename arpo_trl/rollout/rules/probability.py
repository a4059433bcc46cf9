"""Rules that decide as rows pass a tool result ([ARPO](https://huggingface.co/papers/2507.19849), section 3.1)."""

import random
from dataclasses import dataclass, field
from typing import ClassVar

from ..tree import Segment
from .base import BranchRule


def fork_probability(gap: float, base: float, weight: float) -> float:
    """P = clip(α + β ΔH, 0, 1) (Eq. 4)."""
    return min(max(base + weight * gap, 0.0), 1.0)


@dataclass(frozen=True)
class Bernoulli(BranchRule):
    """
    Fork with probability P = clip(α + β ΔH, 0, 1) (Eq. 4 and 5); a positive decision makes Z forks. With
    `branch_measure="novelty"`, P is the probability that a fork differs from its parent.
    """

    branch_factor: int
    branch_probability: float
    entropy_weight: float
    branch_measure: str = field(default="entropy", kw_only=True)

    paper: ClassVar[str] = "2507.19849"

    def probability(self, segment: Segment) -> float | None:
        if self.branch_measure == "novelty":
            return segment.novelty
        return fork_probability(segment.entropy_gap or 0.0, self.branch_probability, self.entropy_weight)

    def priority(self, segment: Segment) -> float:
        return segment.novelty or 0.0 if self.branch_measure == "novelty" else super().priority(segment)

    def forks(self, probability: float, rng: random.Random) -> int:
        return self.branch_factor if rng.random() < probability else 0


@dataclass(frozen=True)
class Threshold(Bernoulli):
    """Fork if P > τ."""

    branch_threshold: float

    def forks(self, probability: float, rng: random.Random) -> int:
        return self.branch_factor if probability > self.branch_threshold else 0


@dataclass(frozen=True)
class Chance(Bernoulli):
    """
    Fork with probability α whatever the entropy, which does not decide who goes first either: the control, as in
    [AT²PO](https://huggingface.co/papers/2601.04767).
    """

    paper: ClassVar[str] = "2601.04767"

    def probability(self, segment: Segment) -> float | None:
        return self.branch_probability

    def priority(self, segment: Segment) -> float:
        return 0.0
