"""The tools of rows, and the stateful environments behind them: which methods are tools, how a fork copies an environment,
and when a copy is closed.

What is not here: the environments that TRL makes and keeps in its pool. It resets them for every rollout, and nothing
closes them.
"""

import copy
import inspect
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from transformers.utils import logging

from ..execution.errors import error_repr
from ..execution.executor import ToolCall, ToolExecutor
from ..execution.names import distinct_tools
from .loop import refuse_calls_over_limit
from .tree import Trajectory

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
            f"({error_repr(error)}). Give the class a method `fork(self)` that returns one."
        ) from error


def close_environments(environments: Sequence[Any], executor: ToolExecutor) -> None:
    """Call `close()` of those that have it, all at once. One that raises or hangs costs a warning, and not the run."""
    closable = [environment for environment in environments if callable(getattr(environment, "close", None))]
    calls = executor.run([(ToolCall("close"), environment.close) for environment in closable])
    for environment, call in zip(closable, calls, strict=True):
        if call.error is not None:
            logger.warning(f"A fork's `{type(environment).__name__}` could not be closed ({call.error}).")


class RowTools:
    """
    The tools of a trainer's rows. TRL keeps them by row, since each row may have an environment of its own.

    Args:
        trainer ([`~trl.GRPOTrainer`]): Holds tools and environments by row.
        executor ([`ToolExecutor`]): Runs the calls.
        forks (`bool`): Whether environments are copied.

    Raises:
        TypeError, ValueError: An environment cannot be copied, or has methods that cannot be tools.
    """

    def __init__(self, trainer: Any, executor: ToolExecutor, forks: bool):
        self._trainer = trainer
        self._executor = executor
        self._copies: list[Any] = []  # made for the forks of the rollout that is going on
        if trainer.environment_factories is not None:
            for name, tools in trainer._env_tools.items():
                environment = trainer._environment_pool[name][0]
                trainer._env_tools[name] = environment_tools(tools, environment)
                if forks:  # one that cannot be copied is told now
                    close_environments([fork_environment(environment)], executor)
            trainer.tools = list(dict.fromkeys(tool for tools in trainer._env_tools.values() for tool in tools))
        # Environments of different names may have methods of the same name
        self.names = list(dict.fromkeys(tool.__name__ for tool in trainer.tools))

    def of(self, trajectory: Trajectory) -> dict[str, Callable]:
        """The tools that a row may call, by name."""
        row = trajectory.row
        tools = {**self._trainer._sync_tool_dicts[row], **self._trainer._async_tool_dicts[row]}
        return {name: tool for name, tool in tools.items() if name in self.names}

    def submit(self, trajectory: Trajectory, calls: list[ToolCall]) -> list[Future]:
        """Start the calls of one turn."""
        tools = self.of(trajectory)
        refuse_calls_over_limit(calls, trajectory, tools)
        pairs = [(call, tools.get(call.name)) for call in calls]
        if self._trainer.environments is not None:  # a stateful environment is called in the order of the model's text
            return self._executor.submit_in_order(pairs)
        return [self._executor.submit(call, tool) for call, tool in pairs]

    def copy(self, parent: Trajectory, fork: Trajectory) -> bool:
        """Give a fork a copy of its parent's environment; `False`, after one warning, where none can be made."""
        environments = self._trainer.environments
        if environments is None:
            return True
        environment = environments[parent.row]
        try:
            environments[fork.row] = copied = fork_environment(environment)
        except Exception as error:
            name = type(environment).__name__
            logger.warning_once(f"A `{name}` could not be copied for a fork, which is not made ({error_repr(error)}).")
            return False
        self._copies.append(copied)
        for tools in (self._trainer._sync_tool_dicts, self._trainer._async_tool_dicts):
            tools[fork.row] = {
                name: getattr(copied, name) if getattr(tool, "__self__", None) is environment else tool
                for name, tool in tools[parent.row].items()
            }
        return True

    def close_copies(self) -> None:
        """Close the environments that were copied for forks."""
        close_environments(self._copies, self._executor)
        self._copies.clear()
