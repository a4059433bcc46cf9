"""
Forks that differ: the segment that a fork samples first is sampled anew until its node has not given it yet, and the
weights with which such rows keep the expectation of the gradient.

A *node* is a tool result at which forks left a row. What was sampled there is the segment of that row and the first
segments of the forks. Sampled until they differ, they are drawn from the model without replacement, for which
[Estimating Gradients for Discrete Random Variables by Sampling without
Replacement](https://huggingface.co/papers/2002.06043) gives the weights.

What is not here: where forks leave (`rules/`); rows that start from the prompt, which are sampled as they come.
"""

import math
from collections.abc import Callable, Mapping, Sequence

from .engines.base import Sample
from .tree import Group, Segment, Trajectory

_SMALLEST = 1e-12  # mass left for the next draw, so that a segment of probability 1 divides by no 0


def sampled_at(group: Group, parent: int, token: int) -> list[tuple[Trajectory, Segment]]:
    """
    What the rows of a group have sampled at a node, the row first that the forks left.

    Args:
        group (`Group`): The group.
        parent (`int`): Row that the forks left.
        token (`int`): Index of the completion token at which they left.
    """
    rows = [group.trajectories[parent - group.rows.start]]
    rows += [row for row in group.trajectories if row.parent == parent and row.fork_token == token]
    return [(row, segment) for row in rows for segment in row.segments if segment.start == token]


def distinct_samples(
    samples: Sequence[Sample],
    waiting: Sequence[Trajectory],
    group_of: Mapping[int, Group],
    again: Callable[[list[int], Sequence[Sample]], list[Sample]],
    anyone: Callable[[bool], bool],
    tries: int,
) -> list[Sample]:
    """
    Sample the forks that repeat what their node has given anew, those of all nodes at once.

    Args:
        samples (`Sequence[Sample]`): What was sampled for each waiting row.
        waiting (`Sequence[Trajectory]`): The rows. A fork's `rejected_tokens` counts what is thrown away.
        group_of (`Mapping[int, Group]`): Group of each row.
        again (`Callable[[list[int], Sequence[Sample]], list[Sample]]`): Samples the waiting rows of these indices
            anew; told all samples as they are, since those of the other rows are needed later.
        anyone (`Callable[[bool], bool]`): Whether this is true on any process; collective.
        tries (`int`): Times that a fork is sampled at most. The last sample stays, whatever it is.
    """
    samples = list(samples)
    for _ in range(tries - 1):
        taken: dict[tuple[int, int], set[tuple[int, ...]]] = {}
        copies = []
        for index, (trajectory, sample) in enumerate(zip(waiting, samples, strict=True)):
            if not trajectory.resamples or trajectory.parent is None or trajectory.fork_token is None:
                continue
            node = trajectory.parent, trajectory.fork_token
            if node not in taken:
                rows = sampled_at(group_of[trajectory.row], *node)
                taken[node] = {tuple(row.completion_ids[segment.start : segment.end]) for row, segment in rows}
            if tuple(sample.ids) in taken[node]:
                copies.append(index)
            taken[node].add(tuple(sample.ids))
        if not anyone(bool(copies)):
            break
        for index in copies:
            waiting[index].rejected_tokens += len(samples[index].ids)
        for index, sample in zip(copies, again(copies, samples), strict=True):
            samples[index] = sample
    return samples


def weights_without_replacement(probabilities: Sequence[float]) -> list[float]:
    """
    Weights of samples that were drawn one after another, none twice: Σ wᵢ f(sᵢ) has the expectation of f under the
    distribution that they were drawn from, whatever f is.

    wᵢ = p(sᵢ) R(S, sᵢ), with R the leave-one-out ratio of the unordered set estimator (Kool et al.,
    https://huggingface.co/papers/2002.06043): the probability that sᵢ was the first to be drawn, given the set. For
    two, w₁ = (1 − p₂) / (2 − p₁ − p₂).

    Args:
        probabilities (`Sequence[float]`): Probability of each sample, k of them. Time is 2^k.

    Returns:
        `list[float]`: weights that add up to 1.
    """
    size = len(probabilities)
    mass = [0.0] * (1 << size)  # of each set of samples
    # Σ over the orders in which the other samples may follow a set, of Π 1 / (1 − mass drawn before). Each order has
    # the product of all probabilities as another factor, which cancels
    orders = [0.0] * (1 << size)
    orders[-1] = 1.0
    for drawn in range(1, 1 << size):
        lowest = (drawn & -drawn).bit_length() - 1
        mass[drawn] = mass[drawn & (drawn - 1)] + probabilities[lowest]
    for drawn in range((1 << size) - 2, 0, -1):
        following = sum(orders[drawn | 1 << index] for index in range(size) if not drawn >> index & 1)
        orders[drawn] = following / max(1.0 - mass[drawn], _SMALLEST)
    first = [orders[1 << index] for index in range(size)]
    return [weight / sum(first) for weight in first]


def fork_weights(group: Group) -> list[float]:
    """
    Weight of each row of a group whose forks were sampled until they differed: for each node that a row has passed, k
    times its weight among the k that were sampled there. Rows add up in the gradient as those of forks that were
    sampled independently do on average, as long as the number of forks at a node does not depend on what was sampled
    there. A node that has given the same segment twice, or whose probabilities are not known, weighs its rows equally.
    """
    first = group.rows.start
    nodes = {
        (row.parent, row.fork_token)
        for row in group.trajectories
        if row.parent is not None and row.fork_token is not None
    }
    weight_at: dict[tuple[int, int, int], float] = {}  # by parent, token and the row that sampled there
    for parent, token in nodes:
        rows = sampled_at(group, parent, token)
        texts = {tuple(row.completion_ids[segment.start : segment.end]) for row, segment in rows}
        logprobs = [segment.logprob for _, segment in rows if segment.logprob is not None]
        if len(texts) < len(rows) or len(logprobs) < len(rows):
            continue
        weights = weights_without_replacement([math.exp(logprob) for logprob in logprobs])
        for (row, _), share in zip(rows, weights, strict=True):
            weight_at[parent, token, row.row] = len(rows) * share

    def weight(row: Trajectory, stop: float) -> float:
        """Of the nodes that `row` passed before token `stop`."""
        own = [weight_at.get((*node, row.row), 1.0) for node in nodes if node[0] == row.row and node[1] < stop]
        if row.parent is None or row.fork_token is None:
            return math.prod(own)
        left = weight_at.get((row.parent, row.fork_token, row.row), 1.0)
        return math.prod(own) * left * weight(group.trajectories[row.parent - first], row.fork_token)

    return [weight(row, math.inf) for row in group.trajectories]
