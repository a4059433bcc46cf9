"""
What a rollout does with one row at a time, whatever its schedule: a segment is read, its group decides on forks, its
calls start, their results are appended. And what it is told: where to fork, limits, and functions that sample and run.

What is not here: when each of these comes (`loop.py`, `continuous.py`).
"""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

from ..execution.executor import ToolCall
from ..execution.images import images_of
from ..execution.options import tool_options
from ..protocols import ToolProtocol, Tools, Turn
from .engines.base import Sample
from .entropy import entropy_gap, mean_entropy, segment_logprob
from .rules.answers import decide, expand, priority
from .rules.base import BranchRule, allocate_forks
from .tree import CallOfRow, Group, Place, Segment, Trajectory


@dataclass
class Branching:
    """
    How a rollout branches.

    Args:
        rule ([`BranchRule`]): When it forks.
        entropy_window (`int`): Tokens at the start of a segment over which its entropy is read, k.
        vocab_size (`int`): V.
        fork_tries (`int`, *optional*, defaults to `1`): Times that a fork is sampled at most until its first segment
            is another than those of its node.
    """

    rule: BranchRule
    entropy_window: int
    vocab_size: int
    fork_tries: int = 1


@dataclass
class Limits:
    """
    Limits of a row.

    Args:
        completion (`int`): Tokens of a completion, tool results included.
        context (`int`): Tokens that the model can read, prompt included.
        tool_turns (`int`): Turns whose calls are answered, shared ones counted.
        cut_afterwards (`bool`): Let the engine sample up to `completion` tokens in every segment and cut what is too
            much, as TRL does, rather than stop each row at its own limit. Costs tokens that nobody sees; it is what
            makes GRPO the exact special case.
    """

    completion: int
    context: int
    tool_turns: int
    cut_afterwards: bool = False

    def left(self, trajectory: Trajectory) -> int:
        used = len(trajectory.completion_ids)
        return min(self.completion - used, self.context - len(trajectory.prompt_ids) - used)


@dataclass
class Wave:
    """Progress of a rollout after one wave."""

    index: int
    active: int
    calls: int
    forks: int


@dataclass
class RolloutHooks:
    """
    The side effects of a rollout.

    Args:
        sample (`Callable[[list[list[int]], list[int]], list[Sample]]`): Samples a segment after each context, no
            longer than each limit. Called with empty lists where this process has nothing to do and others have, and
            with the images of each context as a third argument where one has some.
        tools_of (`Callable[[Trajectory], Tools]`): The tools that a row may call, by name.
        submit (`Callable[[Trajectory, list[ToolCall]], list[Future]]`): Starts the calls of one turn.
        score (`Callable[[], None]`): Scores the rows of all groups, which have ended: sets `group.rewards`. Called for
            a rule that `needs_rewards`; collective.
        copy_state (`Callable[[Trajectory, Trajectory], bool]`): Gives a fork what a stateful environment of its parent
            held where it leaves. Returns whether that was possible; if not, the fork is not made.
        keep (`Callable[[list[list[int]]], None]`): Told, before `sample`, the contexts that are not in it but needed
            later, so that an engine keeps what it has cached of them: in the eager schedule those that are waiting for
            a tool, with a rule that expands those that have ended and may be forked from.
        anyone (`Callable[[bool], bool]`): Whether this is true on any process; collective.
        on_wave (`Callable[[Wave], None]`): Told of progress.
        on_end (`Callable[[list[Trajectory]], None]`): Told of rows that have ended, before the next segments are
            sampled. A fork may still leave one of them, with a rule that expands.
        timed (`Callable[[str], AbstractContextManager]`): Times a phase: `"sample"`, `"parse"` (calls started
            too), `"tools"` (results appended) or `"wait"` (for tools).
    """

    sample: Callable[..., list[Sample]]
    tools_of: Callable[[Trajectory], Tools]
    submit: Callable[[Trajectory, list[ToolCall]], list[Future]]
    score: Callable[[], None] = lambda: None
    copy_state: Callable[[Trajectory, Trajectory], bool] = lambda parent, fork: True
    keep: Callable[[list[list[int]]], None] = lambda contexts: None
    anyone: Callable[[bool], bool] = bool
    on_wave: Callable[[Wave], None] = lambda wave: None
    on_end: Callable[[list[Trajectory]], None] = lambda trajectories: None
    timed: Callable[[str], AbstractContextManager] = lambda phase: nullcontext()


@dataclass
class Step:
    """A trajectory's segment of the present wave, not yet appended; `turn` is what it says, once that is parsed."""

    trajectory: Trajectory
    sample: Sample
    segment: Segment
    turn: Turn = field(default_factory=lambda: Turn(None, []))
    futures: list[Future] = field(default_factory=list)


def cut_segment(trajectory: Trajectory, sample: Sample, branching: Branching, limits: Limits) -> Step:
    """A trajectory's new segment, cut to the tokens that the row has left, with its entropy."""
    left = max(limits.completion - len(trajectory.completion_ids), 0)
    sample = Sample(sample.ids[:left], sample.entropies[:left], sample.logprobs and sample.logprobs[:left])
    return Step(trajectory, sample, _read(trajectory, sample, branching))


def needed_later(
    groups: Sequence[Group], waiting: Sequence[Trajectory], pending: Sequence[Step], rule: BranchRule
) -> list[list[int]]:
    """Contexts that are not in the next call of the engine but in a later one."""
    contexts = [step.trajectory.prompt_ids + step.trajectory.completion_ids for step in pending]
    if rule.expands:
        busy = {trajectory.row for trajectory in waiting} | {step.trajectory.row for step in pending}
        contexts += [
            row.prompt_ids + row.completion_ids[: row.starts[-1].tokens]  # no fork leaves behind that
            for group in groups
            if group.budget
            for row in group.trajectories
            if row.row not in busy and row.starts
        ]
    return contexts


def start_row(
    group: Group,
    prompts: Sequence[list[int]],
    images: Sequence[Sequence[Any]],
    kind: Literal["initial", "supplement"],
) -> Trajectory:
    """A trajectory that starts from the prompt, in the group's next free row."""
    row = group.next_row
    trajectory = Trajectory(row, prompts[row], kind, images=list(images[row]))
    group.trajectories.append(trajectory)
    return trajectory


def _fork(group: Group, parent: Trajectory, place: Place) -> Trajectory:
    """A trajectory that leaves `parent` at `place`, in the group's next free row."""
    fork = parent.fork(group.next_row, place)
    group.trajectories.append(fork)
    return fork


def _fork_with_state(group: Group, parent: Trajectory, place: Place, hooks: RolloutHooks) -> Trajectory | None:
    """
    A trajectory that leaves `parent` at `place`; `None` where its state cannot be copied, and the row stays free.
    """
    fork = _fork(group, parent, place)
    if hooks.copy_state(parent, fork):
        return fork
    group.trajectories.pop()
    return None


def _read(trajectory: Trajectory, sample: Sample, branching: Branching) -> Segment:
    """The segment that was just sampled, with its entropy and, after a tool result, its gap to the baseline."""
    start = len(trajectory.completion_ids)
    entropy = mean_entropy(sample.entropies, branching.entropy_window)
    segment = Segment(start, start + len(sample.ids), entropy, logprob=segment_logprob(sample.logprobs))
    if start == 0:
        trajectory.baseline = entropy
    elif entropy is not None and trajectory.baseline is not None:
        segment.entropy_gap = entropy_gap(entropy, trajectory.baseline, branching.entropy_window, branching.vocab_size)
    return segment


def decide_forks(
    group: Group, steps: Sequence[Step], rule: BranchRule, hooks: RolloutHooks, rng: random.Random
) -> list[Trajectory]:
    """Decide on every tool result that a trajectory of `group` passed in this wave, and make the forks."""
    if group.num_initial == len(group.rows):  # nothing branches: GRPO
        return []
    asking, wanted = [], []
    for step in steps:
        segment = step.segment
        if segment.entropy_gap is None or step.trajectory.resamples:
            continue
        segment.branch_probability, count = decide(rule, segment, rng)
        if segment.branch_probability is None:
            continue
        segment.forks = 0
        if count:
            asking.append(step)
            wanted.append(count)

    priorities = [priority(rule, step.segment) for step in asking]
    forks = []
    for step, count in zip(asking, allocate_forks(priorities, wanted, group.budget, rng), strict=True):
        made = [_fork_with_state(group, step.trajectory, step.trajectory.end, hooks) for _ in range(count)]
        copied = [fork for fork in made if fork is not None]
        step.segment.forks = len(copied)
        forks += copied
    return forks


def fill_group(
    group: Group,
    prompts: Sequence[list[int]],
    images: Sequence[Sequence[Any]],
    rule: BranchRule,
    hooks: RolloutHooks,
    rng: random.Random,
) -> list[Trajectory]:
    """More rows for a group of which none is unfinished, from where the rule says."""
    nodes = expand(rule, group, rng)
    if not nodes:
        group.end()
        return []
    group.rounds += 1
    if rule.expands:  # each tool result is decided upon now; a segment that a fork re-sampled belongs to its parent's
        for row in group.trajectories:
            for segment in row.segments:
                if segment.start > (row.fork_token or 0):
                    segment.forks = segment.forks or 0
    started = []
    for node in nodes:
        parent, fork = group.trajectories[node.row], None
        if node.segment > 0:
            fork = _fork_with_state(group, parent, parent.starts[node.segment], hooks)
        if fork is None:
            started.append(start_row(group, prompts, images, "supplement"))
            continue
        parent.segments[node.segment].forks = (parent.segments[node.segment].forks or 0) + 1
        started.append(fork)
    return started


def append_segment(step: Step) -> None:
    trajectory, sample = step.trajectory, step.sample
    trajectory.resamples = False
    if sample.ids:
        trajectory.starts.append(trajectory.end)
        trajectory.segments.append(step.segment)
    trajectory.completion_ids += sample.ids
    trajectory.tool_mask += [1] * len(sample.ids)
    trajectory.logprobs += sample.logprobs or []
    if sample.ids:
        trajectory.turns.append(step.turn.message)


def start_calls(step: Step, limits: Limits, hooks: RolloutHooks) -> list[Future]:
    """Start the calls of this segment, unless the row has used up its turns."""
    if not step.turn.calls:
        return []
    if step.trajectory.tool_turns >= limits.tool_turns:
        step.trajectory.truncated = step.trajectory.out_of_turns = True
        return []
    step.trajectory.tool_turns += 1
    return hooks.submit(step.trajectory, step.turn.calls)


def refuse_calls_over_limit(calls: Sequence[ToolCall], trajectory: Trajectory, tools: Tools) -> None:
    """
    Mark the calls with which a row exceeds a tool's `max_calls_per_row`; the model reads why. Shared calls count.
    """
    made = Counter(own.call.name for own in trajectory.calls)
    for call in calls:
        made[call.name] += 1
        limit = tool_options(tools[call.name]).max_calls_per_row if call.name in tools else None
        if limit is not None and made[call.name] > limit and call.error is None:
            call.error = f"Tool `{call.name}` may be called {limit} times, and has been. Go on without it."


def append_results(step: Step, protocol: ToolProtocol, limits: Limits, ends_turn: Callable[[int], bool]) -> bool:
    """Append the results of this segment's calls; whether the row goes on."""
    trajectory = step.trajectory
    if not step.futures:
        ended = bool(trajectory.completion_ids) and ends_turn(trajectory.completion_ids[-1])
        trajectory.truncated = trajectory.truncated or not ended
        return False
    calls = [future.result() for future in step.futures]
    trajectory.calls += [CallOfRow(call) for call in calls]
    ids = protocol.result_ids(calls, step.sample.ids)
    used = len(trajectory.completion_ids) + len(ids)
    if used > limits.completion or used + len(trajectory.prompt_ids) >= limits.context:
        trajectory.truncated = True  # the result does not fit: the row ends with its call
        return False
    trajectory.completion_ids += ids
    trajectory.tool_mask += [0] * len(ids)
    if step.sample.logprobs is not None:
        trajectory.logprobs += [0.0] * len(ids)
    trajectory.turns += protocol.results_turn(calls, step.sample.ids)
    if any(images_of(call.result) for call in calls):
        trajectory.images += protocol.images(calls)
    return True


def has_room(trajectory: Trajectory, limits: Limits) -> bool:
    if limits.left(trajectory) > 0:
        return True
    trajectory.truncated = True
    return False
