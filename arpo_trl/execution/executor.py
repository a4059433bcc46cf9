"""Run the tool calls of many rows at once.

A sync tool runs in a thread of its own (or in a worker process, where it asks for one), an async tool on one event
loop. A tool that raises does not end the run: the model reads the error as the tool's result, in TRL's words. A tool
that hangs is given up at its time-out, and its row goes on.

What it does not do: end a thread that waits inside C code, or a coroutine that ignores its cancellation; see
`attempts.py`. A call that was given up and lives on keeps its place among the calls of its tool. When such calls have
taken every place, further calls of that tool are answered with an error at once, so their number is bounded however
long the run. `tool(..., process=True)` has no such calls.
"""

import asyncio
import contextlib
import functools
import logging
import os
import threading
import time
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

from .arguments import bound_arguments
from .attempts import Attempt, LoopThread, in_thread, on_loop
from .cache import ToolCache
from .function_worker import Worker, as_content
from .images import read_blocks
from .options import ToolOptions, is_async, tool_options
from .places import Places
from .retries import failure_of, retrying

logger = logging.getLogger(__name__)

# Seconds that a call which was given up has to end before it counts as one that cannot be stopped
_GRACE = 1.0
# Seconds that answers have to reach their caches when the executor is closed
_LONGEST_STORING = 15.0

# What tells tools apart: the name they are called by, module, qualified name
_Home = tuple[str, str | None, str | None]


@dataclass
class ToolCall:
    """One call that a model made of a tool, and what came of it.

    Args:
        name (`str`): Name that the model wrote.
        arguments (`dict[str, Any]`): Keyword arguments.
        result (`str` or `list`, *optional*): What the model reads: the tool's answer, or the text of its error.
        error (`str`, *optional*): What went wrong; `None` for a call that succeeded. A protocol sets it before the
            call is run where the model's text could not be understood; such a call is answered without running
            anything.
        seconds (`float`): Time that the tool ran for this call, all attempts together; waiting for a free place is
            left out. 0 for a call that did not run it.
        merged (`bool`): Whether another row of the group made the same call, whose answer this is.
        cached (`bool`): Whether the answer came from the tool's cache, or from the same call that was on its way
            there.
        refused (`bool`): Whether the call was answered with an error and ran nothing: it could not be understood,
            there is no such tool, or it was over a limit.
    """

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    result: str | list | None = None
    error: str | None = None
    seconds: float = 0.0
    merged: bool = False
    cached: bool = False
    refused: bool = False


class ToolExecutor:
    """Runs tool calls concurrently.

    Nothing runs before the first call, and nothing after [`~ToolExecutor.close`]; a later call starts afresh. A tool
    that fails does not raise here: what went wrong is in the call's `error` and `result`.

    Args:
        max_workers (`int`, defaults to `64`):
            Sync tools that run at the same time.
        timeout (`float`, *optional*):
            Seconds after which an attempt is given up, for tools that do not say; `None` waits for ever.
        count_tokens (`Callable[[str], int]`, *optional*):
            Number of tokens of a text, for `max_result_tokens`, such as `lambda text: len(tokenizer.encode(text))`.
            Called on the executor's own thread. By default four characters count as a token.
        image_tokens (`Callable[[PIL.Image.Image], int]`, *optional*):
            Number of tokens that an image becomes; raises of one that the model cannot take. Called on another thread.
            By default nothing is read of images, and the protocol says what the model is told.

    Example:

    ```python
    from arpo_trl.tools import ToolCall, ToolExecutor

    with ToolExecutor(timeout=10) as executor:
        calls = executor.run([(ToolCall("search", {"query": "ARPO"}), search)])
    ```
    """

    def __init__(
        self,
        max_workers: int = 64,
        timeout: float | None = None,
        count_tokens: Callable[[str], int] | None = None,
        image_tokens: Callable[[Any], int] | None = None,
    ):
        if not isinstance(max_workers, int) or max_workers < 1:
            raise ValueError(f"`max_workers` must be a positive integer, not {max_workers!r}.")
        if timeout is not None and not timeout > 0:
            raise ValueError(f"`timeout` must be a positive number of seconds or None, not {timeout!r}.")
        self.max_workers = max_workers
        self.timeout = timeout
        self.count_tokens = count_tokens or (lambda text: -(-len(text) // 4))
        self.image_tokens = image_tokens
        self._lock = threading.Lock()
        self._state: _RunningState | None = None

    def __enter__(self) -> "ToolExecutor":
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self.close()

    def submit(self, call: ToolCall, function: Callable | None, available: Iterable[str] = ()) -> "Future[ToolCall]":
        """Start a call.

        Args:
            call ([`ToolCall`]): The call; one whose `error` is already set is answered with that text.
            function (`Callable`, *optional*): The tool; `None` if there is none of that name.
            available (`Iterable[str]`): Names of the tools there are, told to the model where there is no such tool.

        Returns:
            `Future`: Resolves to `call`, filled in. It never raises what the tool raises.
        """
        return self.submit_in_order([(call, function)], available)[0]

    def submit_in_order(
        self, calls: list[tuple[ToolCall, Callable | None]], available: Iterable[str] = ()
    ) -> "list[Future[ToolCall]]":
        """Start calls that run one after another, such as those of one turn on one stateful environment.

        The next call starts when the one before is answered. After a time-out that one may still be running.
        """
        futures: list[Future[ToolCall]] = [Future() for _ in calls]
        with self._lock:
            if self._state is None:
                self._state = _RunningState(self.max_workers, self.timeout, self.count_tokens, self.image_tokens)
                # An executor that is dropped without `close` leaves nothing behind either
                self._end = weakref.finalize(self, self._state.end)
            state = self._state
            asyncio.run_coroutine_threadsafe(
                state.execute_in_order(calls, futures, list(available)), state.control.loop
            )
        return futures

    def run(self, calls: list[tuple[ToolCall, Callable | None]], available: Iterable[str] = ()) -> list[ToolCall]:
        """Run calls at once and wait for all of them."""
        available = list(available)
        return [future.result() for future in [self.submit(*pair, available) for pair in calls]]

    def close(self) -> None:
        """Give up the calls that still run, answer them with an error, and end threads and processes."""
        with self._lock:
            if self._state is not None:
                self._end()
                self._state = None


class _RunningState:
    """What an executor holds from its first call to its end. Its coroutines run on the `control` loop alone.

    Async tools have a loop of their own: one that blocks it must not stop the clock of the others.
    """

    def __init__(
        self,
        max_workers: int,
        timeout: float | None,
        count_tokens: Callable[[str], int],
        image_tokens: Callable[[Any], int] | None,
    ):
        self.max_workers = max_workers
        self.timeout = timeout
        self.count_tokens = count_tokens
        self.image_tokens = image_tokens
        self.closing = False
        self.control = LoopThread("arpo-tools")
        self.tool_loop: LoopThread | None = None
        self.threads = asyncio.Semaphore(max_workers)
        self.places: dict[_Home, Places] = {}
        self.attempts: set[Attempt] = set()
        self.workers: set[Worker] = set()
        self.idle_workers: dict[_Home, list[Worker]] = defaultdict(list)
        self.in_flight: dict[tuple, asyncio.Task] = {}
        self.background: set[asyncio.Task] = set()
        # One thread, since a cache writes one answer at a time
        self.storing = ThreadPoolExecutor(1, thread_name_prefix="arpo-cache")
        self.stores: set[Future] = set()

    def end(self) -> None:
        self.closing = True
        self.control.retire(cancel=True)
        self.control.join(5 * _GRACE)
        for worker in list(self.workers):
            worker.kill()
        # The calls have been told to end; those that can take a moment to
        deadline = time.monotonic() + _GRACE
        if self.tool_loop is not None:
            self.tool_loop.retire(cancel=True)
            self.tool_loop.join(_GRACE)
        for attempt in list(self.attempts):
            if attempt.thread is not None:
                attempt.thread.join(max(0.0, deadline - time.monotonic()))
        for worker in list(self.workers):
            worker.close()
        self.storing.shutdown(wait=False)
        wait(list(self.stores), timeout=_LONGEST_STORING)

    async def execute_in_order(
        self, calls: list[tuple[ToolCall, Callable | None]], futures: "list[Future[ToolCall]]", available: list[str]
    ) -> None:
        for (call, function), future in zip(calls, futures, strict=True):
            if not future.set_running_or_notify_cancel():
                continue
            try:
                await self.execute(call, function, available)
                future.set_result(call)
            except Exception as e:  # of `count_tokens`: not a matter between the tool and the model
                future.set_exception(e)

    async def execute(self, call: ToolCall, function: Callable | None, available: list[str]) -> None:
        if call.error is not None:
            call.result = call.error if call.result is None else call.result
            call.refused = True
            return
        limit = None
        try:
            if self.closing:
                raise asyncio.CancelledError
            if function is None:
                call.refused = True
                tools = f" Available: {', '.join(available)}." if available else ""
                raise ValueError(f"Tool {call.name} not found.{tools}")
            options = tool_options(function)
            limit = options.max_result_tokens
            call.result = await self.answer(call, function, options)
            if isinstance(call.result, list) and self.image_tokens is not None:
                call.result = await asyncio.get_running_loop().run_in_executor(
                    None, self.read_images, call.result, limit
                )
        except asyncio.CancelledError:
            call.error = "the executor was closed before the call had ended"
            call.result = str({"error": call.error})
        except Exception as e:
            failure = failure_of(e)
            call.error = failure.line
            call.result = str({"error": str(failure)})
        if limit is not None and isinstance(call.result, str):
            call.result = cut(call.result, limit, self.count_tokens)

    def read_images(self, blocks: list, limit: int | None) -> list:
        """Content blocks with their images decoded, within the tokens that a result may have."""
        assert self.image_tokens is not None
        shortened = functools.partial(cut, count_tokens=self.count_tokens)
        return read_blocks(blocks, self.image_tokens, limit, shortened, self.count_tokens)

    async def answer(self, call: ToolCall, function: Callable, options: ToolOptions) -> str | list:
        """Take the answer from the cache, from the same call in flight, or from the tool."""
        if options.cache is None:
            return await self.make(call, function, options)
        cache, arguments = options.cache, bound_arguments(function, call.arguments)

        async def look_up_or_make() -> tuple[str | list, bool]:
            result = await asyncio.get_running_loop().run_in_executor(None, cache.get, call.name, arguments)
            if result is not None:
                return result, True
            return await self.make(call, function, options), False

        key = (cache.path, cache.namespace, call.name, repr(sorted(arguments.items())))
        task = self.in_flight.get(key)
        joined = task is not None
        if task is None:
            task = self.in_flight[key] = asyncio.ensure_future(look_up_or_make())
            task.add_done_callback(lambda task: self.remember(key, task, cache, call.name, arguments))
        result, remembered = await asyncio.shield(task)
        call.cached = joined or remembered
        return result

    def remember(self, key: tuple, made: asyncio.Task, cache: ToolCache, name: str, arguments: dict[str, Any]) -> None:
        """Store an answer that was made, once the call has it: a slow or failing cache delays nobody.

        Until it is stored, equal calls are answered by the task that made it.
        """
        forget = functools.partial(self.in_flight.pop, key, None)
        if made.cancelled() or made.exception() is not None or made.result()[1]:
            forget()
            return
        try:
            storing = self.storing.submit(cache.set, name, arguments, made.result()[0])
        except RuntimeError:  # the interpreter is about to end
            forget()
            return
        self.stores.add(storing)

        def stored(storing: Future) -> None:
            self.stores.discard(storing)
            with contextlib.suppress(RuntimeError):  # the executor was closed in the meantime
                self.control.loop.call_soon_threadsafe(forget)

        storing.add_done_callback(stored)

    async def make(self, call: ToolCall, function: Callable, options: ToolOptions) -> str | list:
        """Run the tool, again after a transient failure if its options say so."""
        if not options.retries:
            return await self.attempt(call, function, options)
        return await retrying(options.retries)(self.attempt, call, function, options)

    async def attempt(self, call: ToolCall, function: Callable, options: ToolOptions) -> str | list:
        """Run the tool once, within its time-out."""
        home = (call.name, getattr(function, "__module__", None), getattr(function, "__qualname__", None))
        if home not in self.places:
            self.places[home] = self.places_of(call.name, function, options)
        places = self.places[home]
        timeout = self.timeout if options.timeout is None else options.timeout
        running = None
        try:
            await places.enter()
        except RuntimeError:
            call.refused = not call.seconds  # an earlier attempt may have run
            raise
        try:
            async with contextlib.nullcontext() if is_async(function) else self.threads:
                running = await self.start(home, function, call.arguments, options)
                try:
                    await asyncio.wait({running.ended}, timeout=None if timeout == float("inf") else timeout)
                finally:
                    call.seconds += time.perf_counter() - running.started
        finally:
            if running is None or running.ended.done():
                places.leave()
            else:
                running.give_up()
                if not self.closing:
                    task = asyncio.ensure_future(self.hold_place_until_ended(running, places))
                    self.background.add(task)
                    task.add_done_callback(self.background.discard)
        if not running.ended.done():
            raise TimeoutError(f"Tool {call.name} gave no answer within {timeout:g} s.")
        result, failure = running.ended.result()
        if failure is not None:
            raise failure
        return result

    def places_of(self, name: str, function: Callable, options: ToolOptions) -> Places:
        if options.max_concurrency is not None:
            limit: float = options.max_concurrency
        elif options.process:
            limit = os.cpu_count() or 1
        else:
            limit = float("inf") if is_async(function) else self.max_workers
        return Places(name, limit, min(limit, self.max_workers))

    async def start(self, home: _Home, function: Callable, arguments: dict[str, Any], options: ToolOptions) -> Attempt:
        if is_async(function):
            if self.tool_loop is None:
                self.tool_loop = LoopThread("arpo-async-tools")
            return self.track(on_loop(self.tool_loop, function, arguments))
        if not options.process:
            return self.track(in_thread(lambda: as_content(function(**arguments))))
        # Not on the clock of the call: a new process has to import the tool's module
        borrowing = self.track(in_thread(lambda: self.borrow_worker(home, function)))
        worker, failure = await asyncio.shield(borrowing.ended)
        if failure is not None:
            raise failure
        return self.track(in_thread(lambda: self.call_worker(home, worker, arguments), give_up=worker.kill))

    def track(self, attempt: Attempt) -> Attempt:
        self.attempts.add(attempt)
        attempt.ended.add_done_callback(lambda _: self.attempts.discard(attempt))
        return attempt

    def borrow_worker(self, home: _Home, function: Callable) -> Worker:
        while self.idle_workers[home]:
            worker = self.idle_workers[home].pop()
            if worker.alive:
                return worker
            self.drop_worker(worker)
        worker = Worker(function)
        self.workers.add(worker)
        if self.closing:  # after the line above, so that either this thread or `end` sees the worker
            worker.kill()
        try:
            worker.start()
        except BaseException:
            self.drop_worker(worker)
            raise
        return worker

    def drop_worker(self, worker: Worker) -> None:
        worker.close()
        self.workers.discard(worker)

    def call_worker(self, home: _Home, worker: Worker, arguments: dict[str, Any]) -> str | list:
        try:
            return worker.call(arguments)
        finally:
            if worker.alive:
                self.idle_workers[home].append(worker)
            else:
                self.drop_worker(worker)

    async def hold_place_until_ended(self, attempt: Attempt, places: Places) -> None:
        """Keep the place of a call that was given up until it has really ended."""
        await asyncio.wait({attempt.ended}, timeout=_GRACE)
        if not attempt.ended.done():
            places.more_stuck()
            loop = attempt.loop
            if loop is not None and loop is self.tool_loop and not await loop.responds():
                logger.warning("Async tool %s blocks the event loop; async tools go on with a new one.", places.name)
                if loop is self.tool_loop:
                    self.tool_loop = None
                    loop.retire(cancel=False)
                    loop.interrupt()
            await asyncio.wait({attempt.ended})
            places.stuck -= 1
        places.leave()


def cut(text: str, max_tokens: int, count_tokens: Callable[[str], int]) -> str:
    """Cut `text` to at most `max_tokens` tokens, with a marker at the end that says how much is missing.

    The marker counts too, and stands alone where there is no room for more.
    """
    # Long text is not counted whole: twice as much as fits is enough to know its density
    size = 8 * max_tokens
    while size < len(text) and count_tokens(text[:size]) <= max_tokens:
        size *= 2
    if size >= len(text):
        size = len(text)
        if count_tokens(text) <= max_tokens:
            return text
    while True:
        shown = f"{text[:size]}\n[... {len(text) - size:,} of {len(text):,} characters left out]"
        tokens = count_tokens(shown)
        if tokens <= max_tokens or size == 0:
            return shown if size else shown.lstrip("\n")
        size = min(size - 1, size * max_tokens // tokens)
