"""Segments that vLLM samples each for itself: requests that are added to an engine of this process as they come, or
sent to a server one a segment.

What is asked for is what TRL's `VLLMGeneration.generate` asks for, which takes whole batches alone.

What is not here: images, and an engine that several processes share by tensor parallelism, which all of them call
together. Rollouts of both go in waves.
"""

import asyncio
import contextlib
import itertools
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, NamedTuple

from accelerate.utils import broadcast_object_list

from ...execution.attempts import LoopThread
from ...execution.retries import retrying
from .base import Sample, Stream
from .parts import Request
from .vllm import Answer, VLLMEngine, _count_hits, _server_prefix_cache, _settings

# Further attempts of a request whose connection was lost or that the server could not answer then
_RETRIES = 5
# Seconds that the requests of a rollout that is over have to end
_GRACE = 5.0


class _Running(NamedTuple):
    """A segment of which a request is running; its first one reads the context, later ones find it in the cache."""

    segment: Generator[Request, Sample, Sample]
    future: Future[Sample]
    is_first: bool


class LLMStream(Stream):
    """
    Steps a `vllm.LLM` of this process.

    Args:
        llm (`vllm.LLM`): The engine.
        engine ([`VLLMEngine`]): Says what to ask for, reads what was sampled, and counts.
        parameters (`Callable[[int, int], vllm.SamplingParams]`): Sampling parameters of a request, from its most
            tokens and its log-probabilities a position.
    """

    _names = (f"arpo-{number}" for number in itertools.count())  # no two requests of a process have the same

    def __init__(self, llm: Any, engine: VLLMEngine, parameters: Callable[[int, int], Any]):
        from trl.generation.vllm_generation import extract_logprobs

        self._llm_engine = llm.llm_engine
        self._engine = engine
        self._parameters = parameters
        self._extract_logprobs = extract_logprobs
        self._running: dict[str, _Running] = {}

    def start(self, context: list[int], limit: int, images: Sequence[Any] = ()) -> Future[Sample]:
        segment, future = self._engine.segment(context, limit, self._engine.stops()), Future[Sample]()
        self._ask(next(segment), _Running(segment, future, is_first=True))
        return future

    def _ask(self, request: Request, running: _Running) -> None:
        context, limit, top_k = request
        name = next(self._names)
        self._llm_engine.add_request(name, {"prompt_token_ids": context}, self._parameters(limit, top_k))
        self._running[name] = running

    def step(self, needed_later: Callable[[], list[list[int]]]) -> bool:
        if not self._running:
            return False
        for output in self._llm_engine.step():
            if not output.finished:
                continue
            running = self._running.pop(output.request_id)
            if running.is_first:
                _count_hits([output], self._engine.lookups)
            answer = Answer([list(output.outputs[0].token_ids)], *self._extract_logprobs([output]))
            try:
                request = running.segment.send(self._engine.samples(answer)[0])
            except StopIteration as ended:
                running.future.set_result(ended.value)
            else:
                self._ask(request, running._replace(is_first=False))
        return True

    def close(self) -> None:
        """Give up the segments that have not ended."""
        self._llm_engine.abort_request(list(self._running))
        self._running.clear()


class ServerStream(Stream):
    """
    Sends a request for each segment to a vLLM server, all at the same time.

    Args:
        url (`str`): Address of the server.
        engine ([`VLLMEngine`]): Says what to ask for, and reads what was sampled.
        payload (`dict[str, Any]`): A request, without prompt, limit and log-probabilities.
    """

    def __init__(self, url: str, engine: VLLMEngine, payload: dict[str, Any]):
        import httpx

        self._engine = engine
        self._payload = payload
        self._loop = LoopThread("arpo-server")
        # A segment takes as long as it takes
        self._client = httpx.AsyncClient(
            base_url=url, timeout=httpx.Timeout(None, connect=60), limits=httpx.Limits(max_connections=None)
        )
        self._send = retrying(_RETRIES)
        self._running: set[Future[Sample]] = set()

    def start(self, context: list[int], limit: int, images: Sequence[Any] = ()) -> Future[Sample]:
        future = asyncio.run_coroutine_threadsafe(self._sample(context, limit), self._loop.loop)
        self._running.add(future)
        future.add_done_callback(self._running.discard)
        return future

    async def _sample(self, context: list[int], limit: int) -> Sample:
        from trl.generation.vllm_client import parse_logprobs

        segment = self._engine.segment(context, limit, self._engine.stops())
        context, limit, top_k = next(segment)
        while True:
            payload = self._payload | {"prompt": [context], "max_tokens": limit, "logprobs": top_k}
            answer: dict[str, Any] = await self._send(self._post, payload)
            choice = answer["choices"][0]
            told = Answer([choice["token_ids"]], *parse_logprobs([choice["logprobs"]]))
            try:
                context, limit, top_k = segment.send(self._engine.samples(told)[0])
            except StopIteration as ended:
                return ended.value

    async def _post(self, payload: dict[str, Any]) -> dict[str, Any]:
        import httpx

        response = await self._client.post("/v1/completions", json=payload)
        if response.status_code != 200:
            message = f"The vLLM server answered {response.status_code}: {response.text}"
            raise httpx.HTTPStatusError(message, request=response.request, response=response)
        return response.json()

    def close(self) -> None:
        """Give up the segments that have not ended: a server ends a request whose connection is closed."""
        for future in list(self._running):
            future.cancel()
        with contextlib.suppress(TimeoutError):
            asyncio.run_coroutine_threadsafe(self._client.aclose(), self._loop.loop).result(_GRACE)
        self._loop.retire(cancel=True)
        self._loop.join(_GRACE)


def stream_trl(trainer: Any) -> Callable[[VLLMEngine], Any]:
    """
    Streams of the engine of an [`ARPOTrainer`], colocated or a server, with the weights of the present step.

    Args:
        trainer ([`ARPOTrainer`]): Trainer with `use_vllm`. Each of its processes opens its streams at the same time
            and then samples alone.
    """
    return lambda engine: (_server if trainer.vllm_generation.mode == "server" else _colocated)(trainer, engine)


def sampling_settings(trainer: Any) -> dict[str, Any]:
    """What TRL asks for, as fields of `vllm.SamplingParams`, but for each request's own."""
    generation = trainer.vllm_generation
    settings = {
        name: getattr(generation, name) for name in ("repetition_penalty", "temperature", "top_p", "top_k", "min_p")
    }
    settings["min_p"] = settings["min_p"] or 0.0
    settings |= {"n": 1, **_settings(trainer)}
    if generation.structured_outputs_regex is not None:
        settings["structured_outputs"] = {"regex": generation.structured_outputs_regex}
    return settings


def _push_weights(trainer: Any) -> None:
    generation = trainer.vllm_generation
    # An engine that has slept has none
    asleep = generation.mode == "colocate" and generation.enable_sleep_mode and generation._llm_weights_sleeping
    if asleep or trainer.state.global_step != trainer._last_loaded_step:
        generation.sync_weights()
        trainer._last_loaded_step = trainer.state.global_step


@contextmanager
def _colocated(trainer: Any, engine: VLLMEngine) -> Iterator[Stream]:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

    generation = trainer.vllm_generation
    settings = sampling_settings(trainer)
    if isinstance(settings.get("structured_outputs"), dict):
        settings["structured_outputs"] = StructuredOutputsParams(**settings["structured_outputs"])
    settings["output_kind"] = RequestOutputKind.FINAL_ONLY
    _push_weights(trainer)
    if generation.enable_sleep_mode:
        generation.llm.wake_up(tags=["kv_cache"])

    def parameters(limit: int, top_k: int) -> SamplingParams:
        return SamplingParams(**settings | {"max_tokens": limit, "logprobs": top_k})

    stream = LLMStream(generation.llm, engine, parameters)
    try:
        yield stream
    finally:
        stream.close()
        if generation.enable_sleep_mode:
            generation.llm.sleep(level=2)
            generation._llm_weights_sleeping = True


@contextmanager
def _server(trainer: Any, engine: VLLMEngine) -> Iterator[Stream]:
    _push_weights(trainer)
    # The main process alone has a client. That it tells the others where the server is, they learn once the weights
    # are there
    client = trainer.vllm_generation.vllm_client if trainer.accelerator.is_main_process else None
    told = [None, None] if client is None else [client.base_url, client.model]
    url, model = broadcast_object_list(told, from_process=0)
    payload = {"model": model, "return_token_ids": True, "return_tokens_as_token_ids": True}
    before = None if client is None else _server_prefix_cache(client)
    stream = ServerStream(url, engine, payload | sampling_settings(trainer))
    try:
        yield stream
    finally:
        stream.close()
        if client is not None and before is not None:
            engine.lookups.update(_server_prefix_cache(client) - before)
