"""
One execution for each distinct call that the rows of a group make of a deterministic tool.

The answer of such a tool depends on its arguments alone, and a call changes nothing: equal calls of several rows can
share one execution, and every row reads what it would have read without that. The tools of this package that only look
something up or compute say so; others say it with `tool(..., deterministic=True)`.

A call joins an equal one that has been answered, or that is still running. An error is shared by the calls of one wave
and by those that wait for it; a later call tries again. What a row may do does not change: a merged call counts
against its limits, and its row waits for the answer as for one of its own.

What is not here: answers that reach other groups, steps or runs (`tool(..., cache=...)`); calls of a stateful
environment.
"""

from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import NamedTuple

from ..execution.arguments import bound_arguments, canonical_json
from ..execution.executor import ToolCall
from ..execution.options import tool_options


class _Execution(NamedTuple):
    future: Future[ToolCall]
    wave: int


class CallMerger:
    """
    Args:
        submit (`Callable[[ToolCall, Callable | None], Future[ToolCall]]`): Executes a call.
    """

    def __init__(self, submit: Callable[[ToolCall, Callable | None], "Future[ToolCall]"]):
        self._submit = submit
        self._executions: dict[tuple[Hashable, str, str], _Execution] = {}
        self._wave = 0

    def submit(self, group: Hashable, call: ToolCall, function: Callable | None) -> "Future[ToolCall]":
        """
        Execute a call, or let it join an equal one of its group.

        Args:
            group (`Hashable`): Names the group; calls of different groups are never merged.
            call ([`ToolCall`]): The call.
            function (`Callable`, *optional*): The tool; `None` if there is none of that name. The tools of a group
                have a name each.

        Returns:
            `Future`: Resolves to `call`, filled in.
        """
        arguments = call_key(call, function)
        if arguments is None:
            return self._submit(call, function)
        key = (group, call.name, arguments)
        execution = self._executions.get(key)
        if execution is None or (execution.wave < self._wave and has_failed(execution.future)):
            execution = self._executions[key] = _Execution(self._submit(call, function), self._wave)
            return execution.future
        return joined(call, execution.future)

    def next_wave(self) -> None:
        """Calls from now on do not share the errors of calls before, unless these are still running."""
        self._wave += 1

    def clear(self) -> None:
        """Forget all answers."""
        self._executions.clear()


def call_key(call: ToolCall, function: Callable | None) -> str | None:
    """What two calls of one tool have in common if they are equal; `None` for a call that is never merged."""
    if function is None or call.error is not None or not tool_options(function).deterministic:
        return None
    return canonical_json(bound_arguments(function, call.arguments))


def has_failed(execution: "Future[ToolCall]") -> bool:
    """Whether a call has ended, and without an answer."""
    return execution.done() and (execution.exception() is not None or execution.result().error is not None)


def joined(call: ToolCall, execution: "Future[ToolCall]") -> "Future[ToolCall]":
    """A future that resolves to `call` with the answer of an equal call, when that has one."""
    future: Future[ToolCall] = Future()
    future.set_running_or_notify_cancel()

    def fill_in(execution: "Future[ToolCall]") -> None:
        try:
            answered = execution.result()
        except Exception as error:  # not of the tool, which the call holds
            future.set_exception(error)
            return
        call.result, call.error, call.merged = answered.result, answered.error, True
        future.set_result(call)

    execution.add_done_callback(fill_in)
    return future
