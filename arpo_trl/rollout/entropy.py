"""When to fork: from entropies to a decision. Pure functions; the symbols are those of the ARPO paper
(https://huggingface.co/papers/2507.19849, section 3.1).

What is not here: how entropies are measured (`sampler.py`) and how a fork is made (`loop.py`).

A new rule that decides as rows pass a tool result goes into [`wants_fork`], one that expands a finished tree is named in
`EXPANSION_RULES`; the names of all are in `arpo_trl.config.BRANCH_RULES`.
"""

import math
import random
from collections.abc import Sequence

# Rules that wait until all rows of a group have ended, and then fork anywhere in its tree
EXPANSION_RULES = ("expansion", "random_expansion")


def top_k_entropy(logprobs: Sequence[float], vocab_size: int) -> float:
    """
    Entropy of a distribution of which only the most likely tokens are known.

    The remaining mass r is spread evenly over the other V − K tokens: Σ −p ln p − r ln(r / (V − K)). Leaving it out
    would read an unsure model as a certain one.

    Args:
        logprobs (`Sequence[float]`): Log-probabilities of K distinct tokens, in nats.
        vocab_size (`int`): V, the size of the vocabulary.

    Returns:
        `float`: entropy in nats.
    """
    entropy = -sum(math.exp(logprob) * logprob for logprob in logprobs if logprob > -math.inf)
    rest = 1.0 - sum(math.exp(logprob) for logprob in logprobs)
    if rest > 0.0 and vocab_size > len(logprobs):
        entropy -= rest * math.log(rest / (vocab_size - len(logprobs)))
    return entropy


def mean_entropy(entropies: Sequence[float], window: int) -> float | None:
    """Mean over the first min(k, length) tokens of a segment, in nats; `None` for a segment without tokens."""
    head = entropies[:window]
    return sum(head) / len(head) if head else None


def entropy_gap(entropy: float, baseline: float, window: int, vocab_size: int) -> float:
    """
    ΔH = k (H_t − H_0) / ln V (Eq. 3).

    The released code sums over the window instead; the mean times k has the same scale for a full window and does not
    read a short segment as a certain one.

    Args:
        entropy (`float`): H_t, mean entropy after the tool result, in nats.
        baseline (`float`): H_0, mean entropy at the start of the trajectory, in nats.
        window (`int`): k.
        vocab_size (`int`): V.
    """
    return window * (entropy - baseline) / math.log(vocab_size)


def fork_probability(gap: float, base: float, weight: float) -> float:
    """P = clip(α + β ΔH, 0, 1) (Eq. 4)."""
    return min(max(base + weight * gap, 0.0), 1.0)


def wants_fork(rule: str, probability: float, threshold: float, rng: random.Random) -> bool:
    """Whether one segment asks for forks (Eq. 5). `probability` is P, and for the rule `"random"` α."""
    if rule == "threshold":
        return probability > threshold
    return rng.random() < probability


def allocate_forks(gaps: Sequence[float], branch_factor: int, budget: int, rng: random.Random) -> list[int]:
    """
    Share a group's remaining rows among the segments of one wave that asked for forks.

    The largest gap goes first, ties are broken at random.

    Args:
        gaps (`Sequence[float]`): ΔH of each asking segment.
        branch_factor (`int`): Z, forks that each of them asks for.
        budget (`int`): Rows that the group has left.

    Returns:
        `list[int]`: number of forks that each segment gets, in the order of `gaps`.
    """
    granted = [0] * len(gaps)
    for index in sorted(range(len(gaps)), key=lambda i: (-gaps[i], rng.random())):
        granted[index] = min(branch_factor, budget)
        budget -= granted[index]
    return granted


def expansion_weight(entropy: float, calls: float) -> float:
    """
    H / (1 + c): what a node of a finished tree has to teach for what a row from it costs.

    Args:
        entropy (`float`): H, mean entropy of the segments that were sampled at the node, in nats.
        calls (`float`): c, tool calls that those rows went on to execute, on average. The 1 stands for the row's tokens.
    """
    return entropy / (1.0 + calls)


def share_rows(weights: Sequence[float], samples: Sequence[int], rows: int, rng: random.Random) -> list[int]:
    """
    Share rows among the nodes of a finished tree in proportion to their weight.

    Each row goes to the node with the largest weight per sample; ties are broken at random. It is the entropy-guided tree
    expansion of [AT²PO](https://huggingface.co/papers/2601.04767), with a division where AT²PO subtracts a penalty for
    each branch, so that no scale of entropies has to be known, and with the cost of a row in the weight.

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


def initial_share(start: int, stop: int, group_size: int, num_initial: int) -> int:
    """
    Initial trajectories of the part [start, stop) of a group that one process holds: its share of N, at least 1.

    The shares of all parts add up to N unless a part would be left without any.
    """
    return max(1, stop * num_initial // group_size - start * num_initial // group_size)
