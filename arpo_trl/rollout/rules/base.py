"""What a branching rule is asked: three questions, answered from plain data.

What is not here: how an entropy is measured (`engines/`), how a fork is made and what it costs (`loop.py`).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from ..tree import Group, Segment


class Node(NamedTuple):
    """
    A place in a finished tree from which a new row may start: the tool result before a segment, or the prompt.

    Args:
        row (`int`): Index in `group.trajectories` of the trajectory that sampled the segment.
        segment (`int`): Index of the segment among those of the trajectory; 0 is the prompt.
    """

    row: int
    segment: int


PROMPT = Node(0, 0)


@dataclass(frozen=True)
class BranchRule:
    """
    When a rollout forks. A subclass answers one of the three questions differently, or all.

    The fields of a subclass that is a dataclass are filled from the fields of [`ARPOConfig`] that have the same names,
    so a rule states what it needs and repeats no default.

    Attributes:
        paper (`str`): arXiv id of the paper that the rule is from; empty for a rule of one's own.
        expands (`bool`): Whether rows are forked that have ended, so that what is cached of them has to be kept.
        needs_rewards (`bool`): Whether `expand` reads `group.rewards`. It is then asked when the rows of all groups
            have ended and have been scored, and may return no node: the group gets no more rows.
    """

    paper: ClassVar[str] = ""
    expands: ClassVar[bool] = False
    needs_rewards: ClassVar[bool] = False

    def probability(self, segment: Segment) -> float | None:
        """
        Does this segment ask for a fork?

        Args:
            segment ([`Segment`]): Follows a tool result; its `entropy` and `entropy_gap` are known.

        Returns:
            `float` or `None`: probability of a fork at the tool result before `segment`; `None` if nothing is decided
            while rows go on. The record of the rollout keeps it.
        """
        return None

    def forks(self, probability: float, rng: random.Random) -> int:
        """How many forks a segment gets that asks with `probability`, if the group has the rows."""
        return int(rng.random() < probability)

    def priority(self, segment: Segment) -> float:
        """
        Who goes first, where the segments of a wave ask for more forks than the group has rows left? The largest does;
        ties are broken at random.
        """
        return segment.entropy_gap or 0.0

    def expand(self, group: Group, rng: random.Random) -> list[Node]:
        """
        Where do the missing rows of a group start once all others have ended?

        Args:
            group ([`Group`]): Its rows have ended; `group.budget` are missing, `group.rounds` times it was asked
                before.
            rng (`random.Random`): Source of chance.

        Returns:
            `list[Node]`: one node a new row, at least one and at most `group.budget`. The group is asked again when
            these rows have ended, until none is missing. None from a rule that `needs_rewards` ends the group.
        """
        return [PROMPT] * group.budget


def allocate_forks(priorities: Sequence[float], wanted: Sequence[int], budget: int, rng: random.Random) -> list[int]:
    """
    Share a group's remaining rows among the segments of one wave that asked for forks.

    The largest priority goes first, ties are broken at random.

    Args:
        priorities (`Sequence[float]`): Priority of each asking segment.
        wanted (`Sequence[int]`): Forks that each of them asks for.
        budget (`int`): Rows that the group has left.
        rng (`random.Random`): Breaks ties.

    Returns:
        `list[int]`: number of forks that each segment gets, in the order of `priorities`.
    """
    granted = [0] * len(priorities)
    for index in sorted(range(len(priorities)), key=lambda i: (-priorities[i], rng.random())):
        granted[index] = min(wanted[index], budget)
        budget -= granted[index]
    return granted
