"""
What a branching rule answers, held to what it was asked: a rule of one's own that answers something else ends the run
with one error that names its method, what it returned and what it may return.
"""

import math
import random
from typing import Any

from ..tree import Group, Segment
from .base import BranchRule, Node
from .expansion import sampled_nodes


def decide(rule: BranchRule, segment: Segment, rng: random.Random) -> tuple[float | None, int]:
    """
    Ask a rule whether a segment forks.

    Returns:
        `tuple[float | None, int]`: the probability, `None` where nothing is decided, and the forks that are asked for.

    Raises:
        ValueError: The rule's answer is no probability, or no number of forks.
    """
    probability = rule.probability(segment)
    if probability is None:
        return None, 0
    if not _is_number(probability) or not 0 <= probability <= 1:
        raise _wrong(rule, "probability", probability, "a number between 0 and 1, or None")
    forks = rule.forks(probability, rng)
    if not isinstance(forks, int) or forks < 0:
        raise _wrong(rule, "forks", forks, "a whole number, 0 or more")
    return probability, forks


def priority(rule: BranchRule, segment: Segment) -> float:
    """
    Ask a rule how early a segment goes.

    Raises:
        ValueError: The rule's answer is no number.
    """
    found = rule.priority(segment)
    if not _is_number(found) or math.isnan(found):
        raise _wrong(rule, "priority", found, "a number")
    return found


def expand(rule: BranchRule, group: Group, rng: random.Random) -> list[Node]:
    """
    Ask a rule where the missing rows of a group start.

    Raises:
        ValueError: The rule's answer is no list of nodes, has none or too many of them, or one that the group lacks.
    """
    nodes = rule.expand(group, rng)
    least = 0 if rule.needs_rewards else 1
    if not isinstance(nodes, list) or not least <= len(nodes) <= group.budget:
        least_text = "at least one and " if least else ""
        raise _wrong(rule, "expand", nodes, f"a list of {least_text}at most {group.budget} nodes")
    known = sampled_nodes(group)
    for node in nodes:
        if not isinstance(node, Node) or node not in known:
            raise _wrong(rule, "expand", [node], "nodes of `arpo_trl.rollout.rules.sampled_nodes(group)`")
        if node.segment and not rule.expands:
            raise _wrong(
                rule, "expand", [node], "`PROMPT` alone, or say `expands: ClassVar[bool] = True` in the class"
            )
    return nodes


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def _wrong(rule: BranchRule, method: str, answer: Any, right: str) -> ValueError:
    return ValueError(f"`branch_rule`: `{type(rule).__name__}.{method}` returned {answer!r}; return {right}.")
