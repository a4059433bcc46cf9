"""A segment that is asked for in parts: its first k tokens with the K likeliest of each position, from which its
entropy is read, and the rest with the sampled token's log-probability alone.

K log-probabilities of every token would be most of what an engine answers, and most of them nobody reads. Parts change
nothing of the law of what is sampled: where a part ends follows from tokens that are kept, never from those that are
thrown away. A part is asked for with one token more than is kept of it; if that one came, the row had not ended before
it.

What is not here: how an engine is asked (`vllm.py`).
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from .base import Sample

# Settings of vLLM of which each token is sampled by itself: what a row has sampled before counts as its prompt does.
# Penalties of frequency and presence, seeds, structures and the like do not
_OF_ONE_TOKEN = frozenset(
    {"temperature", "top_p", "top_k", "min_p", "repetition_penalty", "logit_bias", "allowed_token_ids", "ignore_eos"}
    | {"stop", "stop_token_ids", "include_stop_str_in_output", "skip_special_tokens", "spaces_between_special_tokens"}
)


class Request(NamedTuple):
    """
    What vLLM is asked for.

    Args:
        context (`list[int]`): Tokens to go on from.
        limit (`int`): Most tokens to sample.
        top_k (`int`): Likeliest tokens of each position whose log-probabilities are told, K; 0 for the sampled one.
    """

    context: list[int]
    limit: int
    top_k: int


@dataclass(frozen=True)
class StopStrings:
    """
    Stop strings that may begin in one part of a segment and end in the next, where the engine, which looks for them in
    what a single request has sampled, does not find them.

    Args:
        strings (`Sequence[str]`): The stop strings.
        decode (`Callable[[list[int]], str]`): Text of tokens, special ones included.
    """

    strings: Sequence[str]
    decode: Callable[[list[int]], str]

    @property
    def longest(self) -> int:
        """Characters of the longest."""
        return max(map(len, self.strings), default=0)

    def begun(self, ids: list[int]) -> bool:
        """Whether `ids` end with the beginning of a stop string, or within a character."""
        beginnings = [string[:length] for string in self.strings for length in range(1, len(string))]
        if not beginnings:
            return False
        # A token may be no more than a byte of a character
        return self.decode(ids[-4 * self.longest :]).endswith((*beginnings, "\ufffd"))

    def end(self, ids: list[int], start: int) -> int | None:
        """The first length above `start` at which `ids` hold a stop string; none is in the first `start` of them."""
        first = max(start - 4 * self.longest, 0)
        for length in range(start + 1, len(ids) + 1):
            text = self.decode(ids[first:length])
            if any(string in text for string in self.strings):
                return length
        return None


def may_be_parted(settings: Mapping[str, Any]) -> bool:
    """Whether, by these fields of `vllm.SamplingParams`, what a row has sampled counts as its prompt does."""
    return _OF_ONE_TOKEN.issuperset(settings)


def shared_limit(limit: int, room: int) -> int:
    """
    The next limit, not below `limit`, that many rows share: eight in each doubling (16, 18, 20 … 32, 36, 40 …).

    Args:
        limit (`int`): Most tokens of a segment, at least 1.
        room (`int`): Tokens that the engine can sample, not below `limit`. Where the next one is above it, it is the
            one before.
    """
    step = 1 << max(limit.bit_length() - 4, 0)
    above = -(-limit // step) * step
    return above if above <= room else room // step * step


def segment_in_parts(
    context: list[int],
    limit: int,
    room: int,
    top_k: int,
    window: int,
    stops: StopStrings | None,
    few_limits: bool = False,
) -> Generator[Request, Sample, Sample]:
    """
    One segment: yields what to ask for, is sent what was sampled, and returns the segment.

    Args:
        context (`list[int]`): Tokens to go on from.
        limit (`int`): Most tokens of the segment, at least 1.
        room (`int`): Tokens that the engine can sample after `context`, not below `limit`.
        top_k (`int`): K.
        window (`int`): Tokens to read the entropy of, k.
        stops ([`StopStrings`], *optional*): What ends a segment; `None` where a segment must be asked for at once.
        few_limits (`bool`): Ask with limits that other rows have too, and cut what is too much.
    """
    whole = Sample([], [], [])
    while True:
        known = len(whole.ids)
        left = limit - known
        begun = stops is not None and known > 0 and stops.begun(whole.ids)
        if stops is not None and top_k and known < window:
            wanted = window - known + 1
        elif begun and stops is not None:
            wanted = stops.longest + 1  # it is nearly over
        else:
            wanted = shared_limit(left, room - known if stops is not None else 2 * left) if few_limits else left
        wanted = min(wanted, room - known if few_limits else left)
        part = yield Request(context + whole.ids, wanted, top_k if known < window else 0)
        ended = len(part.ids) < wanted
        whole = _joined(whole, part, window)
        if begun and stops is not None and (end := stops.end(whole.ids, known)) is not None:
            return _cut(whole, min(end, limit))
        if ended or len(whole.ids) >= limit:
            return _cut(whole, limit)
        whole = _cut(whole, len(whole.ids) - 1)


def _joined(first: Sample, second: Sample, window: int) -> Sample:
    assert first.logprobs is not None and second.logprobs is not None
    # Behind the window entropies are of no use, and none were asked for
    entropies = first.entropies + second.entropies if len(first.ids) < window else first.entropies
    return Sample(first.ids + second.ids, entropies[:window], first.logprobs + second.logprobs)


def _cut(sample: Sample, length: int) -> Sample:
    logprobs = sample.logprobs and sample.logprobs[:length]
    return Sample(sample.ids[:length], sample.entropies[:length], logprobs)
