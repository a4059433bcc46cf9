"""Sample segments with an engine and read their entropies: transformers' `generate`, or vLLM.

On the transformers path the entropies are recorded inside generation, so that memory is B × k floats and never
B × T × V logits. On the vLLM path they are read from the K most likely tokens.

What is not here: transformers' continuous batching, which offers no hook to read entropies. vLLM gives the processed
log-probabilities, so with top-p or top-k its reading is of what they leave, and rows that reach their own limit before
the others' are cut afterwards.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)

from .branching import top_k_entropy
from .loop import Sample


class EntropyRecorder(LogitsProcessor):
    """
    Records the entropy of the sampling distribution over the first tokens of a segment and changes nothing.

    `generate` runs it before its temperature and top-k/top-p warpers, so it divides by the temperature itself and sees
    the whole vocabulary.

    Args:
        window (`int`): Tokens to record, k.
        temperature (`float`): Sampling temperature.
    """

    def __init__(self, window: int, temperature: float):
        self.window = window
        self.temperature = temperature
        self._columns: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        if len(self._columns) < self.window:
            logprobs = torch.log_softmax(scores.float() / self.temperature, dim=-1)
            # A token that another processor forbids has log-probability −inf and adds nothing
            self._columns.append(torch.special.entr(logprobs.exp()).sum(dim=-1))
        return scores

    def entropies(self) -> list[list[float]]:
        """Entropies in nats, one list a row, at most `window` long (tokens after a row's end included)."""
        return torch.stack(self._columns, dim=1).tolist() if self._columns else []


class RowStops(StoppingCriteria):
    """
    Ends each row at its own limit or stop string, and remembers where.

    Args:
        limits (`Sequence[int]`): Tokens that each row may sample.
        stop_strings ([`~transformers.StopStringCriteria`], *optional*): Text at which a row ends.
    """

    def __init__(self, limits: Sequence[int], stop_strings: StopStringCriteria | None = None):
        self.limits = [max(limit, 1) for limit in limits]  # `generate` samples at least one token
        self.stop_strings = stop_strings
        self.lengths = torch.tensor(self.limits)
        self._limits: torch.Tensor | None = None
        self._step = 0

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs) -> torch.BoolTensor:
        if self._limits is None:
            self._limits = torch.tensor(self.limits, device=input_ids.device)
            self.lengths = self._limits.clone()
        self._step += 1
        done = self._limits <= self._step
        if self.stop_strings is not None:
            stopped = self.stop_strings(input_ids, scores)
            self.lengths = torch.where(stopped, self.lengths.clamp(max=self._step), self.lengths)
            done = done | stopped
        return done


@contextmanager
def generate_with(model: nn.Module, **kwargs) -> Iterator[None]:
    """Within the context, `model.generate` is called with `kwargs` besides the caller's own."""
    model.generate = partial(model.generate, **kwargs)
    try:
        yield
    finally:
        del model.generate  # the class's method shows again


def stop_string_criteria(tokenizer: PreTrainedTokenizerBase, strings: Sequence[str]) -> StopStringCriteria | None:
    """Criteria that stops at any of `strings`. Building it walks the vocabulary, so it is made once and kept."""
    return StopStringCriteria(tokenizer, list(strings)) if strings else None


@contextmanager
def recorded_generation(
    model: nn.Module, limits: Sequence[int], stop_strings: StopStringCriteria | None, window: int, temperature: float
) -> Iterator[tuple[EntropyRecorder, RowStops]]:
    """Within the context, `model.generate` records entropies and ends each row at its own limit or stop string."""
    recorder, stops = EntropyRecorder(window, temperature), RowStops(limits, stop_strings)
    with generate_with(
        model,
        logits_processor=LogitsProcessorList([recorder]),
        stopping_criteria=StoppingCriteriaList([stops]),
    ):
        yield recorder, stops


def recorded_samples(ids: Sequence[list[int]], recorder: EntropyRecorder, stops: RowStops) -> list[Sample]:
    """What a recorded generation sampled; `ids` as `generate` returned them, cut after the end-of-turn token."""
    samples = []
    for row, length, entropies in zip(ids, stops.lengths.tolist(), recorder.entropies(), strict=True):
        row = row[:length]
        samples.append(Sample(row, entropies[: len(row)]))
    return samples


@contextmanager
def vllm_settings(engine, logprobs: int, generation_kwargs: dict) -> Iterator[None]:
    """Within the context, TRL's `VLLMGeneration` asks for `logprobs` tokens a position and uses `generation_kwargs`."""
    before = engine.logprobs, engine.generation_kwargs
    engine.logprobs, engine.generation_kwargs = logprobs, generation_kwargs
    try:
        yield
    finally:
        engine.logprobs, engine.generation_kwargs = before


def top_k_samples(
    ids: Sequence[list[int]],
    logprobs: Sequence[Sequence[Sequence[float | None]]],
    logprob_token_ids: Sequence[Sequence[Sequence[int]]],
    top_k: int,
    window: int,
    vocab_size: int,
) -> list[Sample]:
    """
    What vLLM sampled, with entropies from its `top_k` most likely tokens and the tail.

    Args:
        ids (`Sequence[list[int]]`): Sampled tokens, one list a row.
        logprobs (`Sequence[Sequence[Sequence[float | None]]]`): For each token, log-probabilities sorted by rank, of the
            `top_k` most likely tokens and of the sampled one.
        logprob_token_ids (`Sequence[Sequence[Sequence[int]]]`): The tokens that they belong to.
        top_k (`int`): K.
        window (`int`): Tokens to read the entropy of, k.
        vocab_size (`int`): V.
    """
    samples = []
    # Rows may have been cut, and rows of padding follow: `zip` stops at what there is of `ids`
    for row, row_logprobs, row_tokens in zip(ids, logprobs, logprob_token_ids, strict=False):
        # With logprobs=K the sampled token stands at its rank, not first, so it is looked up.
        sampled = [
            values[tokens.index(token)] for token, values, tokens in zip(row, row_logprobs, row_tokens, strict=False)
        ]
        entropies = [
            top_k_entropy([value for value in values[:top_k] if value is not None], vocab_size)
            for values in row_logprobs[: min(window, len(row))]
        ]
        samples.append(Sample(list(row), entropies, sampled))
    return samples
