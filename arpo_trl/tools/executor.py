"""Run the tool calls of many rows at once.

Sync tools run on a bounded pool of threads, async tools on one event loop. A tool that raises does not end the run:
the model reads the error as the tool's result.
"""

import asyncio
import inspect
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any


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
        self.timeout = timeout
        self._pool = ThreadPoolExecutor(max_workers, thread_name_prefix="arpo-tool")
        self._loop: asyncio.AbstractEventLoop | None = None

    def submit(self, call: ToolCall, function: Callable | None) -> Future:
        """Start `call` of `function` (`None`: there is no such tool); the future's result is `call`, filled in."""
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError
