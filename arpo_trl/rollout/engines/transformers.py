"""Segments sampled with transformers' `generate`.

Entropies are recorded inside generation, so that memory is B × k floats and never B × T × V logits.

What is not here: transformers' continuous batching, which offers no hook to read entropies.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.utils import logging

from .base import Engine, Sample
from .generation_settings import context_length, without_unfit_settings
from .prefix_cache import PrefixCache
from .replaced import generate_with
from .weights_copy import copy_in

logger = logging.get_logger(__name__)


class EntropyRecorder(LogitsProcessor):
    """
    Records the entropy of the sampling distribution over the first tokens of a segment and changes nothing.

    `generate` runs it before its temperature and top-k/top-p warpers, so it divides by the temperature itself and sees
    the whole vocabulary.

    Args:
        window (`int`): Tokens to record, k.
        temperature (`float`): Sampling temperature.
        reads_logprobs (`bool`, *optional*, defaults to `False`): Whether to record the log-probability of each sampled
            token as well.
    """

    def __init__(self, window: int, temperature: float, reads_logprobs: bool = False):
        self.window = window
        self.temperature = temperature
        self.reads_logprobs = reads_logprobs
        self._columns: list[torch.Tensor] = []
        self._latest: torch.Tensor | None = None  # log-probabilities that the next token is sampled from
        self._sampled: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        if self.reads_logprobs or len(self._columns) < self.window:
            scaled = scores.float() if self.temperature == 1 else scores.float() / self.temperature
            logprobs = torch.log_softmax(scaled, dim=-1)
            self._latest = logprobs if self.reads_logprobs else None
            if len(self._columns) < self.window:
                # A token that another processor forbids has log-probability −inf and adds nothing: 0 times a number
                finite = logprobs.clamp(min=torch.finfo(logprobs.dtype).min)
                self._columns.append(-finite.mul_(logprobs.exp()).sum(dim=-1))
        return scores

    def sampled(self, tokens: torch.Tensor) -> None:
        """Told the token of each row that was sampled from the scores of the latest call, of shape `(B,)`."""
        if self._latest is not None:
            self._sampled.append(self._latest.gather(1, tokens.unsqueeze(1)).squeeze(1))

    def logprobs(self, rows: int) -> list[list[float]] | list[None]:
        """
        Log-probabilities of the tokens of each row (tokens after a row's end included); `None` if none were read.
        """
        return torch.stack(self._sampled, dim=1).tolist() if self._sampled else [None] * rows

    def entropies(self, rows: int) -> list[list[float]]:
        """
        Entropies in nats, one list for each of the `rows`, at most `window` long (tokens after a row's end included).
        A `generate` that calls no logits processor tells none: its lists are empty.
        """
        return torch.stack(self._columns, dim=1).tolist() if self._columns else [[] for _ in range(rows)]


class RowStops(StoppingCriteria):
    """
    Ends each row at its own limit or stop string, and remembers where.

    Args:
        limits (`Sequence[int]`): Tokens that each row may sample.
        stop_strings ([`~transformers.StopStringCriteria`], *optional*): Text at which a row ends.
        on_tokens (`Callable[[torch.Tensor], None]`, *optional*): Told each row's token as soon as it is sampled.
    """

    def __init__(
        self,
        limits: Sequence[int],
        stop_strings: StopStringCriteria | None = None,
        on_tokens: Callable[[torch.Tensor], None] = lambda tokens: None,
    ):
        self.limits = [max(limit, 1) for limit in limits]  # `generate` samples at least one token
        self.stop_strings = stop_strings
        self._on_tokens = on_tokens
        self.lengths = torch.tensor(self.limits)
        self._limits: torch.Tensor | None = None
        self._step = 0

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> torch.Tensor:
        if self._limits is None:
            self._limits = torch.tensor(self.limits, device=input_ids.device)
            self.lengths = self._limits.clone()
        self._step += 1
        self._on_tokens(input_ids[:, -1])
        done = self._limits <= self._step
        if self.stop_strings is not None:
            stopped = self.stop_strings(input_ids, scores)
            self.lengths = torch.where(stopped, self.lengths.clamp(max=self._step), self.lengths)
            done = done | stopped
        return done


def stop_string_criteria(tokenizer: PreTrainedTokenizerBase, strings: Sequence[str]) -> StopStringCriteria | None:
    """Criteria that stops at any of `strings`. Building it walks the vocabulary, so it is made once and kept."""
    return StopStringCriteria(tokenizer, list(strings)) if strings else None


@contextmanager
def recorded_generation(
    model: PreTrainedModel,
    limits: Sequence[int],
    stop_strings: StopStringCriteria | None,
    window: int,
    temperature: float,
    cache: PrefixCache | None = None,
    reads_logprobs: bool = False,
    sampler: PreTrainedModel | None = None,
) -> Iterator[tuple[EntropyRecorder, RowStops]]:
    """
    Within the context, `model.generate` records entropies and ends each row at its own limit or stop string; with a
    `cache`, it reads no token that the cache knows. With a `sampler`, that model samples in place of `model`. A
    `generate` that a library has put on the instance need not take a cache, so it gets none.
    """
    if cache is not None and "generate" in vars(model):
        logger.warning_once("`model.generate` has been replaced, so rollouts read every context anew.")
        cache = None
    recorder = EntropyRecorder(window, temperature, reads_logprobs)
    stops = RowStops(limits, stop_strings, recorder.sampled)
    sampler = model if sampler is None else sampler
    generate = partial(
        partial(cache.generate, sampler, sampler.generate) if cache is not None else sampler.generate,
        logits_processor=LogitsProcessorList([recorder]),
        stopping_criteria=StoppingCriteriaList([stops]),
    )
    with generate_with(model, generate), without_router_logits(sampler):
        yield recorder, stops


@contextmanager
def without_router_logits(model: PreTrainedModel) -> Iterator[None]:
    """
    Within the context, a mixture of experts returns no router logits, which its config may ask for. They serve the
    auxiliary loss of training; `generate` would compute it at every step, and fails where prompts are padded.
    """
    configs = {id(config): config for config in (model.config, model.config.get_text_config())}.values()
    asking = [config for config in configs if getattr(config, "output_router_logits", False)]
    for config in asking:
        config.output_router_logits = False
    try:
        yield
    finally:
        for config in asking:
            config.output_router_logits = True


def recorded_samples(ids: Sequence[list[int]], recorder: EntropyRecorder, stops: RowStops) -> list[Sample]:
    """What a recorded generation sampled; `ids` as `generate` returned them, cut after the end-of-turn token."""
    samples = []
    told = zip(ids, stops.lengths.tolist(), recorder.entropies(len(ids)), recorder.logprobs(len(ids)), strict=True)
    for row, length, entropies, logprobs in told:
        row = row[:length]
        samples.append(Sample(row, entropies[: len(row)], logprobs and logprobs[: len(row)]))
    return samples


def forget_image_positions(model: PreTrainedModel) -> None:
    """
    Models of Qwen's vision family keep, from one `generate` to the next, by how much the images of each row shift its
    positions, and add that to the rows of any later call that begins with a cache. Rows of a rollout are other rows,
    in another number, and hold text alone.
    """
    for module in model.modules():
        if getattr(module, "rope_deltas", None) is not None:
            module.rope_deltas = None


class TransformersEngine(Engine):
    """
    Samples with `generate`, and keeps the keys, values and states of a rollout while its tools run.

    Args:
        model (`Callable[[], PreTrainedModel]`): The model that `generate` runs on, without wrappers.
        generate (`Callable[[list[list[int]], Sequence[Sequence[Any]]], list[list[int]]]`): Calls the model's
            `generate` for some contexts with the images of each (none at all where no context has any), and returns
            what was sampled, cut after the end-of-turn token.
        stop_strings ([`~transformers.StopStringCriteria`], *optional*): Text at which a segment ends.
        entropy_window (`int`): Tokens to read the entropy of, k.
        temperature (`float`): Sampling temperature.
        keeps (`bool`): Whether to keep keys and values. Not where a forward is collective, since processes read in
            turns.
        idle_token (`int`): What a process without work reads, to take part in a collective forward.
        forks_anywhere (`bool`, *optional*, defaults to `False`): Whether forks may leave at any tool result of a row,
            rather than at its latest.
        reads_logprobs (`bool`, *optional*, defaults to `False`): Whether samples have the log-probability of each
            token at the sampling temperature, before top-p and top-k.
        dtype (`torch.dtype`, *optional*): Data type of a copy of the weights that samples; the model itself where
            there is none.
        guest (`Callable[[bool], tuple[list[int], Any] | None]`, *optional*): Takes whether a context here has an
            image, and returns tokens and the image of a row to sample beside those that have none, where another
            process reads images and this one has to take part; else `None`.
    """

    def __init__(
        self,
        model: Callable[[], PreTrainedModel],
        generate: Callable[[list[list[int]], Sequence[Sequence[Any]]], list[list[int]]],
        stop_strings: StopStringCriteria | None,
        entropy_window: int,
        temperature: float,
        keeps: bool,
        idle_token: int,
        forks_anywhere: bool = False,
        reads_logprobs: bool = False,
        dtype: torch.dtype | None = None,
        guest: Callable[[bool], tuple[list[int], Any] | None] = lambda shown: None,
    ):
        config = model().config
        super().__init__(context_length(config), config.get_text_config().vocab_size)
        self._model = model
        self._generate = generate
        self._stop_strings = stop_strings
        self._entropy_window = entropy_window
        self._temperature = temperature
        self._keeps = keeps
        self._idle_token = idle_token
        self._forks_anywhere = forks_anywhere
        self._reads_logprobs = reads_logprobs
        self._dtype = dtype
        self._guest = guest
        # Of the rollout that is going on
        self._cache: PrefixCache | None = None
        self._sampler: PreTrainedModel | None = None

    def sample(
        self, contexts: Sequence[list[int]], limits: Sequence[int], images: Sequence[Sequence[Any]] = ()
    ) -> list[Sample]:
        asked = len(contexts)
        guest = self._guest(any(images))
        if guest is not None and not any(images):
            images = [*([()] * asked), [guest[1]]]
            contexts, limits = [*contexts, guest[0]], [*limits, 1]
        elif not contexts:
            contexts, limits = [[self._idle_token]], [1]
        model = self._model()
        sampler = model if self._sampler is None else self._sampler
        forget_image_positions(sampler)
        recorded = recorded_generation(
            model,
            limits,
            self._stop_strings,
            self._entropy_window,
            self._temperature,
            self._cache,
            self._reads_logprobs,
            sampler,
        )
        with without_unfit_settings(sampler), recorded as (recorder, stops):
            ids = self._generate(list(contexts), images)
        return recorded_samples(ids, recorder, stops)[:asked]

    def keep(self, contexts: Sequence[list[int]]) -> None:
        if self._cache is not None:
            self._cache.keep(contexts)

    @contextmanager
    def rollout(self) -> Iterator[None]:
        self.lookups.clear()
        self._cache = PrefixCache(every_start=self._forks_anywhere) if self._keeps else None
        # Anew for each rollout, since a step has changed the weights
        self._sampler = copy_in(self._model(), self._dtype) if self._dtype is not None else None
        try:
            yield
        finally:
            if self._cache is not None:
                self.lookups.update(self._cache.lookups)
            self._cache = self._sampler = None  # their memory is the training step's now


@torch.no_grad()
def generate_ids(
    model: PreTrainedModel,
    contexts: Sequence[list[int]],
    generation_config: GenerationConfig,
    fields: Mapping[str, Any] | None = None,
) -> list[list[int]]:
    """
    What `model.generate` samples after each context, cut after the first of the config's end tokens.

    Args:
        model ([`~transformers.PreTrainedModel`]): The model.
        contexts (`Sequence[list[int]]`): Tokens of each context.
        generation_config ([`~transformers.GenerationConfig`]): With `pad_token_id` and a list of `eos_token_id`.
        fields (`Mapping[str, Any]`, *optional*): What the model takes beside tokens: tensors, and lists of one value a
            token for each context.
    """
    length = max(map(len, contexts))
    input_ids = torch.full((len(contexts), length), generation_config.pad_token_id)
    attention_mask = torch.zeros_like(input_ids)
    for row, context in enumerate(contexts):
        input_ids[row, length - len(context) :] = torch.tensor(context)
        attention_mask[row, length - len(context) :] = 1
    beside = {}
    for name, value in (fields or {}).items():
        if isinstance(value, list):
            value = torch.tensor([[0] * (length - len(row)) + row for row in value])
        beside[name] = value.to(model.device)
    output = model.generate(
        input_ids.to(model.device),
        attention_mask=attention_mask.to(model.device),
        generation_config=generation_config,
        **beside,
    )
    ends = set(generation_config.eos_token_id)
    return [_until_end(row, ends) for row in output[:, length:].tolist()]


def _until_end(ids: list[int], ends: set[int]) -> list[int]:
    return next((ids[: position + 1] for position, token in enumerate(ids) if token in ends), ids)
