"""Rules that let all rows of a group end and then fork anywhere in its tree, in rounds."""

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import ClassVar, NamedTuple

from ..tree import Group, Trajectory
from .base import PROMPT, BranchRule, Node


def expansion_weight(entropy: float, calls: float) -> float:
    """
    H / (1 + c): what a node of a finished tree has to teach for what a row from it costs.

    Args:
        entropy (`float`): H, mean entropy of the segments that were sampled at the node, in nats.
        calls (`float`): c, tool calls that those rows went on to execute, on average. The 1 stands for the row's
            tokens.
    """
    return entropy / (1.0 + calls)


def share_rows(weights: Sequence[float], samples: Sequence[int], rows: int, rng: random.Random) -> list[int]:
    """
    Share rows among the nodes of a finished tree in proportion to their weight.

    Each row goes to the node with the largest weight per sample; ties are broken at random. It is the entropy-guided
    tree expansion of [AT²PO](https://huggingface.co/papers/2601.04767), with a division where AT²PO subtracts a
    penalty for each branch, so that no scale of entropies has to be known, and with the cost of a row in the weight.

    Args:
        weights (`Sequence[float]`): Weight of each node, 0 or more.
        samples (`Sequence[int]`): Rows that have sampled each node already, 1 or more.
        rows (`int`): Rows to share out.
        rng (`random.Random`): Breaks ties.

    Returns:
        `list[int]`: number of rows that each node gets.
    """
    granted = [0] * len(weights)
    for _ in range(rows):
        shares = [weight / (n + more) for weight, n, more in zip(weights, samples, granted, strict=True)]
        granted[max(range(len(shares)), key=lambda i: (shares[i], rng.random()))] += 1
    return granted


def sampled_nodes(group: Group) -> dict[Node, list[tuple[float | None, int]]]:
    """
    Where a finished group can be expanded, and what came of each segment that was sampled there.

    Returns:
        `dict[Node, list[tuple[float | None, int]]]`: by the node, named after the row that sampled it first, the
        entropy of each segment that was sampled there and the calls that its row went on to make.
    """
    nodes: dict[Node, list[tuple[float | None, int]]] = {PROMPT: []}
    for node, row, index in _segments(group):
        calls = len(row.calls) - row.starts[index].calls
        nodes.setdefault(node, []).append((row.segments[index].entropy, calls))
    nodes[PROMPT] = nodes[PROMPT] or [(None, 0)]  # no row has sampled anything
    return nodes


def _segments(group: Group) -> Iterator[tuple[Node, Trajectory, int]]:
    """Each segment that was sampled in a group, as its row and index, and the node at which."""
    for row, trajectory in enumerate(group.trajectories):
        parent = None if trajectory.parent is None else trajectory.parent - group.rows.start
        for index, segment in enumerate(trajectory.segments[: len(trajectory.starts)]):
            if segment.start < (trajectory.fork_token or 0):
                continue  # the parent's
            node = Node(row, index)
            if index == 0:
                node = PROMPT
            elif parent is not None and segment.start == trajectory.fork_token:
                node = Node(parent, index)
            yield node, trajectory, index


class Sampled(NamedTuple):
    """
    What came of a node.

    Args:
        segments (`int`): Segments that were sampled there.
        calls (`float`): Calls that their rows went on to make, on average.
        rows (`list[int]`): Indices in the group of the rows that have passed it, forks that left later included.
    """

    segments: int
    calls: float
    rows: list[int]


def stretches(group: Group) -> dict[Node, Sampled]:
    """What came of each node of a finished group at which a segment was sampled."""
    first = {(row.row, row.segments[index].start): node for node, row, index in _segments(group)}
    passed: dict[Node, list[int]] = {}
    for number, row in enumerate(group.trajectories):
        for segment in row.segments[: len(row.starts)]:
            owner = row
            while owner.parent is not None and segment.start < (owner.fork_token or 0):
                owner = group.trajectories[owner.parent - group.rows.start]
            passed.setdefault(first[owner.row, segment.start], []).append(number)
    return {
        node: Sampled(len(sampled), fmean(calls for _, calls in sampled), passed[node])
        for node, sampled in sampled_nodes(group).items()
        if node in passed
    }


def node_novelties(group: Group) -> dict[Node, float]:
    """
    Probability that a row from each node of a finished group samples there what no row has sampled there yet: 1 − Σ p
    over the different segments. 0 where a probability is not known.
    """
    known: dict[Node, dict[tuple[int, ...], float]] = {}
    for node, row, index in _segments(group):
        segment = row.segments[index]
        logprob = 0.0 if segment.logprob is None else segment.logprob
        known.setdefault(node, {})[tuple(row.completion_ids[segment.start : segment.end])] = math.exp(logprob)
    return {node: max(1.0 - math.fsum(texts.values()), 0.0) for node, texts in known.items()}


@dataclass(frozen=True)
class RandomExpansion(BranchRule):
    """Draw the nodes of the finished tree at random ([Tree-GRPO](https://huggingface.co/papers/2509.21240))."""

    expansion_rounds: int

    paper: ClassVar[str] = "2509.21240"
    expands: ClassVar[bool] = True

    def expand(self, group: Group, rng: random.Random) -> list[Node]:
        nodes = self.nodes(group)
        granted = self.share(list(nodes.values()), self.rows_now(group), rng)
        return [node for node, count in zip(nodes, granted, strict=True) for _ in range(count)]

    def rows_now(self, group: Group) -> int:
        """Rows of this round."""
        return math.ceil(group.budget / max(self.expansion_rounds - group.rounds, 1))

    def nodes(self, group: Group) -> dict[Node, list[tuple[float | None, int]]]:
        """What the rows are shared out by (see [`sampled_nodes`])."""
        return sampled_nodes(group)

    def share(self, sampled: Sequence[Sequence[tuple[float | None, int]]], rows: int, rng: random.Random) -> list[int]:
        """How many of `rows` each node gets, from what was sampled there (see [`sampled_nodes`])."""
        drawn = rng.choices(range(len(sampled)), k=rows)
        return [drawn.count(node) for node in range(len(sampled))]


@dataclass(frozen=True)
class Expansion(RandomExpansion):
    """
    Share the missing rows out over the nodes of the finished tree, in proportion to the entropy read there for each
    tool call that a row from there costs, after [AT²PO](https://huggingface.co/papers/2601.04767). With
    `branch_measure="novelty"`, the probability that a row from there is new stands in place of the entropy.
    """

    branch_measure: str = field(default="entropy", kw_only=True)

    paper: ClassVar[str] = "2601.04767"

    def nodes(self, group: Group) -> dict[Node, list[tuple[float | None, int]]]:
        nodes = super().nodes(group)
        if self.branch_measure == "entropy":
            return nodes
        novelties = node_novelties(group)
        return {node: [(novelties.get(node), calls) for _, calls in segments] for node, segments in nodes.items()}

    def share(self, sampled: Sequence[Sequence[tuple[float | None, int]]], rows: int, rng: random.Random) -> list[int]:
        weights = []
        for segments in sampled:
            entropies = [entropy for entropy, _ in segments if entropy is not None]  # an engine may not tell
            weights.append(expansion_weight(fmean(entropies or [0.0]), fmean(calls for _, calls in segments)))
        return share_rows(weights, [len(segments) for segments in sampled], rows, rng)
