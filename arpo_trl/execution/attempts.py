"""Two ways to run one call so that it can be given up: on an event loop and in a thread.

What giving up can *not* do: end a thread that waits inside C code (`time.sleep`, a socket without a time-out, a lock),
a function that catches every exception, or a coroutine that ignores its cancellation. Python has no way to. Such a
call lives on until it ends by itself; [`ToolExecutor`] bounds how many there are. Nor can anything be given up while C
code keeps the interpreter lock, as a regular expression does. A thread that waits for a worker process
(`function_worker.py`) always ends, when the process is killed.
"""

import asyncio
import ctypes
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .errors import ToolFailure
from .function_worker import as_content
from .retries import failure_of


class GivenUp(BaseException):
    """Raised inside the thread of a call that is given up. Not an `Exception`, so that tools do not catch it."""


@dataclass(eq=False)
class Attempt:
    """One run of a tool.

    Args:
        ended (`asyncio.Future`):
            Resolves to `(result, failure)` when the run has really ended, given up or not; one of them is `None`.
        give_up (`Callable[[], None]`): Asks the run to end. Does not wait.
        thread (`threading.Thread`, *optional*): The thread that it occupies.
        loop (`LoopThread`, *optional*): The event loop that it shares.
        started (`float`): When it began, on the clock of `time.perf_counter`.
    """

    ended: asyncio.Future
    give_up: Callable[[], None]
    thread: threading.Thread | None = None
    loop: "LoopThread | None" = None
    started: float = 0.0


class LoopThread:
    """An event loop on a daemon thread."""

    def __init__(self, name: str):
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self._run, name=name, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.loop.run_forever()
            self.loop.run_until_complete(self.loop.shutdown_default_executor())
        except GivenUp:
            pass  # the tool that blocked the loop had ended a moment before
        finally:
            self.loop.close()

    async def responds(self, seconds: float = 0.5, times: int = 3) -> bool:
        """Return whether the loop turns, or one of its coroutines blocks it; called from another loop."""
        try:
            beat = asyncio.wrap_future(asyncio.run_coroutine_threadsafe(asyncio.sleep(0), self.loop))
        except RuntimeError:
            return False  # closed
        # More than one short wait, since a stall of the whole process would pass for a blocked loop
        for _ in range(times):
            await asyncio.wait({beat}, timeout=seconds)
            if beat.done():
                return True
        return False

    def interrupt(self) -> None:
        """Raise [`GivenUp`] in the coroutine that blocks the loop."""
        if self.thread.is_alive():
            _raise_given_up(self.thread)

    def join(self, seconds: float) -> None:
        if self.thread is not threading.current_thread():
            self.thread.join(seconds)

    def retire(self, cancel: bool) -> None:
        """End the thread once its tasks have ended; `cancel` asks them to."""

        async def drain() -> None:
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            if cancel:
                for task in tasks:
                    task.cancel()
            if tasks:
                await asyncio.wait(tasks, timeout=1 if cancel else None)
            self.loop.stop()

        try:
            self.loop.call_soon_threadsafe(lambda: self.loop.create_task(drain()))
        except RuntimeError:
            pass  # has ended already


def _raise_given_up(thread: threading.Thread) -> None:
    """Raise [`GivenUp`] in a thread the next time that it runs Python code."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(GivenUp))


def _reporter(control: asyncio.AbstractEventLoop, ended: asyncio.Future) -> Callable[[Any, ToolFailure | None], None]:
    def resolve(result: Any, failure: ToolFailure | None) -> None:
        if not ended.done():
            ended.set_result((result, failure))

    def report(result: Any, failure: ToolFailure | None) -> None:
        try:
            control.call_soon_threadsafe(resolve, result, failure)
        except RuntimeError:
            pass  # the executor was closed in the meantime

    return report


def on_loop(host: LoopThread, function: Callable, arguments: dict[str, Any]) -> Attempt:
    """Run a coroutine function on `host`; given up by cancelling it."""
    ended: asyncio.Future = asyncio.get_running_loop().create_future()
    report = _reporter(asyncio.get_running_loop(), ended)
    tasks: list[asyncio.Task] = []

    async def body() -> None:
        try:
            report(as_content(await function(**arguments)), None)
        except BaseException as e:
            report(None, failure_of(e))
            if isinstance(e, asyncio.CancelledError):
                raise

    def start() -> None:
        tasks.append(asyncio.get_running_loop().create_task(body()))
        # A task that is cancelled before its first step never enters its body
        tasks[0].add_done_callback(lambda task: report(None, failure_of(asyncio.CancelledError())))

    def give_up() -> None:
        try:
            host.loop.call_soon_threadsafe(lambda: tasks[0].cancel())
        except RuntimeError:
            pass

    started = time.perf_counter()
    host.loop.call_soon_threadsafe(start)
    return Attempt(ended, give_up, loop=host, started=started)


def in_thread(work: Callable[[], Any], give_up: Callable[[], None] | None = None) -> Attempt:
    """Run `work` in a thread of its own; given up by raising [`GivenUp`] in it, unless told another way."""
    ended: asyncio.Future = asyncio.get_running_loop().create_future()
    report = _reporter(asyncio.get_running_loop(), ended)
    lock = threading.Lock()
    running = True

    def target() -> None:
        nonlocal running
        outcome: tuple[Any, ToolFailure | None]
        try:
            try:
                outcome = (work(), None)
            except BaseException as e:
                outcome = (None, failure_of(e))
            with lock:
                running = False
        except GivenUp as e:
            outcome = (None, failure_of(e))  # it came after the answer; at most one is ever raised
        report(*outcome)

    def interrupt() -> None:
        nonlocal running
        # Under the lock, since the thread's number belongs to another thread as soon as this one has ended
        with lock:
            if running:
                running = False
                _raise_given_up(thread)

    thread = threading.Thread(target=target, name="arpo-tool", daemon=True)
    started = time.perf_counter()
    thread.start()
    return Attempt(ended, give_up or interrupt, thread=thread, started=started)
