"""How a tool is run: time-out, retries, cache and limits, attached to the function itself.

A decorated function stays a plain function: called directly (or by TRL's own `GRPOTrainer`) it runs as it always did.
The options take effect where a [`ToolExecutor`] runs it.
"""

import functools
import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .cache import ToolCache
from .function_worker import importable_name


@dataclass(frozen=True, eq=False)
class ToolOptions:
    """How a [`ToolExecutor`] runs a tool; see [`tool`] for the fields."""

    timeout: float | None = None
    retries: int = 0
    cache: ToolCache | None = None
    max_concurrency: int | None = None
    max_result_tokens: int | None = None
    max_calls_per_row: int | None = None
    process: bool = False
    deterministic: bool = False


_DEFAULTS = ToolOptions()


def tool_options(function: Callable) -> ToolOptions:
    """Return the options that [`tool`] attached to `function`, or the defaults for a function it has not seen."""
    return getattr(function, "_tool_options", _DEFAULTS)


def tool(
    function: Callable | None = None,
    /,
    *,
    timeout: float | None = None,
    retries: int = 0,
    cache: ToolCache | str | os.PathLike | None = None,
    max_concurrency: int | None = None,
    max_result_tokens: int | None = None,
    max_calls_per_row: int | None = None,
    process: bool = False,
    deterministic: bool | None = None,
) -> Callable:
    """Attach options to a tool, as a decorator or around an existing function, coroutine function or bound method.

    Name, docstring, signature and type hints are kept, so the tool's JSON schema does not change.

    Args:
        function (`Callable`, *optional*):
            The tool. Left out where `tool(...)` is used as a decorator with options.
        timeout (`float`, *optional*):
            Seconds after which one attempt is given up. `None` takes the executor's; `float("inf")` waits for ever.
            Waiting for a free slot does not count.
        retries (`int`, defaults to `0`):
            Further attempts after a transient failure: a time-out, a lost connection, HTTP 408, 425, 429 or 5xx, a
            [`TransientToolError`]. The wait doubles from half a second and is never shorter than the server's
            `Retry-After`. Every attempt runs the tool again, so it should have no side effects.
        cache (`ToolCache` or path, *optional*):
            Where answers are remembered between calls, runs and processes. Only for tools whose answer depends on
            their arguments alone. Tools of the same name that differ in anything else, such as their index, need a
            [`ToolCache`] with a namespace each.
        max_concurrency (`int`, *optional*):
            Calls of this tool that one executor runs at the same time. By default the executor's `max_workers` for a
            sync tool, the number of processors with `process=True`, and no limit for a coroutine function.
        max_result_tokens (`int`, *optional*):
            Longer text is cut to this many tokens, a visible marker included. Lists of content blocks are not cut.
        max_calls_per_row (`int`, *optional*):
            Calls that one row may make of this tool. The trainer counts them.
        process (`bool`, defaults to `False`):
            Run the tool in worker processes, killed at its time-out. The one way to end a function that hangs inside C
            code, such as a network call without a time-out of its own or a regular expression. Needs a sync function
            that can be imported by its name and keeps no state in memory: each worker has its own copy of the module.
        deterministic (`bool`, *optional*):
            Whether the answer depends on the arguments alone and a call changes nothing. The trainer then executes
            equal calls of the rows of one group once, and all of them read the one answer. By default what `function`
            says of itself, as the tools of this package do, and `True` for a tool with a cache.

    Returns:
        `Callable`: The tool with its options, sync or async as it was.

    Example:

    ```python
    from arpo_trl.tools import tool


    @tool(timeout=10, retries=2, cache="outputs/tools.sqlite", max_result_tokens=1024)
    def search(query: str) -> str: ...
    ```
    """
    if function is None:
        return functools.partial(
            tool,
            timeout=timeout,
            retries=retries,
            cache=cache,
            max_concurrency=max_concurrency,
            max_result_tokens=max_result_tokens,
            max_calls_per_row=max_calls_per_row,
            process=process,
            deterministic=deterministic,
        )
    if not callable(function) or not hasattr(function, "__name__"):
        raise TypeError(
            f"tool() takes a function, a coroutine function or a bound method, not {function!r}. A callable without a "
            "name, such as a partial, can be called in a function of its own."
        )
    if timeout is not None and not timeout > 0:
        raise ValueError(f"`timeout` must be a positive number of seconds or None, not {timeout!r}.")
    if not isinstance(retries, int) or retries < 0:
        raise ValueError(f"`retries` must be 0 or a positive integer, not {retries!r}.")
    limits = {
        "max_concurrency": max_concurrency,
        "max_result_tokens": max_result_tokens,
        "max_calls_per_row": max_calls_per_row,
    }
    for name, value in limits.items():
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ValueError(f"`{name}` must be a positive integer or None, not {value!r}.")
    if process:
        if is_async(function):
            raise ValueError(f"`process=True` is for sync functions; {function!r} is a coroutine function.")
        importable_name(function)
    if isinstance(cache, str | os.PathLike):
        cache = ToolCache(cache)
    if deterministic is None:
        deterministic = cache is not None or tool_options(function).deterministic
    elif not isinstance(deterministic, bool):
        raise ValueError(f"`deterministic` must be True, False or None, not {deterministic!r}.")
    if cache is not None and not deterministic:
        raise ValueError(
            "`deterministic=False` contradicts `cache`, which remembers answers that depend on the arguments alone. "
            "Leave one of them out."
        )
    options = ToolOptions(timeout, retries, cache, **limits, process=process, deterministic=deterministic)

    async def call_async(*args: Any, **kwargs: Any) -> Any:
        return await function(*args, **kwargs)

    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    wrapper = functools.update_wrapper(call_async if is_async(function) else call, function)
    wrapper._tool_options = options  # type: ignore[attr-defined]
    return wrapper


def is_async(function: Callable) -> bool:
    """Return whether calling `function` gives a coroutine; sees through `functools.partial` and `__call__`."""
    while isinstance(function, functools.partial):
        function = function.func
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)
