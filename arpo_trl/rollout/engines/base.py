"""What an engine is: it samples segments, tells how unsure the model was, and may keep what it has read."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager, nullcontext
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


class Stream(ABC):
    """Segments that are sampled each for itself: started at any time, and there when they have ended."""

    @abstractmethod
    def start(self, context: list[int], limit: int, images: Sequence[Any] = ()) -> Future[Sample]:
        """
        Start a segment.

        Args:
            context (`list[int]`): Tokens to go on from.
            limit (`int`): Tokens that the segment may have, at least 1.
            images (`Sequence[PIL.Image.Image]`, *optional*): Images of the context.

        Returns:
            `Future[Sample]`: resolves to the segment, in [`step`] or on a thread of the stream.
        """

    def step(self, needed_later: Callable[[], list[list[int]]]) -> bool:
        """
        Do a piece of what this thread has to do for the segments.

        Args:
            needed_later (`Callable[[], list[list[int]]]`): The contexts that are not being sampled after but will be,
                for a stream that keeps what it has read.

        Returns:
            `bool`: whether there was anything to do; `False` where segments are sampled elsewhere, or there are none.
        """
        return False


class BatchStream(Stream):
    """
    Samples all segments that were started as one batch.

    Args:
        sample (`Callable[..., list[Sample]]`): [`Engine.sample`].
        keep (`Callable[[list[list[int]]], None]`): [`Engine.keep`].
    """

    def __init__(
        self,
        sample: Callable[..., list[Sample]],
        keep: Callable[[list[list[int]]], None] = lambda contexts: None,
    ):
        self._sample = sample
        self._keep = keep
        self._started: list[tuple[list[int], int, Sequence[Any], Future[Sample]]] = []

    def start(self, context: list[int], limit: int, images: Sequence[Any] = ()) -> Future[Sample]:
        future: Future[Sample] = Future()
        self._started.append((context, limit, images, future))
        return future

    def step(self, needed_later: Callable[[], list[list[int]]]) -> bool:
        if not self._started:
            return False
        contexts, limits, images, futures = map(list, zip(*self._started, strict=True))
        self._started = []
        self._keep(needed_later())
        samples = self._sample(contexts, limits, images) if any(images) else self._sample(contexts, limits)
        for future, sample in zip(futures, samples, strict=True):
            future.set_result(sample)
        return True


class Engine(ABC):
    """
    What samples the segments of a rollout.

    Args:
        context_length (`int`): Tokens that the model can read, prompt included.
        vocab_size (`int`): V.

    Attributes:
        tells_logprobs (`bool`): Whether samples have log-probabilities.
        schedules_rows (`bool`): Whether it decides itself which rows it samples together, so that it is best given all
            of them at once.
        lookups (`Counter[str]`): `prefix_cache_queries` and `prefix_cache_hits` of the latest rollout: tokens that
            were given to read, and those of them that were known. Empty where nothing is kept, or the engine does not
            tell.
    """

    tells_logprobs: ClassVar[bool] = False
    schedules_rows: ClassVar[bool] = False

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

    def stream(self) -> AbstractContextManager[Stream]:
        """
        Within the context, which is one of [`rollout`], segments are sampled one by one. Those that have not ended
        when it is left are given up.
        """
        return nullcontext(BatchStream(self.sample, self.keep))

    @contextmanager
    def rollout(self) -> Iterator[None]:
        """Within the context, what has been read may be kept: the weights stay as they are."""
        self.lookups.clear()
        yield
