"""A rule that fills a finished tree by what its rows have earned, after
[BranPO](https://huggingface.co/papers/2602.03719): where rows of one prefix end differently.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ..tree import Group
from .base import Node
from .expansion import RandomExpansion, share_rows, stretches


def mixed_chance(rewards: Sequence[float], mean: float) -> float:
    """
    4 p (1 − p): how likely a further row is to end differently from another one at its node; 1 where both ends are
    equally likely. p is the mean reward of the rows that have passed the node, with the mean of the group as one row
    more.

    Args:
        rewards (`Sequence[float]`): Of the rows that have passed the node, from 0 (the least of the group) to 1 (its
            most).
        mean (`float`): Their mean over the group.
    """
    p = (sum(rewards) + mean) / (len(rewards) + 1)
    return 4.0 * p * (1.0 - p)


@dataclass(frozen=True)
class Contrast(RandomExpansion):
    """
    Share the missing rows out over the nodes of the finished tree where rows are likely to end differently, for each
    tool call that a row from there costs, after [BranPO](https://huggingface.co/papers/2602.03719). A group whose rows
    have all earned the same gets no more.
    """

    paper: ClassVar[str] = "2602.03719"
    needs_rewards: ClassVar[bool] = True

    def expand(self, group: Group, rng: random.Random) -> list[Node]:
        scored = {row: reward for row, reward in enumerate(group.rewards) if reward is not None}
        if not scored or max(scored.values()) == min(scored.values()):
            return []
        low, high = min(scored.values()), max(scored.values())
        shares = {row: (reward - low) / (high - low) for row, reward in scored.items()}
        mean = sum(shares.values()) / len(shares)
        weights, samples = {}, {}
        for node, sampled in stretches(group).items():
            passed = [shares[row] for row in sampled.rows if row in shares]
            weights[node] = mixed_chance(passed, mean) / (1.0 + sampled.calls)
            samples[node] = sampled.segments
        granted = share_rows(list(weights.values()), list(samples.values()), self.rows_now(group), rng)
        return [node for node, count in zip(weights, granted, strict=True) for _ in range(count)]
