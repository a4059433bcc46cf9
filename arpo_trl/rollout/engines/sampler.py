"""Sample segments with an engine and read their entropies: transformers' `generate`, or vLLM.

On the transformers path the entropies are recorded inside generation, so that memory is B × k floats and never
B × T × V logits. On the vLLM path they are read from the K most likely tokens.

What is not here: transformers' continuous batching, which offers no hook to read entropies. vLLM gives the processed
log-probabilities, so with top-p or top-k its reading is of what they leave.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.utils import logging

from ..entropy import top_k_entropy
from ..loop import Sample
from .prefix_cache import PrefixCache

logger = logging.get_logger(__name__)


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

    def entropies(self, rows: int) -> list[list[float]]:
        """
        Entropies in nats, one list for each of the `rows`, at most `window` long (tokens after a row's end included). A
        `generate` that calls no logits processor tells none: its lists are empty.
        """
        return torch.stack(self._columns, dim=1).tolist() if self._columns else [[] for _ in range(rows)]


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

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> torch.Tensor:
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
def generate_with(model: Any, generate: Callable) -> Iterator[None]:
    """
    Within the context, `model.generate` is `generate`; a model is also vLLM's, or TRL's client of a server. Afterwards
    what stood there stands there again, also where a library had put it on the instance.
    """
    before = vars(model).get("generate")
    model.generate = generate
    try:
        yield
    finally:
        if before is None:
            del model.generate  # the class's method shows again
        else:
            model.generate = before


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
) -> Iterator[tuple[EntropyRecorder, RowStops]]:
    """
    Within the context, `model.generate` records entropies and ends each row at its own limit or stop string; with a
    `cache`, it reads no token that the cache knows. A `generate` that a library has put on the instance need not take a
    cache, so it gets none.
    """
    if cache is not None and "generate" in vars(model):
        logger.warning_once("`model.generate` has been replaced, so rollouts read every context anew.")
        cache = None
    recorder, stops = EntropyRecorder(window, temperature), RowStops(limits, stop_strings)
    generate = partial(
        model.generate,
        logits_processor=LogitsProcessorList([recorder]),
        stopping_criteria=StoppingCriteriaList([stops]),
    )
    with generate_with(model, partial(cache.generate, model, generate) if cache else generate):
        yield recorder, stops


def recorded_samples(ids: Sequence[list[int]], recorder: EntropyRecorder, stops: RowStops) -> list[Sample]:
    """What a recorded generation sampled; `ids` as `generate` returned them, cut after the end-of-turn token."""
    samples = []
    for row, length, entropies in zip(ids, stops.lengths.tolist(), recorder.entropies(len(ids)), strict=True):
        row = row[:length]
        samples.append(Sample(row, entropies[: len(row)]))
    return samples


@contextmanager
def vllm_settings(
    engine: Any, logprobs: int, generation_kwargs: dict, limits: Sequence[int]
) -> Iterator[Counter[str]]:
    """
    Within the context, TRL's `VLLMGeneration` asks for `logprobs` tokens a position, uses `generation_kwargs`, and ends
    each row at its own limit, where TRL has one limit for all.

    Args:
        engine ([`~trl.generation.vllm_generation.VLLMGeneration`]): The engine of the trainer.
        logprobs (`int`): K.
        generation_kwargs (`dict`): Sampling parameters beside TRL's own.
        limits (`Sequence[int]`): Tokens that each row of the engine may sample, those of other processes included.

    Yields:
        `Counter[str]`: after the context, `prefix_cache_queries` and `prefix_cache_hits`: tokens that the engine was
        given to read, and those of them that it found in its prefix cache. Empty where the engine does not tell.
    """
    cache: Counter[str] = Counter()
    limited: AbstractContextManager[None]
    client = getattr(engine, "vllm_client", None)  # with a server, of the main process
    if engine.mode == "colocate":
        limited = generate_with(engine.llm, _limited_engine(engine.llm.generate, limits, cache))
    elif client is not None:
        limited = generate_with(client, _limited_server(client.generate, limits))
        cache.subtract(_server_prefix_cache(client))
    else:
        limited = nullcontext()
    before = engine.logprobs, engine.generation_kwargs
    engine.logprobs, engine.generation_kwargs = logprobs, generation_kwargs
    try:
        with limited:
            yield cache
    finally:
        engine.logprobs, engine.generation_kwargs = before
    if client is not None:
        cache.update(_server_prefix_cache(client))


def _limited_engine(generate: Callable, limits: Sequence[int], cache: Counter[str]) -> Callable:
    """`LLM.generate` with a limit for each prompt; counts in `cache` what the prefix cache held."""

    def limited(prompts: Sequence[Any], sampling_params: Any, **kwargs: Any) -> list[Any]:
        by_limit = {limit: sampling_params.clone() for limit in set(limits)}
        for limit, parameters in by_limit.items():
            parameters.max_tokens = limit
        outputs = generate(prompts, sampling_params=[by_limit[limit] for limit in limits], **kwargs)
        for output in outputs:
            cache["prefix_cache_queries"] += len(output.prompt_token_ids)
            cache["prefix_cache_hits"] += output.num_cached_tokens or 0
        return outputs

    return limited


def _limited_server(generate: Callable, limits: Sequence[int]) -> Callable:
    """`VLLMClient.generate` with a limit for each prompt: one request for each distinct limit, all at the same time."""

    def limited(prompts: Sequence[Any], **kwargs: Any) -> dict[str, list[Any]]:
        rows_of: dict[int, list[int]] = {}
        for row, limit in enumerate(limits):
            rows_of.setdefault(limit, []).append(row)

        def send(limit: int) -> dict[str, list[Any]]:
            return generate(prompts=[prompts[row] for row in rows_of[limit]], **{**kwargs, "max_tokens": limit})

        with ThreadPoolExecutor(min(64, len(rows_of))) as pool:
            answers = list(pool.map(send, rows_of))
        merged: dict[str, list[Any]] = {name: [None] * len(prompts) for name in answers[0]}
        for rows, answer in zip(rows_of.values(), answers, strict=True):
            for name, values in answer.items():
                for row, value in zip(rows, values or [], strict=False):  # a server may leave out log-probabilities
                    merged[name][row] = value
        return merged

    return limited


def _server_prefix_cache(client: Any) -> Counter[str]:
    """What a vLLM server has counted so far, from its Prometheus metrics."""
    counted: Counter[str] = Counter()
    answer = client.session.get(f"{client.base_url}/metrics")
    for line in answer.text.splitlines() if answer.ok else []:
        for name in ("prefix_cache_queries", "prefix_cache_hits"):
            if line.startswith(f"vllm:{name}_total"):  # a line for each of the server's engines
                counted[name] += round(float(line.rpartition(" ")[2]))
    return counted


def top_k_samples(
    ids: Sequence[list[int]],
    logprobs: Sequence[Sequence[Sequence[float | None]] | None] | None,
    logprob_token_ids: Sequence[Sequence[Sequence[int]] | None] | None,
    top_k: int,
    window: int,
    vocab_size: int,
) -> list[Sample]:
    """
    What vLLM sampled, with entropies from its `top_k` most likely tokens and the tail.

    Args:
        ids (`Sequence[list[int]]`): Sampled tokens, one list a row.
        logprobs (`Sequence[Sequence[Sequence[float | None]]]`): For each token, log-probabilities sorted by rank, of the
            `top_k` most likely tokens and of the sampled one. `None` for what the engine could not score: one value, a
            row, or all. Such a token has log-probability NaN, which TRL leaves out of its correction, and no entropy.
        logprob_token_ids (`Sequence[Sequence[Sequence[int]]]`): The tokens that they belong to.
        top_k (`int`): K.
        window (`int`): Tokens to read the entropy of, k.
        vocab_size (`int`): V.
    """
    samples = []
    for row, row_logprobs, row_tokens in zip(
        ids, logprobs or [None] * len(ids), logprob_token_ids or [None] * len(ids), strict=True
    ):
        sampled, entropies = [math.nan] * len(row), []
        for index, (token, values, tokens) in enumerate(zip(row, row_logprobs or [], row_tokens or [], strict=False)):
            # With logprobs=K the sampled token stands at its rank, not first, so it is looked up
            value = dict(zip(tokens, values, strict=True)).get(token)
            sampled[index] = math.nan if value is None else value
            known = [value for value in values[:top_k] if value is not None]
            if index < window and known:
                entropies.append(top_k_entropy(known, vocab_size))
        samples.append(Sample(list(row), entropies, sampled))
    return samples
