"""
The prefix tree of a batch of rows, found from their tokens alone, and what it costs to compute. Pure: numpy in, numpy
out; time and memory grow linearly with the tokens.

Sorted by tokens, each row shares its longest prefix with the row before it, so the rows laid end to end without those
prefixes are the tree in depth-first order. Two rows share a *position* if they agree on its token and on the next: a
position predicts one token, so the last token before a fork stands once for each child.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


class Cost(NamedTuple):
    """
    What a forward is made of, in FLOPs: one token, one query-key pair, one attention call, each over all layers.
    `causal` is the part of a square under a causal mask that the kernel computes. `windowed` is a pair over the layers
    with a sliding window, of which `window` tokens are read; `pair` leaves these out.
    """

    token: float
    pair: float
    call: float
    causal: float = 1.0
    windowed: float = 0.0
    window: int = 0

    def row(self, new: int, length: int) -> float:
        """Cost of a row of `length` tokens of which the last `new` are computed."""
        if not new:
            return 0.0
        pairs = new * length - (1 - self.causal) * new * new
        in_window = new * min(length, self.window)
        return self.token * new + self.pair * pairs + self.windowed * in_window + self.call

    def batch(self, rows: int, length: int, padded: bool) -> float:
        """Cost of `rows` rows of `length` tokens, padding included, in one attention call."""
        pairs = length * length * (1.0 if padded else self.causal)
        # A kernel that computes a whole square under a causal mask does so under a window, too
        in_window = length * (length if self.causal == 1.0 else min(length, self.window))
        return rows * (self.token * length + self.pair * pairs + self.windowed * in_window) + self.call


class Segment(NamedTuple):
    """The part of a row that no row before it has: stands at `start` in the pack, begins at `depth` of the row."""

    row: int
    start: int
    depth: int


@dataclass
class PrefixTree:
    """
    Rows packed into one sequence in which every shared position stands once, in depth-first order.

    Args:
        input_ids (`np.ndarray` of shape `(L,)`): Tokens.
        position_ids (`np.ndarray` of shape `(L,)`): Depth of each token in its row, from 0.
        labels (`np.ndarray` of shape `(L,)`): Next token where a row scores it, else -100.
        slots (`list[np.ndarray]`): For each row, where its positions 0, 1, … stand in the pack; empty for a row that
            is not packed.
        segments (`list[Segment]`): What each row adds; they tile the pack in order.
        cost (`float`): Modelled FLOPs of a forward.
    """

    input_ids: np.ndarray
    position_ids: np.ndarray
    labels: np.ndarray
    slots: list[np.ndarray]
    segments: list[Segment]
    cost: float

    def subtree_ends(self) -> np.ndarray:
        """Ends of the subtrees below each token: the one at `q` attends to the one at `k` if `k <= q < ends[k]`."""
        ends = np.empty_like(self.input_ids)
        for segment in self.segments:
            path = self.slots[segment.row]
            ends[path] = path[-1] + 1
        return ends

    def row_counts(self) -> np.ndarray:
        """How many rows hold each token."""
        counts = np.zeros_like(self.input_ids)
        for slots in self.slots:
            counts[slots] += 1
        return counts


def shared_prefixes(rows: Sequence[np.ndarray]) -> tuple[list[int], list[int]]:
    """
    Order rows so that each shares more with the one before it than with any earlier one.

    Args:
        rows (`Sequence[np.ndarray]`): Token ids of each row, 1-D and of one dtype.

    Returns:
        `tuple[list[int], list[int]]`: the order (indices of rows; equal rows stay in the order they came in), and the
        number of leading tokens that each row of that order shares with the one before it (0 for the first).
    """
    keys = [row.tobytes() for row in rows]  # any order does in which equal prefixes are neighbours; bytes compare fast
    order = sorted(range(len(rows)), key=keys.__getitem__)
    return order, shared_with_previous([rows[row] for row in order])


def shared_with_previous(rows: Sequence[np.ndarray]) -> list[int]:
    """The number of leading tokens that each row shares with the one before it (0 for the first)."""
    shared = [0] * min(1, len(rows))
    for before, after in zip(rows, rows[1:], strict=False):
        n = min(len(before), len(after))
        differs = before[:n] != after[:n]
        shared.append(int(differs.argmax()) if differs.any() else n)
    return shared


def unpadded(input_ids: np.ndarray, mask: np.ndarray) -> list[np.ndarray]:
    """The tokens of each row: those whose mask is 1. Both arrays are of shape `(B, T)`."""
    return [row[kept] for row, kept in zip(input_ids, mask.astype(bool), strict=True)]


def sibling_order(
    rows: Sequence[np.ndarray], steps_per_generation: int = 1, gradient_accumulation_steps: int = 1
) -> list[int]:
    """
    Put rows that share a prefix next to each other, and so into one micro-batch, without moving any row to another
    optimiser step.

    The loss of a step is that of the same rows, so losses that average over rows or over all tokens of the step are
    unchanged. Losses that average over the tokens of each micro-batch are not: rows that share a prefix are alike, so
    [`~arpo_trl.scoring.shared_prefix.rows_may_change_micro_batch`] decides first.

    Args:
        rows (`Sequence[np.ndarray]`): Token ids (prompt and completion, no padding) of each row of a shuffled
            generation batch.
        steps_per_generation (`int`, *optional*, defaults to `1`): Micro-batches that the rows are cut into, in order
            and into equal parts.
        gradient_accumulation_steps (`int`, *optional*, defaults to `1`): Consecutive micro-batches of one optimiser
            step. Where a step begins inside one generation batch and ends inside the next, rows stay within the parts
            that no step divides.

    Returns:
        `list[int]`: a permutation: the row to put at each place.
    """
    if len(rows) % steps_per_generation:
        raise ValueError(
            f"steps_per_generation must divide the number of rows, but {steps_per_generation} does not divide "
            f"{len(rows)}; pass the whole generation batch of a process."
        )
    size = len(rows) // steps_per_generation * math.gcd(steps_per_generation, gradient_accumulation_steps)
    return [
        start + row
        for start in range(0, len(rows), size or 1)
        for row in shared_prefixes(rows[start : start + size])[0]
    ]


def group_order(rows: Sequence[np.ndarray], groups: Sequence[int]) -> list[int]:
    """
    Put the rows of each group next to each other, so that parts of the batch hold whole groups where these fit.

    The groups follow one another in the order in which a row of each comes first, so the order of a uniform shuffle of
    rows makes a uniform shuffle of groups. Within a group siblings are neighbours, beginning with that first row: a
    group that is cut is cut along its tree, and each of its rows is equally likely to be in the first part.

    Args:
        rows (`Sequence[np.ndarray]`): Token ids (prompt and completion, no padding) of each row of a shuffled
            generation batch.
        groups (`Sequence[int]`): Group of each row.

    Returns:
        `list[int]`: a permutation: the row to put at each place.
    """
    members: dict[int, list[int]] = {}
    for row, group in enumerate(groups):
        members.setdefault(group, []).append(row)
    order = []
    for own in members.values():
        siblings = [own[place] for place in shared_prefixes([rows[row] for row in own])[0]]
        first = siblings.index(own[0])
        order += siblings[first:] + siblings[:first]
    return order


def token_sizes(rows: Sequence[np.ndarray], parts: int) -> list[int]:
    """
    Cut rows into consecutive parts of about as many tokens, a shared one counted once, rather than of as many rows.

    Args:
        rows (`Sequence[np.ndarray]`): Token ids (prompt and completion, no padding) of each row; siblings are
            neighbours. At least as many as there are parts.
        parts (`int`): Number of parts.

    Returns:
        `list[int]`: the rows of each part, at least one; the largest part has as few tokens as a cut into so many
        parts allows.
    """
    shared = shared_with_previous(rows)

    def cut(limit: int) -> list[int]:
        """Parts of at most `limit` tokens, or of one row; as few as will do, but `parts` at the least."""
        sizes, tokens = [0], 0
        for row, ids in enumerate(rows):
            more = len(ids) - (shared[row] if sizes[-1] else 0)
            needed = len(rows) - row == parts - len(sizes)  # a row for each of the parts that are still to begin
            if sizes[-1] and (tokens + more > limit or needed):
                sizes.append(0)
                tokens, more = 0, len(ids)
            sizes[-1] += 1
            tokens += more
        return sizes

    low, high = 0, sum(len(ids) for ids in rows)
    while low < high:
        middle = (low + high) // 2
        if len(cut(middle)) <= parts:
            high = middle
        else:
            low = middle + 1
    return cut(low)


def pack(
    rows: Sequence[np.ndarray], prompt_lengths: Sequence[int], cost: Cost, every_token: bool = False
) -> PrefixTree:
    """
    Lay rows out as a prefix tree.

    Args:
        rows (`Sequence[np.ndarray]`): Token ids of each row, prompt and completion.
        prompt_lengths (`Sequence[int]`): Tokens of each row that belong to its prompt, at least 1.
        cost (`Cost`): What tokens, pairs and calls cost.
        every_token (`bool`, *optional*, defaults to `False`): Whether the tokens that score nothing are packed, too:
            the last one of each row, and those of rows without a completion.

    Returns:
        [`PrefixTree`]
    """
    scored = [row for row, prompt_length in enumerate(prompt_lengths) if len(rows[row]) > prompt_length]
    packed = list(range(len(rows))) if every_token else scored
    unpacked = 0 if every_token else 1  # the last token predicts nothing, and nothing attends to it
    order, shared = shared_prefixes([rows[row] for row in packed])
    slots = [np.empty(0, dtype=np.int64)] * len(rows)
    segments: list[Segment] = []
    size, flops = 0, 0.0
    before = np.empty(0, dtype=np.int64)
    for row, shared_tokens in zip((packed[place] for place in order), shared, strict=True):
        length = len(rows[row]) - unpacked
        depth = max(shared_tokens - 1, 0)  # a position is shared if the next token is, too
        slots[row] = before = np.concatenate([before[:depth], np.arange(size, size + length - depth)])
        if depth < length:
            segments.append(Segment(row, size, depth))
            size += length - depth
            flops += cost.row(length - depth, length)
    ids, positions = np.empty(size, dtype=np.int64), np.empty(size, dtype=np.int64)
    for row, start, depth in segments:
        length = len(rows[row]) - unpacked
        ids[start : start + length - depth] = rows[row][depth:length]
        positions[start : start + length - depth] = np.arange(depth, length)
    labels = np.full(size, -100, dtype=np.int64)
    for row in scored:
        labels[slots[row][prompt_lengths[row] - 1 : len(rows[row]) - 1]] = rows[row][prompt_lengths[row] :]
    return PrefixTree(ids, positions, labels, slots, segments, flops)
