"""The continuous schedule: each row goes on as it can, from its prompt to its end.

A segment that has ended is read, its group decides on forks, its tools start; when they have answered, the row's next
segment starts. No row waits for another, no process for another process, and tools run while the engine samples. The
one thing that waits is a group whose missing rows start where all others have ended. What is decided, and on what, is
that of the waves (`loop.py`); only when is not, so a seed does not repeat a rollout.

What is not here: engines that several processes sample with together. They need waves.
"""

import math
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any

from ..protocols import ToolProtocol
from .engines.base import Sample, Stream
from .loop import (
    Branching,
    Limits,
    RolloutHooks,
    Wave,
    _answer,
    _append,
    _call,
    _cut,
    _decide,
    _fill,
    _has_room,
    _needed_later,
    _start,
    _Step,
)
from .tree import Group, Trajectory


@dataclass
class Cut:
    """
    When a rollout does not wait for its last rows. They end where they are, truncated; a segment that is being sampled
    is lost, and calls that are running are not waited for. A row that has no token then, or was not there yet, gets
    one token that is not the model's.

    Args:
        seconds (`float`): Time that the rollout may take.
        fraction (`float`): Fraction of this process's rows that has to end; 1 waits for all.
        token (`int`): Stands in a row that has none.
    """

    seconds: float = math.inf
    fraction: float = 1.0
    token: int = 0

    @classmethod
    def of(cls, args: Any, token: int) -> "Cut":
        """The cut that an [`ARPOConfig`] asks for."""
        seconds = math.inf if args.rollout_deadline is None else args.rollout_deadline
        return cls(seconds, args.rollout_finished_fraction, token)


def run_continuous(
    groups: Sequence[Group],
    prompts: Sequence[list[int]],
    protocol: ToolProtocol,
    hooks: RolloutHooks,
    branching: Branching,
    limits: Limits,
    rng: random.Random,
    ends_turn: Callable[[int], bool],
    stream: Stream,
    cut: Cut | None = None,
    images: Sequence[Sequence[Any]] = (),
) -> list[Trajectory]:
    """
    Fill every group, as [`run_waves`] does, without waves.

    Args:
        groups, prompts, protocol, branching, limits, rng, ends_turn, images: As for [`run_waves`].
        hooks ([`RolloutHooks`]): What runs tools and reports. `sample`, `keep` and `anyone` are not asked; `on_wave`
            is told of the segments that have ended so far.
        stream ([`Stream`]): Samples the segments.
        cut ([`Cut`], *optional*): When the last rows are not waited for; by default they always are.

    Returns:
        `list[Trajectory]`: the rows of all groups, in order.
    """
    rollout = _Rollout(
        groups, prompts, protocol, hooks, branching, limits, rng, ends_turn, stream, cut or Cut(), images
    )
    rollout.run()
    return [trajectory for group in groups for trajectory in group.trajectories]


class _Rollout:
    """The rows that have not ended: those that are being sampled, and those that wait for their tools."""

    def __init__(
        self,
        groups: Sequence[Group],
        prompts: Sequence[list[int]],
        protocol: ToolProtocol,
        hooks: RolloutHooks,
        branching: Branching,
        limits: Limits,
        rng: random.Random,
        ends_turn: Callable[[int], bool],
        stream: Stream,
        cut: Cut,
        images: Sequence[Sequence[Any]],
    ):
        self.groups, self.prompts, self.protocol, self.hooks = groups, prompts, protocol, hooks
        self.branching, self.limits, self.rng, self.ends_turn = branching, limits, rng, ends_turn
        self.stream, self.cut = stream, cut
        self.images = images or [[] for _ in prompts]
        self.deadline = time.monotonic() + cut.seconds
        self.group_of = {row: index for index, group in enumerate(groups) for row in group.rows}
        self.unfinished = [0] * len(groups)  # rows of each group
        self.sampled: dict[int, tuple[Trajectory, list[int], Future[Sample]]] = {}  # by row, with the context
        self.called: dict[int, _Step] = {}  # by row
        self.changed: SimpleQueue[int] = SimpleQueue()  # rows whose segment, or a call of it, has ended
        self.told = Wave(index=0, active=0, calls=0, forks=0)

    def run(self) -> None:
        for group in self.groups:
            for _ in range(group.num_initial):
                self.begin(_start(group, self.prompts, self.images, "initial"))
        while any(self.unfinished):
            if self.is_over():
                self.end_rest()
                return
            self.work()
            self.take(self.changes())

    def begin(self, trajectory: Trajectory) -> None:
        """A new row."""
        self.unfinished[self.group_of[trajectory.row]] += 1
        self.sample(trajectory)

    def sample(self, trajectory: Trajectory) -> None:
        """Start a row's next segment."""
        limits, row = self.limits, trajectory.row
        context = trajectory.prompt_ids + trajectory.completion_ids
        limit = limits.completion if limits.cut_afterwards else limits.left(trajectory)
        future = self.stream.start(context, limit, trajectory.images)
        self.sampled[row] = (trajectory, context, future)
        future.add_done_callback(partial(self.change, row))

    def change(self, row: int, ended: Future) -> None:
        """A segment or a call of a row has ended; told by whichever thread knows."""
        self.changed.put(row)

    def go_on(self, trajectory: Trajectory) -> None:
        """Start a row's next segment if it has room for one; otherwise the row has ended."""
        if self.limits.cut_afterwards or _has_room(trajectory, self.limits):
            self.sample(trajectory)
        else:
            self.unfinished[self.group_of[trajectory.row]] -= 1

    def is_over(self) -> bool:
        if time.monotonic() >= self.deadline:
            return True
        rows = len(self.group_of)
        ended = sum(len(group.trajectories) for group in self.groups) - sum(self.unfinished)
        return ended < rows and ended >= self.cut.fraction * rows

    def work(self) -> None:
        """Sample, or wait, until a row has changed or the time is over."""
        with self.hooks.timed("sample" if self.sampled else "wait"):
            while self.changed.empty() and time.monotonic() < self.deadline:
                if not self.stream.step(self.needed_later):
                    self.wait()

    def wait(self) -> None:
        left = self.deadline - time.monotonic()
        try:
            self.changed.put(self.changed.get(timeout=None if left == math.inf else max(left, 0)))
        except Empty:  # the time is over
            pass

    def needed_later(self) -> list[list[int]]:
        sampled = [trajectory for trajectory, _, _ in self.sampled.values()]
        return _needed_later(self.groups, sampled, list(self.called.values()), self.branching.rule)

    def changes(self) -> list[int]:
        """The rows that have changed, in order."""
        rows = set()
        while not self.changed.empty():
            rows.add(self.changed.get())
        return sorted(rows)

    def take(self, rows: Sequence[int]) -> None:
        """Go on with rows that have changed, and with the groups that they leave without an unfinished row."""
        ended = [self.sampled.pop(row) for row in rows if row in self.sampled and self.sampled[row][2].done()]
        steps = [_cut(trajectory, future.result(), self.branching, self.limits) for trajectory, _, future in ended]
        self.fork(steps)
        with self.hooks.timed("parse"):
            for step, (trajectory, context, _) in zip(steps, ended, strict=True):
                step.turn = self.protocol.parse(step.sample.ids, context, self.hooks.tools_of(trajectory))
                _append(step)
                step.futures = _call(step, self.limits, self.hooks)
                self.called[trajectory.row] = step
                for call in step.futures:
                    call.add_done_callback(partial(self.change, trajectory.row))
        if steps:
            self.tell(steps)
        with self.hooks.timed("tools"):
            self.answer(rows)
        self.fill({self.group_of[row] for row in rows})

    def fork(self, steps: Iterable[_Step]) -> None:
        """Decide on the tool results behind these segments; a fork's first segment starts at once."""
        steps_of: defaultdict[int, list[_Step]] = defaultdict(list)
        for step in steps:
            steps_of[self.group_of[step.trajectory.row]].append(step)
        for index, steps_of_group in steps_of.items():
            for fork in _decide(self.groups[index], steps_of_group, self.branching.rule, self.hooks, self.rng):
                self.unfinished[index] += 1
                self.go_on(fork)

    def answer(self, rows: Iterable[int]) -> None:
        """Go on with those of the rows whose calls are all answered; a row that made none has ended."""
        for row in rows:
            step = self.called.get(row)
            if step is None or not all(future.done() for future in step.futures):
                continue
            del self.called[row]
            if _answer(step, self.protocol, self.limits, self.ends_turn):
                self.go_on(step.trajectory)
            else:
                self.unfinished[self.group_of[row]] -= 1

    def fill(self, indices: Iterable[int]) -> None:
        """Start missing rows of groups of which no row is unfinished."""
        for index in sorted(indices):
            group = self.groups[index]
            if group.budget and not self.unfinished[index]:
                for trajectory in _fill(group, self.prompts, self.images, self.branching.rule, self.hooks, self.rng):
                    self.begin(trajectory)

    def tell(self, steps: Sequence[_Step]) -> None:
        self.told = Wave(
            self.told.index + len(steps),
            active=sum(self.unfinished),
            calls=sum(len(step.futures) for step in steps),
            forks=sum(row.kind == "fork" for group in self.groups for row in group.trajectories),
        )
        self.hooks.on_wave(self.told)

    def end_rest(self) -> None:
        """End the rows that go on, and give the groups their missing rows."""
        for trajectory, _, _ in self.sampled.values():
            trajectory.truncated = True
        for step in self.called.values():
            step.trajectory.truncated = True
            for future in step.futures:
                future.cancel()  # of calls in order, those that have not begun
        for group in self.groups:
            while group.budget:
                _start(group, self.prompts, self.images, "supplement").truncated = True
            for trajectory in group.trajectories:
                if not trajectory.completion_ids:
                    trajectory.completion_ids, trajectory.tool_mask = [self.cut.token], [0]
                    trajectory.logprobs = [0.0]
