"""Segments sampled with vLLM: its engine in this process, or a server.

Entropies are read from the K most likely tokens. vLLM gives the processed log-probabilities, so with top-p or top-k
the reading is of what they leave.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch

from ...protocols.images import ImageReader
from ..entropy import top_k_entropy
from .base import Engine, Sample
from .replaced import generate_with


class Answer(NamedTuple):
    """
    What vLLM sampled: tokens, and for each the log-probabilities of the likeliest with the tokens they belong to.
    """

    ids: Sequence[list[int]]
    logprobs: Sequence[Sequence[Sequence[float | None]] | None] | None = None
    logprob_token_ids: Sequence[Sequence[Sequence[int]] | None] | None = None


class VLLMEngine(Engine):
    """
    Samples with vLLM.

    Args:
        ask (`Callable[[list[list[int]], list[int], int, Counter[str], Sequence[Sequence[Any]]], Answer]`): Has a
            segment sampled after each context, no longer than each limit, with the log-probabilities of K tokens a
            position, and counts what the prefix cache held; the last argument holds the images of each context, or
            nothing: [`ask_llm`] or [`ask_trl`].
        context_length (`int`): Tokens that the engine can read.
        vocab_size (`int`): V.
        top_k (`int`): Most likely tokens of each position to read the entropy from, K.
        entropy_window (`int`): Tokens to read the entropy of, k.
    """

    tells_logprobs = True

    def __init__(
        self,
        ask: Callable[..., Answer],
        context_length: int,
        vocab_size: int,
        top_k: int,
        entropy_window: int,
    ):
        super().__init__(context_length, vocab_size)
        self._ask = ask
        self.top_k = top_k
        self._entropy_window = entropy_window

    def sample(
        self, contexts: Sequence[list[int]], limits: Sequence[int], images: Sequence[Sequence[Any]] = ()
    ) -> list[Sample]:
        room = [self.context_length - len(context) for context in contexts]
        limits = [max(min(limit, left), 1) for limit, left in zip(limits, room, strict=True)]
        answer = self._ask(list(contexts), limits, self.top_k, self.lookups, images)
        samples = top_k_samples(*answer, self.top_k, self._entropy_window, self.vocab_size)
        return samples[: len(contexts)]


def ask_llm(
    llm: Any,
    sampling: dict[str, Any],
    stop: Sequence[str],
    ends: Sequence[int],
    image_reader: ImageReader | None = None,
) -> Callable[..., Answer]:
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

    def ask(
        contexts: list[list[int]],
        limits: list[int],
        top_k: int,
        lookups: Counter[str],
        images: Sequence[Sequence[Any]] = (),
    ) -> Answer:
        given = engine_prompts(contexts, images, image_reader)
        prompts: list[dict[str, Any]] = [{"prompt_token_ids": ids} for ids in given]
        for prompt, own in zip(prompts, images or [], strict=False):
            if own:
                prompt["multi_modal_data"] = {"image": list(own)}
        outputs = llm.generate(
            prompts,
            sampling_params=[SamplingParams(**settings, max_tokens=limit) for limit in limits],
            use_tqdm=False,
        )
        _count_hits(outputs, lookups)
        check_read([output.prompt_token_ids for output in outputs], contexts, images)
        return Answer([list(output.outputs[0].token_ids) for output in outputs])

    return ask


def ask_trl(trainer: Any) -> Callable[..., Answer]:
    """
    Ask the engine of an [`ARPOTrainer`], colocated or a server, with the weights of the present step.

    Args:
        trainer ([`ARPOTrainer`]): Trainer with `use_vllm`.
    """
    engine, accelerator = trainer.vllm_generation, trainer.accelerator
    idle_token = trainer._tokenizer.eos_token_id

    def ask(
        contexts: list[list[int]],
        limits: list[int],
        top_k: int,
        lookups: Counter[str],
        images: Sequence[Sequence[Any]] = (),
    ) -> Answer:
        settings = {name: value for name, value in engine.generation_kwargs.items() if name != "max_tokens"}
        if trainer._protocol.stop_strings:
            settings |= _stops(trainer._protocol.stop_strings)
        if trainer.state.global_step != trainer._last_loaded_step:
            engine.sync_weights()
            trainer._last_loaded_step = trainer.state.global_step
        # TRL cuts the answers by the number of prompts of *this* process, so all bring the same number
        counts = accelerator.gather(torch.tensor([len(contexts)], device=accelerator.device))
        rows = int(counts.max())
        padding = rows - len(contexts)
        everyone = accelerator.gather(
            torch.tensor(limits + [1] * padding, dtype=torch.long, device=accelerator.device)
        ).tolist()
        sharing = accelerator.num_processes if engine.mode == "server" else engine.tensor_parallel_size
        first = accelerator.process_index // sharing * sharing * rows
        with vllm_settings(engine, top_k, settings, everyone[first : first + sharing * rows], lookups):
            shown = [list(own) or None for own in images] + [None] * padding if images else None
            # A server is given the places of images; an engine in this process finds them itself
            given = contexts if engine.mode == "server" else engine_prompts(contexts, images, trainer._image_reader)
            read, *answer = engine.generate(prompts=given + [[idle_token]] * padding, images=shown, num_generations=1)
        if engine.mode != "server":
            check_read(read, contexts, images)
        return Answer(*answer)

    return ask


def engine_prompts(
    contexts: list[list[int]], images: Sequence[Sequence[Any]], image_reader: ImageReader | None
) -> list[list[int]]:
    """Contexts with one token for each image: vLLM puts in as many as it has features."""
    if image_reader is None or not images:
        return contexts
    return [image_reader.unexpanded(*row) if row[1] else row[0] for row in zip(contexts, images, strict=True)]


def check_read(
    read: Sequence[Sequence[int]], contexts: Sequence[Sequence[int]], images: Sequence[Sequence[Any]]
) -> None:
    """
    Refuse an engine that reads an image as other tokens than the processor has written, which training scores.

    Raises:
        ValueError: It does.
    """
    for ids, context, own in zip(read, contexts, images or [], strict=False):
        if own and list(ids) != list(context):
            raise ValueError(
                f"vLLM reads a prompt with an image as {len(ids)} tokens, and the processor has written "
                f"{len(context)}: what it samples would be scored after another prompt. Set `use_vllm=False` for "
                "images with this model."
            )


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
    # A stop string may be a special token, which vLLM would skip
    return {"stop": list(stop), "include_stop_str_in_output": True, "skip_special_tokens": False}


def _count_hits(outputs: Sequence[Any], lookups: Counter[str]) -> None:
    for output in outputs:
        lookups["prefix_cache_queries"] += len(output.prompt_token_ids)
        lookups["prefix_cache_hits"] += output.num_cached_tokens or 0


@contextmanager
def vllm_settings(
    engine: Any, logprobs: int, generation_kwargs: dict, limits: Sequence[int], cache: Counter[str]
) -> Iterator[None]:
    """
    Within the context, TRL's `VLLMGeneration` asks for `logprobs` tokens a position, uses `generation_kwargs`, and
    ends each row at its own limit, where TRL has one limit for all.

    Args:
        engine ([`~trl.generation.vllm_generation.VLLMGeneration`]): The engine of the trainer.
        logprobs (`int`): K.
        generation_kwargs (`dict`): Sampling parameters beside TRL's own.
        limits (`Sequence[int]`): Tokens that each row of the engine may sample, those of other processes included.
        cache (`Counter[str]`): Gets `prefix_cache_queries` and `prefix_cache_hits`: tokens that the engine was given
            to read, and those of them that it found in its prefix cache. Nothing where the engine does not tell.
    """
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
            yield
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
        _count_hits(outputs, cache)
        return outputs

    return limited


def _limited_server(generate: Callable, limits: Sequence[int]) -> Callable:
    """
    `VLLMClient.generate` with a limit for each prompt: one request for each distinct limit, all at the same time.
    """

    def limited(prompts: Sequence[Any], features: Sequence[Any] | None = None, **kwargs: Any) -> dict[str, list[Any]]:
        rows_of: dict[int, list[int]] = {}
        for row, limit in enumerate(limits):
            rows_of.setdefault(limit, []).append(row)

        def send(limit: int) -> dict[str, list[Any]]:
            own = None if features is None else [features[row] for row in rows_of[limit]]
            asked = {"prompts": [prompts[row] for row in rows_of[limit]], "max_tokens": limit}
            return generate(**{**kwargs, **asked, **({} if own is None else {"features": own})})

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
        logprobs (`Sequence[Sequence[Sequence[float | None]]]`): For each token, log-probabilities sorted by rank, of
            the `top_k` most likely tokens and of the sampled one. `None` for what the engine could not score: one
            value, a row, or all. Such a token has log-probability NaN, which TRL leaves out of its correction, and no
            entropy.
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
