"""What an engine is: it samples segments, tells how unsure the model was, and may keep what it has read."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple


class Sample(NamedTuple):
    """What an engine sampled after one context.

    Args:
        ids (`list[int]`): Sampled tokens, the end-of-turn token included.
        entropies (`list[float]`): Entropy in nats of the distributions that the first `entropy_window` of them (at
            least) were sampled from; shorter, or empty, where the engine does not tell.
        logprobs (`list[float]`, *optional*): Log-probability of each token; `None` where the engine gives none.
    """

    ids: list[int]
    entropies: list[float]
    logprobs: list[float] | None = None


class Engine(ABC):
    """
    What samples the segments of a rollout.

    Args:
        context_length (`int`): Tokens that the model can read, prompt included.
        vocab_size (`int`): V.

    Attributes:
        tells_logprobs (`bool`): Whether samples have log-probabilities.
        lookups (`Counter[str]`): `prefix_cache_queries` and `prefix_cache_hits` of the latest rollout: tokens that
            were given to read, and those of them that were known. Empty where nothing is kept, or the engine does not
            tell.
    """

    tells_logprobs: ClassVar[bool] = False

    def __init__(self, context_length: int, vocab_size: int):
        self.context_length = context_length
        self.vocab_size = vocab_size
        self.lookups: Counter[str] = Counter()

    @abstractmethod
    def sample(
        self, contexts: Sequence[list[int]], limits: Sequence[int], images: Sequence[Sequence[Any]] = ()
    ) -> list[Sample]:
        """
        Sample a segment after each context.

        Args:
            contexts (`Sequence[list[int]]`): Tokens to go on from; none where other processes have work and this one
                has not, since sampling may need all of them.
            limits (`Sequence[int]`): Tokens that each segment may have, at least 1.
            images (`Sequence[Sequence[PIL.Image.Image]]`): Of each context; empty where none has any.
        """

    def keep(self, contexts: Sequence[list[int]]) -> None:
        """Told, before `sample`, the contexts that are not in it but in a later one."""
        return None

    @contextmanager
    def rollout(self) -> Iterator[None]:
        """Within the context, what has been read may be kept: the weights stay as they are."""
        self.lookups.clear()
        yield
