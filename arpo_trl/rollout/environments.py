"""The tools of rows, and the stateful environments behind them: which methods are tools, how an environment is copied,
and when a copy is closed.

What is not here: which rows share an execution and where copies are kept (`states.py`); the environments that TRL
makes and keeps in its pool. It resets them for every rollout, and nothing closes them.
"""

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, TypeAlias

from transformers.utils import logging

from ..execution.arguments import bound_arguments, canonical_json
from ..execution.errors import error_repr
from ..execution.executor import ToolCall, ToolExecutor
from ..execution.names import distinct_tools
from ..execution.options import tool_options
from .loop import refuse_calls_over_limit
from .merging import CallMerger
from .states import EnvironmentStates
from .tree import Group, Trajectory

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
                f"`environment_factory`: `{kind}.close` takes arguments, but ARPOTrainer calls `close()` itself, when "
                "a fork is over, and no model can. Give the tool another name."
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


def is_deterministic(environment: Any) -> bool:
    """
    Whether an environment's class says that what it answers, and becomes, depends on what `reset` was given and on the
    calls before alone: `deterministic = True`.

    Raises:
        TypeError: It says something else than `True` or `False`.
    """
    said = getattr(environment, "deterministic", False)
    if not isinstance(said, bool):
        raise TypeError(
            f"`environment_factory`: `{type(environment).__name__}.deterministic` is {said!r}; set it to True if what "
            "an environment answers depends on `reset` and on the calls before alone, else to False."
        )
    return said


def close_environments(environments: Sequence[Any], executor: ToolExecutor) -> None:
    """Call `close()` of those that have it, all at once. One that raises or hangs costs a warning, and not the run."""
    wait_until_closed([closing(environment, executor) for environment in environments])


Closing: TypeAlias = tuple[Any, "Future[ToolCall] | None"]


def closing(environment: Any, executor: ToolExecutor) -> Closing:
    """Start to close an environment."""
    close = getattr(environment, "close", None)
    return environment, executor.submit(ToolCall("close"), close) if callable(close) else None


def wait_until_closed(closed: Sequence[Closing]) -> None:
    """Wait for what [`closing`] started, and tell what failed."""
    for environment, future in closed:
        error = None if future is None else future.result().error
        if error is not None:
            logger.warning(f"A fork's `{type(environment).__name__}` could not be closed ({error}).")


class RowTools:
    """
    The tools of a trainer's rows. TRL keeps them by row, since each row may have an environment of its own.

    Args:
        trainer ([`~trl.GRPOTrainer`]): Holds tools and environments by row.
        executor ([`ToolExecutor`]): Runs the calls.
        forks (`bool`): Whether environments are copied for forks.
        kept_states (`int`, *optional*, defaults to `0`): Copies to keep for forks from rows that have ended.

    Raises:
        TypeError, ValueError: An environment cannot be copied, or has methods that cannot be tools.
    """

    def __init__(self, trainer: Any, executor: ToolExecutor, forks: bool, kept_states: int = 0):
        self._trainer = trainer
        self._executor = executor
        self._kept_states = kept_states
        self._merger = CallMerger(executor.submit)
        self._group_of: dict[int, int] = {}  # row to group of the rollout that is going on
        self._states: EnvironmentStates | None = None  # of the rollout that is going on
        self._copies: dict[int, Any] = {}  # those of the rollout that are open, by id
        self._closing: list[Closing] = []
        if trainer.environment_factories is not None:
            for name, tools in trainer._env_tools.items():
                environment = trainer._environment_pool[name][0]
                trainer._env_tools[name] = environment_tools(tools, environment)
                if forks or is_deterministic(environment):  # one that cannot be copied is told now
                    close_environments([fork_environment(environment)], executor)
            trainer.tools = list(dict.fromkeys(tool for tools in trainer._env_tools.values() for tool in tools))
        # Environments of different names may have methods of the same name
        self.names = list(dict.fromkeys(tool.__name__ for tool in trainer.tools))

    def begin(self, groups: Sequence[Group]) -> None:
        """A rollout of `groups` begins."""
        self._group_of = {row: index for index, group in enumerate(groups) for row in group.rows}
        if self._trainer.environments is not None:
            self._states = EnvironmentStates(
                groups,
                self._trainer.environments,
                self._execute_in_order,
                self._copied,
                self._install,
                self._discard,
                self._kept_states,
            )

    def of(self, trajectory: Trajectory) -> dict[str, Callable]:
        """The tools that a row may call, by name."""
        return self._of_row(trajectory.row)

    def _of_row(self, row: int) -> dict[str, Callable]:
        tools = {**self._trainer._sync_tool_dicts[row], **self._trainer._async_tool_dicts[row]}
        return {name: tool for name, tool in tools.items() if name in self.names}

    def submit(self, trajectory: Trajectory, calls: list[ToolCall]) -> list[Future]:
        """Start the calls of one turn. Those of a stateful environment run one after another, in the model's order."""
        tools = self.of(trajectory)
        refuse_calls_over_limit(calls, trajectory, tools)
        group = self._group_of[trajectory.row]
        ordered = [call for call in calls if self._states is not None and self._in_order(call, tools, trajectory.row)]
        futures = {}
        if self._states is not None:
            key = self._turn_key(ordered, tools, trajectory.row)
            answers = self._states.submit(trajectory, ordered, len(calls), key)
            futures = {id(call): answer for call, answer in zip(ordered, answers, strict=True)}
        return [
            futures[id(call)] if id(call) in futures else self._merger.submit(group, call, tools.get(call.name))
            for call in calls
        ]

    def _in_order(self, call: ToolCall, tools: Mapping[str, Callable], row: int) -> bool:
        """
        Whether a call has to run after those before it: unless it runs nothing, or its tool neither changes nor reads
        the environment of its row.
        """
        tool = tools.get(call.name)
        if call.error is not None or tool is None:
            return False
        return self._is_method(tool, row) or not tool_options(tool).deterministic

    def _is_method(self, tool: Callable, row: int) -> bool:
        return getattr(tool, "__self__", None) is self._trainer.environments[row]

    def _turn_key(self, calls: Sequence[ToolCall], tools: Mapping[str, Callable], row: int) -> str | None:
        """
        What equal turns of a deterministic environment have in common; `None` for a turn that no other row may join.
        """
        if not is_deterministic(self._trainer.environments[row]):
            return None
        if not all(self._is_method(tools[call.name], row) for call in calls):
            return None
        return canonical_json([[call.name, bound_arguments(tools[call.name], call.arguments)] for call in calls])

    def _execute_in_order(self, row: int, calls: list[ToolCall]) -> "list[Future[ToolCall]]":
        tools = self._of_row(row)
        return self._executor.submit_in_order([(call, tools[call.name]) for call in calls])

    def next_wave(self) -> None:
        """The calls of a wave have been started."""
        self._merger.next_wave()
        if self._states is not None:
            self._states.next_wave()

    def copy(self, parent: Trajectory, fork: Trajectory) -> bool:
        """Give a fork a copy of its parent's environment; `False` where none can be made, or none was kept."""
        return self._states is None or self._states.fork(parent, fork)

    def _copied(self, environment: Any) -> Any:
        """A copy of an environment; `None`, after one warning, where none can be made."""
        try:
            copied = fork_environment(environment)
        except Exception as error:
            name = type(environment).__name__
            again = " Rows that share calls make them again." if is_deterministic(environment) else ""
            logger.warning_once(
                f"A `{name}` could not be copied for a fork, which is not made ({error_repr(error)}).{again}"
            )
            return None
        self._copies[id(copied)] = copied
        return copied

    def _install(self, row: int, environment: Any) -> None:
        """Give a row another environment, and the methods of it for tools."""
        before = self._trainer.environments[row]
        self._trainer.environments[row] = environment
        for tools in (self._trainer._sync_tool_dicts, self._trainer._async_tool_dicts):
            tools[row] = {
                name: getattr(environment, name) if getattr(tool, "__self__", None) is before else tool
                for name, tool in tools[row].items()
            }
        if id(before) in self._copies:
            self._discard(before)

    def _discard(self, environment: Any) -> None:
        self._closing.append(closing(self._copies.pop(id(environment)), self._executor))

    def settle(self) -> None:
        """The groups are full: the environment of each row is as that row left it."""
        if self._states is not None:
            self._states.settle()

    def end(self) -> None:
        """The rollout has been scored: close the environments that were copied, and forget all answers."""
        self._merger.clear()
        self._states = None
        for environment in list(self._copies.values()):
            self._discard(environment)
        wait_until_closed(self._closing)
        self._closing.clear()
