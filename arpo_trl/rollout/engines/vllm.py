"""Segments sampled with vLLM: its engine in this process, or a server.

Entropies are read from the K most likely tokens. vLLM gives the processed log-probabilities, so with top-p or top-k
the reading is of what they leave.
"""

import math
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch

from ...protocols.images import ImageReader
from ..entropy import top_k_entropy
from .base import Engine, Sample, Stream
from .generation_settings import NO_LIMIT
from .parts import Request, StopStrings, may_be_parted, segment_in_parts
from .replaced import generate_with
from .vllm_images import check_read, engine_prompts, forget_images, never_written

# Requests to a server at the same time, each of which holds a connection open
_MOST_REQUESTS = 512


class Answer(NamedTuple):
    """
    What vLLM sampled: tokens, and for each the log-probabilities of the likeliest with the tokens they belong to.
    """

    ids: Sequence[list[int]]
    logprobs: Sequence[Sequence[Sequence[float | None]] | None] | None = None
    logprob_token_ids: Sequence[Sequence[Sequence[int]] | None] | None = None


class Asked(NamedTuple):
    """What a [`Request`] asks for, without its context."""

    limit: int
    top_k: int


Ask = Callable[[list[Request], Counter[str], Sequence[Sequence[Any]]], Answer | None]
"""
Has a segment sampled for each request, and counts what the prefix cache held: [`ask_llm`] or [`ask_trl`]. The images
of each request come last; empty where none has any. `None` where no process has a request.
"""


class VLLMEngine(Engine):
    """
    Samples with vLLM.

    Args:
        ask (`Ask`): Asks the engine.
        context_length (`int`): Tokens that the engine can read.
        vocab_size (`int`): V.
        top_k (`int`): Most likely tokens of each position to read the entropy from, K.
        entropy_window (`int`): Tokens to read the entropy of, k.
        stops (`Callable[[], StopStrings | None]`, *optional*): The stop strings of the next segments, or `None` where
            a segment must be asked for at once; the same on all processes that share the engine. By default all are.
        few_limits (`bool`, *optional*, defaults to `False`): Ask with few distinct limits, each of which is a request
            of its own to a server, and cut what is too much.
        stream (`Callable[[VLLMEngine], AbstractContextManager[Stream]]`, *optional*): Opens a stream of segments; by
            default those that are ready are asked for together.
    """

    tells_logprobs = True
    schedules_rows = True

    def __init__(
        self,
        ask: Ask,
        context_length: int,
        vocab_size: int,
        top_k: int,
        entropy_window: int,
        stops: Callable[[], StopStrings | None] = lambda: None,
        few_limits: bool = False,
        stream: "Callable[[VLLMEngine], AbstractContextManager[Stream]] | None" = None,
    ):
        super().__init__(context_length, vocab_size)
        self._ask = ask
        self.top_k = top_k
        self._entropy_window = entropy_window
        self.stops = stops
        self._few_limits = few_limits
        self._stream = stream

    def sample(
        self, contexts: Sequence[list[int]], limits: Sequence[int], images: Sequence[Sequence[Any]] = ()
    ) -> list[Sample]:
        stops = self.stops()
        segments = [self.segment(context, limit, stops) for context, limit in zip(contexts, limits, strict=True)]
        samples: list[Sample] = [Sample([], []) for _ in segments]
        requests = {row: next(segment) for row, segment in enumerate(segments)}
        lookups = self.lookups
        while (
            answer := self._ask(list(requests.values()), lookups, [images[row] for row in requests] if images else ())
        ) is not None:
            lookups = Counter()  # what is read again because a segment has parts is no reading of the rollout's
            parts = zip(list(requests), self.samples(answer), strict=True)
            requests = {}
            for row, part in parts:
                try:
                    requests[row] = segments[row].send(part)
                except StopIteration as ended:
                    samples[row] = ended.value
            if stops is None:
                break  # on all processes
        return samples

    def stream(self) -> AbstractContextManager[Stream]:
        return super().stream() if self._stream is None else self._stream(self)

    def segment(self, context: list[int], limit: int, stops: StopStrings | None) -> Generator[Request, Sample, Sample]:
        """One segment, in as many requests as it takes: see [`segment_in_parts`]."""
        room = max(self.context_length - len(context), 1)
        limit = max(min(limit, room), 1)
        return segment_in_parts(
            context, limit, room, self.top_k, self._entropy_window, stops, few_limits=self._few_limits
        )

    def samples(self, answer: Answer) -> list[Sample]:
        """What vLLM sampled, with entropies."""
        return top_k_samples(*answer, self.top_k, self._entropy_window, self.vocab_size)


def push_weights(trainer: Any, again: bool = False) -> None:
    """Give the engine of a trainer the weights of the present step, unless it has them; with `again` in any case."""
    if again or trainer.state.global_step != trainer._last_loaded_step:
        trainer.vllm_generation.sync_weights()
        if trainer._image_reader is not None:
            forget_images(trainer.vllm_generation)
        trainer._last_loaded_step = trainer.state.global_step


def stops_of(trainer: Any) -> Callable[[], StopStrings | None]:
    """
    The stop strings of an [`ARPOTrainer`]'s segments. `None`, which is to say that each is asked for at once, if the
    trainer does not branch, which is GRPO token for token; if what a row has sampled counts otherwise than its prompt
    does; or if the engine would have to read the context once more.
    """
    engine, remembers = trainer.vllm_generation, _remembers(trainer)

    def decode(ids: list[int]) -> str:
        return trainer._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def stops() -> StopStrings | None:
        settings = _settings(trainer)
        if not (remembers and trainer._branches and may_be_parted(settings)) or engine.structured_outputs_regex:
            return None
        stop = settings.get("stop") or []
        return StopStrings([stop] if isinstance(stop, str) else stop, decode)

    return stops


def _remembers(trainer: Any) -> bool:
    """Whether the engine keeps what it has read from one request to the next; a server that does not tell does."""
    if trainer.vllm_mode == "colocate":
        engine = trainer.vllm_generation
        keeps = engine.llm.llm_engine.vllm_config.cache_config.enable_prefix_caching
        return bool(keeps) and not engine.enable_sleep_mode  # which forgets all after each call
    accelerator, told = trainer.accelerator, 1
    if accelerator.is_main_process:  # the one process that has a client
        client = trainer.vllm_generation.vllm_client
        answer = client.session.get(f"{client.base_url}/metrics")
        told = int(not (answer.ok and 'enable_prefix_caching="False"' in answer.text))
    return bool(accelerator.gather(torch.tensor([told], device=accelerator.device)).min())


def _settings(trainer: Any) -> dict[str, Any]:
    """Fields of `vllm.SamplingParams` beside TRL's own and those that each row has for itself."""
    settings = trainer.vllm_generation.generation_kwargs
    settings = {name: value for name, value in settings.items() if name not in ("max_tokens", "logprobs")}
    if trainer._image_reader is not None:
        settings["logit_bias"] = never_written(trainer._image_reader) | (settings.get("logit_bias") or {})
    return settings | (_stops(trainer._protocol.stop_strings) if trainer._protocol.stop_strings else {})


def ask_llm(
    llm: Any,
    sampling: dict[str, Any],
    stop: Sequence[str],
    ends: Sequence[int],
    image_reader: ImageReader | None = None,
) -> Ask:
    """
    Ask a `vllm.LLM` of this process, without log-probabilities.

    Args:
        llm (`vllm.LLM`): The engine.
        sampling (`dict[str, Any]`): Fields of `vllm.SamplingParams`.
        stop (`Sequence[str]`): Text at which a segment ends.
        ends (`Sequence[int]`): End-of-turn tokens.
        image_reader ([`ImageReader`], *optional*): How a multimodal model reads images.
    """
    from vllm import SamplingParams

    settings = sampling | _stops(stop) | {"stop_token_ids": list(ends)}
    if image_reader is not None:
        settings["logit_bias"] = never_written(image_reader)

    def ask(requests: list[Request], lookups: Counter[str], images: Sequence[Sequence[Any]] = ()) -> Answer | None:
        if not requests:
            return None
        contexts = [request.context for request in requests]
        prompts: list[dict[str, Any]] = [
            {"prompt_token_ids": ids} for ids in engine_prompts(contexts, images, image_reader)
        ]
        for prompt, own in zip(prompts, images or [], strict=False):
            if own:
                prompt["multi_modal_data"] = {"image": list(own)}
        outputs = llm.generate(
            prompts,
            sampling_params=[SamplingParams(**settings, max_tokens=request.limit) for request in requests],
            use_tqdm=False,
        )
        _count_hits(outputs, lookups)
        check_read([output.prompt_token_ids for output in outputs], contexts, images)
        return Answer([list(output.outputs[0].token_ids) for output in outputs])

    return ask


def ask_trl(trainer: Any) -> Ask:
    """
    Ask the engine of an [`ARPOTrainer`], colocated or a server, with the weights of the present step.

    Args:
        trainer ([`ARPOTrainer`]): Trainer with `use_vllm`.
    """
    engine, accelerator = trainer.vllm_generation, trainer.accelerator
    idle_token = trainer._tokenizer.eos_token_id

    def ask(requests: list[Request], lookups: Counter[str], images: Sequence[Sequence[Any]] = ()) -> Answer | None:
        # TRL cuts the answers by the number of prompts of *this* process, so all bring the same number
        counts = accelerator.gather(torch.tensor([len(requests)], device=accelerator.device))
        rows = int(counts.max())
        if not rows:
            return None
        push_weights(trainer)
        filled = requests + [Request([idle_token], 1, 0)] * (rows - len(requests))
        own = torch.tensor([request[1:] for request in filled], device=accelerator.device)
        everyone = [Asked(*row) for row in accelerator.gather(own).tolist()]
        sharing = accelerator.num_processes if engine.mode == "server" else engine.tensor_parallel_size
        first = accelerator.process_index // sharing * sharing * rows
        contexts = [request.context for request in filled]
        padding = rows - len(requests)
        shown = [list(own) or None for own in images] + [None] * padding if images else None
        # A server is given the places of images; an engine in this process finds them itself
        given = contexts
        if images and engine.mode != "server":
            given = engine_prompts(contexts, [*images, *[()] * padding], trainer._image_reader)
        with vllm_settings(engine, _settings(trainer), everyone[first : first + sharing * rows], lookups):
            read, *answer = engine.generate(prompts=given, images=shown, num_generations=1)
        if engine.mode != "server":
            check_read(read, contexts, images)
        ids, *told = (part and part[: len(requests)] for part in answer)
        return Answer(ids, *told)

    return ask


def served_context_length(trainer: Any) -> int | None:
    """Tokens that the engine of a `GRPOTrainer` can read; `None` where a server does not tell."""
    if trainer.vllm_mode == "colocate":
        return trainer.vllm_generation.llm.llm_engine.model_config.max_model_len
    accelerator, served = trainer.accelerator, 0
    if accelerator.is_main_process:  # the one process that has a client
        client = trainer.vllm_generation.vllm_client
        served = client.session.get(f"{client.base_url}/v1/models").json()["data"][0].get("max_model_len") or 0
    return int(accelerator.gather(torch.tensor([served], device=accelerator.device)).max()) or None


def check_top_k(trainer: Any) -> None:
    """Refuse a K that the trainer's own engine refuses, whose message comes with the first rollout."""
    if trainer.vllm_mode != "colocate":
        return
    top_k = trainer.args.vllm_entropy_top_k
    max_logprobs = trainer.vllm_generation.llm.llm_engine.model_config.max_logprobs
    if max_logprobs != -1 and top_k > max_logprobs:
        raise ValueError(
            f"`vllm_entropy_top_k` is {top_k}, but a colocated vLLM engine tells no more than {max_logprobs} tokens a "
            f"position: set it to {max_logprobs} or less, or use `vllm_mode='server'` with `--max-logprobs -1`."
        )


def _stops(stop: Sequence[str]) -> dict[str, Any]:
    """Fields of `vllm.SamplingParams` with which a segment ends with a stop string, which belongs to it."""
    # A stop string may be a special token, which vLLM would skip
    return {"stop": list(stop), "include_stop_str_in_output": True, "skip_special_tokens": False}


def _count_hits(outputs: Sequence[Any], lookups: Counter[str]) -> None:
    for output in outputs:
        lookups["prefix_cache_queries"] += len(output.prompt_token_ids)
        lookups["prefix_cache_hits"] += output.num_cached_tokens or 0


@contextmanager
def vllm_settings(engine: Any, generation_kwargs: dict, asked: Sequence[Asked], cache: Counter[str]) -> Iterator[None]:
    """
    Within the context, TRL's `VLLMGeneration` uses `generation_kwargs`, and asks for each row what is asked of that
    row, where TRL has one limit and one number of log-probabilities for all.

    Args:
        engine ([`~trl.generation.vllm_generation.VLLMGeneration`]): The engine of the trainer.
        generation_kwargs (`dict`): Sampling parameters beside TRL's own.
        asked (`Sequence[Asked]`): For each row of the engine, those of other processes included.
        cache (`Counter[str]`): Gets `prefix_cache_queries` and `prefix_cache_hits`: tokens that the engine was given
            to read, and those of them that it found in its prefix cache. Nothing where the engine does not tell.
    """
    limited: AbstractContextManager[None]
    client = getattr(engine, "vllm_client", None)  # with a server, of the main process
    if engine.mode == "colocate":
        limited = generate_with(engine.llm, _engine_by_row(engine.llm.generate, asked, cache))
    elif client is not None:
        limited = generate_with(client, server_by_row(client.generate, asked))
        cache.subtract(_server_prefix_cache(client))
    else:
        limited = nullcontext()
    before = engine.logprobs, engine.generation_kwargs
    engine.logprobs, engine.generation_kwargs = 0, generation_kwargs
    try:
        with limited:
            yield
    finally:
        engine.logprobs, engine.generation_kwargs = before
    if client is not None:
        cache.update(_server_prefix_cache(client))


def _engine_by_row(generate: Callable, asked: Sequence[Asked], cache: Counter[str]) -> Callable:
    """`LLM.generate` with what is asked for each prompt; counts in `cache` what the prefix cache held."""

    def by_row(prompts: Sequence[Any], sampling_params: Any, **kwargs: Any) -> list[Any]:
        parameters = {each: sampling_params.clone() for each in set(asked)}
        for each, own in parameters.items():
            own.max_tokens, own.logprobs = each
        outputs = generate(prompts, sampling_params=[parameters[each] for each in asked], **kwargs)
        _count_hits(outputs, cache)
        return outputs

    return by_row


def server_by_row(generate: Callable, asked: Sequence[Asked], most_rows: int = NO_LIMIT) -> Callable:
    """
    `VLLMClient.generate` with what is asked for each prompt: one request for all that ask the same, or for `most_rows`
    of them, and all requests at the same time, since a server should have all rows at once.
    """

    def by_row(prompts: Sequence[Any], features: Sequence[Any] | None = None, **kwargs: Any) -> dict[str, list[Any]]:
        rows_of: dict[Asked, list[int]] = {}
        for row, each in enumerate(asked):
            rows_of.setdefault(each, []).append(row)
        parts = [
            (each, rows[start : start + most_rows])
            for each, rows in rows_of.items()
            for start in range(0, len(rows), most_rows)
        ]

        def send(part: tuple[Asked, list[int]]) -> dict[str, list[Any]]:
            each, rows = part
            own = {**kwargs, "max_tokens": each.limit, "logprobs": each.top_k}
            if features is not None:
                own["features"] = [features[row] for row in rows]
            return generate(prompts=[prompts[row] for row in rows], **own)

        with ThreadPoolExecutor(min(_MOST_REQUESTS, len(parts))) as pool:
            answers = list(pool.map(send, parts))
        merged: dict[str, list[Any]] = {name: [None] * len(prompts) for name in answers[0]}
        for (_, rows), answer in zip(parts, answers, strict=True):
            for name, values in answer.items():
                for row, value in zip(rows, values or [], strict=False):  # a server may leave out log-probabilities
                    merged[name][row] = value
        return merged

    return by_row


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
        logprobs (`Sequence[Sequence[Sequence[float | None]]]`): For each token, log-probabilities sorted by rank, of
            the `top_k` most likely tokens and of the sampled one. `None` for what the engine could not score: one
            value, a row, or all. Such a token has log-probability NaN, which TRL leaves out of its correction, and no
            entropy.
        logprob_token_ids (`Sequence[Sequence[Sequence[int]]]`): The tokens that they belong to.
        top_k (`int`): K.
        window (`int`): Tokens to read the entropy of, k.
        vocab_size (`int`): V.
    """
    return [
        top_k_sample(row, row_logprobs, row_tokens, top_k, window, vocab_size)
        for row, row_logprobs, row_tokens in zip(
            ids, logprobs or [None] * len(ids), logprob_token_ids or [None] * len(ids), strict=True
        )
    ]


def top_k_sample(
    ids: Sequence[int],
    logprobs: Sequence[Sequence[float | None]] | None,
    logprob_token_ids: Sequence[Sequence[int]] | None,
    top_k: int,
    window: int,
    vocab_size: int,
) -> Sample:
    """One row of [`top_k_samples`]."""
    sampled, entropies = [math.nan] * len(ids), []
    for index, (token, values, tokens) in enumerate(zip(ids, logprobs or [], logprob_token_ids or [], strict=False)):
        # With logprobs=K the sampled token stands at its rank, not first
        value = values[tokens.index(token)] if token in tokens else None
        sampled[index] = math.nan if value is None else value
        if index < window and top_k:
            known = [value for value in values[:top_k] if value is not None]
            if known:
                entropies.append(top_k_entropy(known, vocab_size))
    return Sample(list(ids), entropies, sampled)
