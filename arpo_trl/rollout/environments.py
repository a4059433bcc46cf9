"""Stateful environments of rows: which of their methods are tools, how a fork copies one, and when a copy is closed.

What is not here: the environments that TRL makes and keeps in its pool. It resets them for every rollout, and nothing
closes them.
"""

import copy
import inspect
from collections.abc import Callable, Sequence
from typing import Any

from transformers.utils import logging

from ..execution.executor import ToolCall, ToolExecutor
from ..execution.names import distinct_tools
from ..rewards.guard import error_text

logger = logging.get_logger(__name__)

_FOR_THE_TRAINER = ("fork", "close")


def environment_tools(tools: Sequence[Callable], environment: Any) -> list[Callable]:
    """
    The tools of the rows of one environment: `tools` without its methods `fork` and `close`, which the trainer calls.

    Args:
        tools (`Sequence[Callable]`): What TRL takes for tools: functions, and the public methods of `environment`.
        environment (`Any`): The environment.

    Raises:
        ValueError: Two tools have the same name, or `close` cannot be called without arguments.
    """
    kind = type(environment).__name__
    distinct_tools(tools, f"`environment_factory` ({kind}) together with `tools`")
    if callable(getattr(environment, "close", None)):
        try:
            inspect.signature(environment.close).bind()
        except TypeError:
            raise ValueError(
                f"`environment_factory`: `{kind}.close` takes arguments, but ARPOTrainer calls `close()` itself, when a "
                "fork is over, and no model can. Give the tool another name."
            ) from None
    return [
        tool
        for tool in tools
        if tool.__name__ not in _FOR_THE_TRAINER or getattr(tool, "__self__", None) is not environment
    ]


def fork_environment(environment: Any) -> Any:
    """
    A copy that shares no state: what the environment's own `fork()` returns, else a deep copy.

    Raises:
        TypeError: `fork` returns no other environment of the same class, or there is none and no copy can be made.
    """
    if callable(getattr(environment, "fork", None)):
        copied = environment.fork()
        if copied is environment or type(copied) is not type(environment):
            raise TypeError(
                f"`{type(environment).__name__}.fork` returned {'itself' if copied is environment else type(copied)}; "
                "return another environment of the same class."
            )
        return copied
    try:
        return copy.deepcopy(environment)
    except Exception as error:
        raise TypeError(
            f"A fork needs a copy of its environment, but a `{type(environment).__name__}` cannot be copied "
            f"({error_text(error)}). Give the class a method `fork(self)` that returns one."
        ) from error


def close_environments(environments: Sequence[Any], executor: ToolExecutor) -> None:
    """Call `close()` of those that have it, all at once. One that raises or hangs costs a warning, and not the run."""
    closable = [environment for environment in environments if callable(getattr(environment, "close", None))]
    calls = executor.run([(ToolCall("close"), environment.close) for environment in closable])
    for environment, call in zip(closable, calls, strict=True):
        if call.error is not None:
            logger.warning(f"A fork's `{type(environment).__name__}` could not be closed ({call.error}).")
