"""
Where the stateful environments of a rollout stand: which rows share an execution, and where a fork gets its copy from.

Every row has an environment of its own. A *state* is what an environment is after the calls that a row has made of it.

- A class that says `deterministic = True` answers, and changes, by what `reset` was given and by the calls before
  alone. Rows of a group whose prompts and calls are equal are then in one state: the first of them executes the next
  turn, and the others read its answers. Their own environments stay behind, and catch up when their calls part: by a
  copy of one that stands where they are, or, where there is none, by making the calls that they had joined.
- A rule of expansion forks from rows that have ended. Before an environment leaves a state, a copy stays there for
  the forks to come, until the group is full. There are at most so many of these copies; beyond that, those go first
  before which the fewest calls stand, since a fork from there saves the least. A fork whose state has gone starts from
  the prompt.

What is not here: calls of tools that are no methods of the environment (`merging.py`); what a copy is, and how one is
closed (`environments.py`).
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from typing import Any

from transformers.utils import logging

from ..execution.executor import ToolCall
from .merging import has_failed, joined
from .tree import Group, Trajectory

logger = logging.get_logger(__name__)


@dataclass(eq=False)
class State:
    """
    Args:
        group (`int`): Index of the group.
        calls (`int`): Calls of the environment before it.
        wave (`int`): Wave in which the first row entered it.
        rows (`set[int]`): Rows that are in it now.
        answers (`list[Future]`): Of the calls that led to it.
        next (`dict[str, State]`): Where a turn leads that other rows may join, by its calls.
        follows_a_call (`bool`): Whether a fork may leave here.
        kept (`Any`, *optional*): An environment that stands here and belongs to no row.
    """

    group: int
    calls: int = 0
    wave: int = 0
    rows: set[int] = field(default_factory=set)
    answers: "list[Future[ToolCall]]" = field(default_factory=list)
    next: "dict[str, State]" = field(default_factory=dict)
    follows_a_call: bool = False
    kept: Any = None


@dataclass
class _Row:
    """
    Args:
        state (`State`): Of the row.
        passed (`dict[int, State]`): Its states so far, by the number of the row's calls before each.
        behind (`list[ToolCall]`): Calls of the row that others have executed and its own environment has not seen.
    """

    state: State
    passed: dict[int, State]
    behind: list[ToolCall] = field(default_factory=list)


class EnvironmentStates:
    """
    The states of one rollout.

    Args:
        groups (`Sequence[Group]`): The groups that are being filled.
        environments (`list[Any]`): The environment of each row.
        execute (`Callable[[int, list[ToolCall]], list[Future]]`): Executes calls of a row's environment in order.
        copy (`Callable[[Any], Any | None]`): Copies an environment; `None` where that failed.
        install (`Callable[[int, Any], None]`): Gives a row another environment.
        discard (`Callable[[Any], None]`): Told of a copy that nobody needs any more.
        limit (`int`): Copies to keep for forks from rows that have ended; 0 keeps none.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        environments: list[Any],
        execute: "Callable[[int, list[ToolCall]], list[Future[ToolCall]]]",
        copy: Callable[[Any], Any],
        install: Callable[[int, Any], None],
        discard: Callable[[Any], None],
        limit: int,
    ):
        self._groups = groups
        self._environments = environments
        self._execute = execute
        self._copy = copy
        self._install = install
        self._discard = discard
        self._limit = limit
        self._group_of = {row: index for index, group in enumerate(groups) for row in group.rows}
        self._rows: dict[int, _Row] = {}
        self._starts: dict[tuple, State] = {}  # by group and prompt
        self._keeping: list[State] = []  # those that have a copy
        self._wave = 0

    def submit(
        self, trajectory: Trajectory, calls: list[ToolCall], total: int, key: str | None
    ) -> "list[Future[ToolCall]]":
        """
        Execute the calls of a turn that concern the row's environment, or let them join those of another row.

        Args:
            trajectory (`Trajectory`): The row.
            calls (`list[ToolCall]`): The calls, in the model's order; maybe none.
            total (`int`): Calls of the turn, those that do not concern the environment counted.
            key (`str`, *optional*): Equal for equal calls; `None` for a turn that no other row may join.

        Returns:
            `list[Future]`: one a call, which resolves to it.
        """
        row = self._row(trajectory)
        here = row.state
        if not calls:
            here.follows_a_call = True
            row.passed[len(trajectory.calls) + total] = here
            return []
        there = here.next.get(key) if key is not None else None
        if there is not None and there.wave < self._wave and any(map(has_failed, there.answers)):
            there = None  # an error is shared by the rows of its wave, and by those that wait for it
        if there is not None:
            row.behind += calls
            futures = [joined(call, answer) for call, answer in zip(calls, there.answers, strict=True)]
        else:
            there = State(here.group, here.calls + len(calls), self._wave, follows_a_call=True)
            repeated = [] if self._caught_up_by_copy(trajectory.row, row) else self._to_repeat(row)
            if repeated and self._needed(here, trajectory.row):
                wait(self._execute(trajectory.row, repeated))
                repeated = []
            self._leave_copy(here, trajectory.row)
            futures = self._execute(trajectory.row, repeated + calls)[len(repeated) :]
            there.answers = futures
            if key is not None:
                here.next[key] = there
        here.rows.discard(trajectory.row)
        there.rows.add(trajectory.row)
        row.state = row.passed[len(trajectory.calls) + total] = there
        self._release(here)
        return futures

    def fork(self, parent: Trajectory, fork: Trajectory) -> bool:
        """Give a fork an environment as its parent had it where the fork leaves; `False` where there is none."""
        passed = self._row(parent).passed
        state = passed[len(fork.calls)]
        source = self._source(state)
        if source is None and state is self._rows[parent.row].state:
            wait(self._execute(parent.row, self._to_repeat(self._rows[parent.row])))
            source = self._environments[parent.row]
        copied = None if source is None else self._copy(source)
        if copied is None:
            return False
        self._install(fork.row, copied)
        self._rows[fork.row] = _Row(state, {calls: at for calls, at in passed.items() if calls <= len(fork.calls)})
        state.rows.add(fork.row)
        return True

    def next_wave(self) -> None:
        """The calls of a wave have been started."""
        self._wave += 1
        for state in list(self._keeping):
            self._release(state)

    def settle(self) -> None:
        """The groups are full: bring every environment to where its row ended, and keep no other copy."""
        behind = list(self._rows.items())
        while behind:  # where no environment stands, one row repeats its calls, and the others copy that
            repeated: list[Future[ToolCall]] = []
            states: set[State] = set()
            for number, row in behind:
                if row.state not in states and not self._caught_up_by_copy(number, row):
                    repeated += self._execute(number, self._to_repeat(row))
                    states.add(row.state)
            wait(repeated)
            behind = [(number, row) for number, row in behind if row.behind]
        for state in list(self._keeping):
            self._drop(state)

    def _row(self, trajectory: Trajectory) -> _Row:
        if trajectory.row not in self._rows:
            group = self._group_of[trajectory.row]
            start = self._starts.setdefault((group, *trajectory.prompt_ids), State(group))
            start.rows.add(trajectory.row)
            self._rows[trajectory.row] = _Row(start, {0: start})
        return self._rows[trajectory.row]

    def _source(self, state: State) -> Any:
        """An environment that stands in `state`; `None` if there is none."""
        if state.kept is not None:
            return state.kept
        return next((self._environments[row] for row in state.rows if not self._rows[row].behind), None)

    def _caught_up_by_copy(self, number: int, row: _Row) -> bool:
        """Whether a row's environment stands in its state, after it was replaced by a copy of one that does."""
        if not row.behind:
            return True
        state = row.state
        source = self._source(state)
        if source is None:
            return False
        if source is state.kept and not self._needed(state, number):
            self._keeping.remove(state)
            state.kept, copied = None, source
        else:
            copied = self._copy(source)
        if copied is None:
            return False
        self._install(number, copied)
        row.behind = []
        return True

    def _to_repeat(self, row: _Row) -> list[ToolCall]:
        """The calls with which a row's environment catches up. They are paid for now, so they are merged no more."""
        repeated = [ToolCall(call.name, call.arguments) for call in row.behind]
        for call in row.behind:
            call.merged = False
        row.behind = []
        return repeated

    def _needed(self, state: State, leaving: int) -> bool:
        """Whether another row than `leaving` is behind in `state`, or forks may come to it."""
        return self._may_fork(state) or any(self._rows[row].behind for row in state.rows if row != leaving)

    def _may_fork(self, state: State) -> bool:
        return self._limit > 0 and state.follows_a_call and self._groups[state.group].budget > 0

    def _leave_copy(self, state: State, leaving: int) -> None:
        """A row's environment is about to leave `state`: keep a copy if one is needed and no other stands there."""
        if state.kept is not None or not self._needed(state, leaving):
            return
        if any(not self._rows[row].behind for row in state.rows if row != leaving):
            return
        state.kept = self._copy(self._environments[leaving])
        if state.kept is None:
            return
        self._keeping.append(state)
        for_forks = [kept for kept in self._keeping if self._may_fork(kept)]
        if self._limit and len(for_forks) > self._limit:
            logger.warning_once(
                f"More than `max_environment_states` ({self._limit}) copies of environments were to be kept for "
                "forks: those with the fewest calls before them went, and forks from there start from the prompt. "
                "Raise it if memory allows."
            )
            self._drop(min(for_forks, key=lambda kept: kept.calls))

    def _release(self, state: State) -> None:
        if state.kept is not None and not self._needed(state, leaving=-1):
            self._drop(state)

    def _drop(self, state: State) -> None:
        self._keeping.remove(state)
        self._discard(state.kept)
        state.kept = None
