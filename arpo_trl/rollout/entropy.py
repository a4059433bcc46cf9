"""From log-probabilities to a reading of how unsure a segment is. Pure functions; the symbols are those of the ARPO
paper (https://huggingface.co/papers/2507.19849, section 3.1).

What is not here: how log-probabilities are had (`engines/`), and what follows from a reading (`rules/`).
"""

import math
from collections.abc import Sequence


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


def segment_logprob(logprobs: Sequence[float] | None) -> float | None:
    """Log-probability of a segment, in nats; `None` where that of a token is not known."""
    total = None if logprobs is None else math.fsum(logprobs)
    return None if total is None or math.isnan(total) else total


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
