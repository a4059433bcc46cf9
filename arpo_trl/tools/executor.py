"""Run the tool calls of many rows at once.

Sync tools run on a bounded pool of threads, async tools on one event loop. A tool that raises does not end the run:
the model reads the error as the tool's result.
"""

import asyncio
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from .options import is_async, tool_options


@dataclass
class ToolCall:
    """One call that a model made of a tool, and what came of it.

    Args:
        name (`str`): Name that the model wrote.
        arguments (`dict[str, Any]`): Keyword arguments.
        result (`str` or `list`, *optional*): What the model reads: the tool's answer, or the text of its error.
        error (`str`, *optional*): What went wrong; `None` for a call that succeeded. A protocol sets it before the call
            is run where the model's text could not be understood; such a call is answered without running anything.
        seconds (`float`): Wall-clock time of the call.
        cached (`bool`): Whether the answer came from a cache.
    """

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    result: str | list | None = None
    error: str | None = None
    seconds: float = 0.0
    cached: bool = False


class ToolExecutor:
    """Runs tool calls concurrently.

    Args:
        max_workers (`int`): Sync tools that run at the same time.
        timeout (`float`, *optional*): Seconds after which a call is given up; `None` waits for ever.
    """

    def __init__(self, max_workers: int = 64, timeout: float | None = None):
        self.max_workers = max_workers
        self.timeout = timeout
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "ToolExecutor":
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self.close()

    def submit(self, call: ToolCall, function: Callable | None, available: Iterable[str] = ()) -> "Future[ToolCall]":
        """Start `call` of `function`.

        Args:
            call ([`ToolCall`]): The call; a call whose `error` is already set is answered with that text.
            function (`Callable`, *optional*): The tool; `None` if there is no tool of that name.
            available (`Iterable[str]`): Names of the tools there are, told to the model when `function` is `None`.

        Returns:
            `Future`: Resolves to `call`, filled in. It never raises.
        """
        return self.submit_in_order([(call, function)], available)[0]

    def submit_in_order(
        self, calls: list[tuple[ToolCall, Callable | None]], available: Iterable[str] = ()
    ) -> "list[Future[ToolCall]]":
        """Start calls that run one after another, such as those of one turn on one stateful environment."""
        futures: list[Future[ToolCall]] = [Future() for _ in calls]

        async def chain() -> None:
            for (call, function), future in zip(calls, futures, strict=True):
                future.set_result(await self._execute(call, function, available))

        asyncio.run_coroutine_threadsafe(chain(), self._start())
        return futures

    def run(self, calls: list[tuple[ToolCall, Callable | None]], available: Iterable[str] = ()) -> list[ToolCall]:
        """Run all calls at once and wait for them."""
        return [future.result() for future in [self.submit(*pair, available) for pair in calls]]

    def close(self) -> None:
        """Give up what still runs and end the threads. May be called twice; a later `submit` starts afresh."""
        with self._lock:
            loop, self._loop = self._loop, None
            thread, self._thread = self._thread, None
        if loop is None or thread is None:
            return

        async def stop() -> None:
            tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks, timeout=1) if tasks else None
            loop.stop()

        asyncio.run_coroutine_threadsafe(stop(), loop)
        thread.join()
        loop.close()

    def _start(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._slots = asyncio.Semaphore(self.max_workers)
                self._thread = threading.Thread(target=self._loop.run_forever, name="arpo-tools", daemon=True)
                self._thread.start()
            return self._loop

    async def _execute(self, call: ToolCall, function: Callable | None, available: Iterable[str]) -> ToolCall:
        if call.error is not None:
            call.result = call.error if call.result is None else call.result
            return call
        started = time.perf_counter()
        try:
            if function is None:
                names = ", ".join(available)
                raise ValueError(f"Tool {call.name} not found." + (f" Available: {names}." if names else ""))
            call.result = await self._attempt(call, function)
        except asyncio.CancelledError:
            call.error = "the executor was closed before the call ended"
            call.result = str({"error": call.error})
        except Exception as e:
            call.error = f"{type(e).__name__}: {e}"
            call.result = str({"error": str(e)})
        call.seconds = time.perf_counter() - started
        return call

    async def _attempt(self, call: ToolCall, function: Callable) -> str | list:
        options = tool_options(function)
        timeout = self.timeout if options.timeout is None else options.timeout
        try:
            if is_async(function):
                return _as_content(await asyncio.wait_for(function(**call.arguments), timeout))
            async with self._slots:
                started: asyncio.Future = asyncio.get_running_loop().create_future()
                _in_thread(function, call.arguments, started)
                return await asyncio.wait_for(started, timeout)
        except asyncio.TimeoutError:
            raise TimeoutError(f"Tool {call.name} gave no answer within {timeout:g} s.") from None


def _in_thread(function: Callable, arguments: dict[str, Any], future: asyncio.Future) -> None:
    loop = asyncio.get_running_loop()

    def resolve(result: Any, error: Exception | None) -> None:
        if not future.done():
            future.set_result(result) if error is None else future.set_exception(error)

    def target() -> None:
        result, error = None, None
        try:
            result = _as_content(function(**arguments))
        except BaseException as e:  # noqa: BLE001 - SystemExit of a tool must not end the run
            error = e if isinstance(e, Exception) else RuntimeError(f"{type(e).__name__}: {e}")
        try:
            loop.call_soon_threadsafe(resolve, result, error)
        except RuntimeError:
            pass  # the executor was closed in the meantime

    threading.Thread(target=target, name="arpo-tool", daemon=True).start()


def _as_content(result: Any) -> str | list:
    return result if isinstance(result, list) else str(result)
