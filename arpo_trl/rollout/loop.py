"""The waves of a rollout: from prompts to full groups of trajectories (ARPO, section 3.1 and Algorithm 1,
https://huggingface.co/papers/2507.19849).

One wave: generate the next segment of every waiting trajectory, read its entropy, decide and make forks, run the tools,
append their results. The eager schedule does not wait for the slowest tool: its next wave holds the trajectories whose
results are there. The rules of expansion let all rows of a group end and then fork anywhere in its tree. The loop knows
nothing of models, tokenizers or TRL: it is handed functions that sample, parse and run, so that tests drive it with scripts.

What is not here: images in tool results.
"""

import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from statistics import fmean
from typing import Literal, NamedTuple

from ..execution.executor import ToolCall
from ..execution.options import tool_options
from ..protocols import ToolProtocol, Tools, Turn
from .entropy import (
    EXPANSION_RULES,
    allocate_forks,
    entropy_gap,
    expansion_weight,
    fork_probability,
    initial_share,
    mean_entropy,
    share_rows,
    wants_fork,
)
from .tree import CallOfRow, Group, Place, Segment, Trajectory


class Sample(NamedTuple):
    """What an engine sampled after one context.

    Args:
        ids (`list[int]`): Sampled tokens, the end-of-turn token included.
        entropies (`list[float]`): Entropy in nats of the distributions that the first `entropy_window` of them (at
            least) were sampled from.
        logprobs (`list[float]`, *optional*): Log-probability of each token; `None` where the engine gives none.
    """

    ids: list[int]
    entropies: list[float]
    logprobs: list[float] | None = None


@dataclass
class Branching:
    """The branching parameters of [`ARPOConfig`], and the size of the vocabulary."""

    vocab_size: int
    branch_factor: int = 1
    entropy_window: int = 20
    branch_probability: float = 0.5
    entropy_weight: float = 0.2
    branch_threshold: float = 0.5
    branch_rule: str = "bernoulli"
    expansion_rounds: int = 2

    @property
    def expands(self) -> bool:
        """Whether a group forks once all its rows have ended, rather than as they go."""
        return self.branch_rule in EXPANSION_RULES


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
        sample (`Callable[[list[list[int]], list[int]], list[Sample]]`): Samples a segment after each context, no longer
            than each limit. Called with empty lists where this process has nothing to do and others have.
        tools_of (`Callable[[Trajectory], Tools]`): The tools that a row may call, by name.
        submit (`Callable[[Trajectory, list[ToolCall]], list[Future]]`): Starts the calls of one turn.
        copy_state (`Callable[[Trajectory, Trajectory], bool]`): Copies what a stateful environment holds from a parent
            to its fork, before it is touched again. Returns whether that was possible; if not, the fork is not made.
        keep (`Callable[[list[list[int]]], None]`): Told, before `sample`, the contexts that are not in it but needed
            later, so that an engine keeps what it has cached of them: in the eager schedule those that are waiting for a
            tool, with a rule of expansion those that have ended and may be forked from.
        anyone (`Callable[[bool], bool]`): Whether this is true on any process; collective.
        on_wave (`Callable[[Wave], None]`): Told of progress.
    """

    sample: Callable[[list[list[int]], list[int]], list[Sample]]
    tools_of: Callable[[Trajectory], Tools]
    submit: Callable[[Trajectory, list[ToolCall]], list[Future]]
    copy_state: Callable[[Trajectory, Trajectory], bool] = lambda parent, fork: True
    keep: Callable[[list[list[int]]], None] = lambda contexts: None
    anyone: Callable[[bool], bool] = bool
    on_wave: Callable[[Wave], None] = lambda wave: None


@dataclass
class _Step:
    """A trajectory's segment of the present wave, read but not yet appended."""

    trajectory: Trajectory
    sample: Sample
    segment: Segment
    turn: Turn
    futures: list[Future] = field(default_factory=list)


def run_waves(
    groups: Sequence[Group],
    prompts: Sequence[list[int]],
    protocol: ToolProtocol,
    hooks: RolloutHooks,
    branching: Branching,
    limits: Limits,
    rng: random.Random,
    ends_turn: Callable[[int], bool],
    eager: bool = False,
) -> list[Trajectory]:
    """
    Fill every group.

    Args:
        groups (`Sequence[Group]`): Empty groups; their rows cover `range(len(prompts))`.
        prompts (`Sequence[list[int]]`): Prompt tokens of each row.
        protocol ([`ToolProtocol`]): How calls are written and results are read.
        hooks ([`RolloutHooks`]): What samples, runs tools and reports.
        branching ([`Branching`]): When to fork.
        limits ([`Limits`]): When a row ends before the model ends it.
        rng (`random.Random`): Decides on forks and breaks ties.
        ends_turn (`Callable[[int], bool]`): Whether a token ends the turn.
        eager (`bool`, *optional*, defaults to `False`): Go on with the rows whose tools are done rather than wait for
            all. Which rows meet in a wave then depends on how long tools take, so a seed does not repeat a rollout.
            Processes still take every wave together, and wait for each other's first result when none has any.

    Returns:
        `list[Trajectory]`: the rows of all groups, in order.
    """
    waiting = [_start(group, prompts, "initial") for group in groups for _ in range(group.num_initial)]
    group_of = {row: group for group in groups for row in group.rows}
    wave = Wave(index=0, active=0, calls=0, forks=0)
    pending: list[_Step] = []  # read and appended, but not answered

    while hooks.anyone(bool(waiting)):
        if eager or branching.expands:
            later = [step.trajectory.prompt_ids + step.trajectory.completion_ids for step in pending]
            if branching.expands:
                busy = {trajectory.row for trajectory in waiting} | {step.trajectory.row for step in pending}
                later += [
                    row.prompt_ids + row.completion_ids[: row.starts[-1].tokens]  # no fork leaves behind that
                    for group in groups
                    if group.budget
                    for row in group.trajectories
                    if row.row not in busy and row.starts
                ]
            hooks.keep(later)
        contexts = [trajectory.prompt_ids + trajectory.completion_ids for trajectory in waiting]
        budgets = [limits.completion if limits.cut_afterwards else limits.left(trajectory) for trajectory in waiting]
        samples = hooks.sample(contexts, budgets)

        steps = []
        steps_of: dict[int, list[_Step]] = {id(group): [] for group in groups}
        for trajectory, context, sample in zip(waiting, contexts, samples, strict=True):
            left = max(limits.completion - len(trajectory.completion_ids), 0)
            sample = Sample(sample.ids[:left], sample.entropies[:left], sample.logprobs and sample.logprobs[:left])
            turn = protocol.parse(sample.ids, context, hooks.tools_of(trajectory))
            steps.append(_Step(trajectory, sample, _read(trajectory, sample, branching), turn))
            steps_of[id(group_of[trajectory.row])].append(steps[-1])

        forks = []
        for group in groups:
            forks += _decide(group, steps_of[id(group)], branching, hooks, rng)

        for step in steps:
            _append(step)
            step.futures = _call(step, limits, hooks)
        wave = Wave(
            wave.index + 1,
            active=len(steps),
            calls=sum(len(step.futures) for step in steps),
            forks=sum(row.kind == "fork" for group in groups for row in group.trajectories),
        )
        hooks.on_wave(wave)

        waiting, pending = forks, pending + steps
        while True:
            answered, pending = _split_answered(pending) if eager else (pending, [])
            waiting += [step.trajectory for step in answered if _answer(step, protocol, limits, ends_turn)]
            if not limits.cut_afterwards:
                waiting = [trajectory for trajectory in waiting if _has_room(trajectory, limits)]
            unfinished = {id(group_of[trajectory.row]) for trajectory in waiting}
            unfinished |= {id(group_of[step.trajectory.row]) for step in pending}
            for group in groups:
                if group.budget and id(group) not in unfinished:
                    waiting += _fill(group, prompts, branching, rng)
            if not eager or hooks.anyone(bool(waiting)) or not hooks.anyone(bool(pending)):
                break
            running = [future for step in pending for future in step.futures if not future.done()]
            wait(running, return_when=FIRST_COMPLETED)
        waiting.sort(key=lambda trajectory: trajectory.row)

    return [trajectory for group in groups for trajectory in group.trajectories]


def _start(group: Group, prompts: Sequence[list[int]], kind: Literal["initial", "supplement"]) -> Trajectory:
    """A trajectory that starts from the prompt, in the group's next free row."""
    trajectory = Trajectory(group.next_row, list(prompts[group.next_row]), kind)
    group.trajectories.append(trajectory)
    return trajectory


def _fork(group: Group, parent: Trajectory, place: Place) -> Trajectory:
    """A trajectory that leaves `parent` at `place`, in the group's next free row."""
    fork = parent.fork(group.next_row, place)
    group.trajectories.append(fork)
    return fork


def _fork_with_state(group: Group, parent: Trajectory, hooks: RolloutHooks) -> Trajectory | None:
    """A trajectory that leaves `parent` where it is; `None` where its state cannot be copied, and the row stays free."""
    fork = _fork(group, parent, parent.end)
    if hooks.copy_state(parent, fork):
        return fork
    group.trajectories.pop()
    return None


def _read(trajectory: Trajectory, sample: Sample, branching: Branching) -> Segment:
    """The segment that was just sampled, with its entropy and, after a tool result, its gap to the baseline."""
    start = len(trajectory.completion_ids)
    entropy = mean_entropy(sample.entropies, branching.entropy_window)
    segment = Segment(start, start + len(sample.ids), entropy)
    if start == 0:
        trajectory.baseline = entropy
    elif entropy is not None and trajectory.baseline is not None:
        segment.entropy_gap = entropy_gap(entropy, trajectory.baseline, branching.entropy_window, branching.vocab_size)
    return segment


def _decide(
    group: Group, steps: Sequence[_Step], branching: Branching, hooks: RolloutHooks, rng: random.Random
) -> list[Trajectory]:
    """Decide on every tool result that a trajectory of `group` passed in this wave, and make the forks."""
    if group.num_initial == len(group.rows) or branching.expands:  # nothing branches (GRPO), or not yet
        return []
    asking = []
    for step in steps:
        if step.segment.entropy_gap is None or step.trajectory.resamples:
            continue
        probability = branching.branch_probability
        if branching.branch_rule != "random":
            probability = fork_probability(step.segment.entropy_gap, probability, branching.entropy_weight)
        step.segment.branch_probability = probability
        step.segment.forks = 0
        if wants_fork(branching.branch_rule, probability, branching.branch_threshold, rng):
            asking.append(step)

    # The control ignores entropy here too: all gaps tie, and ties are broken at random.
    gaps = [0.0 if branching.branch_rule == "random" else step.segment.entropy_gap or 0.0 for step in asking]
    forks = []
    for step, count in zip(asking, allocate_forks(gaps, branching.branch_factor, group.budget, rng), strict=True):
        made = [_fork_with_state(group, step.trajectory, hooks) for _ in range(count)]
        own = [fork for fork in made if fork is not None]
        step.segment.forks = len(own)
        forks += own
    return forks


def _fill(group: Group, prompts: Sequence[list[int]], branching: Branching, rng: random.Random) -> list[Trajectory]:
    """More rows for a group of which none is unfinished: from the prompt or, with a rule of expansion, from its tree."""
    if not branching.expands:
        return [_start(group, prompts, "supplement") for _ in range(group.budget)]
    rows = math.ceil(group.budget / max(branching.expansion_rounds - group.rounds, 1))
    group.rounds += 1
    nodes = _nodes(group)
    if branching.branch_rule == "random_expansion":
        drawn = Counter(rng.choices(range(len(nodes)), k=rows))
        granted = [drawn[node] for node in range(len(nodes))]
    else:
        weights = []
        for sampled in nodes.values():
            entropies = [entropy for entropy, _ in sampled if entropy is not None]  # an engine may not tell
            weights.append(expansion_weight(fmean(entropies or [0.0]), fmean(calls for _, calls in sampled)))
        granted = share_rows(weights, [len(sampled) for sampled in nodes.values()], rows, rng)
    started = []
    for (row, index), count in zip(nodes, granted, strict=True):
        if index == 0:
            started += [_start(group, prompts, "supplement") for _ in range(count)]
            continue
        parent = group.trajectories[row - group.rows.start]
        parent.segments[index].forks = (parent.segments[index].forks or 0) + count
        started += [_fork(group, parent, parent.starts[index]) for _ in range(count)]
    return started


def _nodes(group: Group) -> dict[tuple[int, int], list[tuple[float | None, int]]]:
    """
    Where a finished group can be expanded, and what came of each segment that was sampled there.

    Returns:
        `dict[tuple[int, int], list[tuple[float | None, int]]]`: the segment's entropy and the calls that its row went on
        to make, by row and index of the segment that was sampled there first. The prompt is index 0 of the group's first
        row.
    """
    prompt = group.rows.start, 0
    nodes: dict[tuple[int, int], list[tuple[float | None, int]]] = {prompt: []}
    for trajectory in group.trajectories:
        for index, (segment, place) in enumerate(zip(trajectory.segments, trajectory.starts, strict=True)):
            if segment.start < (trajectory.fork_token or 0):
                continue  # the parent's
            node = trajectory.row, index
            if index == 0:
                node = prompt
            elif trajectory.parent is not None and segment.start == trajectory.fork_token:
                node = trajectory.parent, index
            nodes.setdefault(node, []).append((segment.entropy, len(trajectory.calls) - place.calls))
    nodes[prompt] = nodes[prompt] or [(None, 0)]  # no row has sampled anything
    return nodes


def _append(step: _Step) -> None:
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


def _call(step: _Step, limits: Limits, hooks: RolloutHooks) -> list[Future]:
    """Start the calls of this segment, unless the row has used up its turns."""
    if not step.turn.calls:
        return []
    if step.trajectory.tool_turns >= limits.tool_turns:
        step.trajectory.truncated = True
        return []
    step.trajectory.tool_turns += 1
    return hooks.submit(step.trajectory, step.turn.calls)


def refuse_calls_over_limit(calls: Sequence[ToolCall], trajectory: Trajectory, tools: Tools) -> None:
    """Mark the calls with which a row exceeds a tool's `max_calls_per_row`; the model reads why. Shared calls count."""
    made = Counter(own.call.name for own in trajectory.calls)
    for call in calls:
        made[call.name] += 1
        limit = tool_options(tools[call.name]).max_calls_per_row if call.name in tools else None
        if limit is not None and made[call.name] > limit and call.error is None:
            call.error = f"Tool `{call.name}` may be called {limit} times, and has been. Go on without it."


def _answer(step: _Step, protocol: ToolProtocol, limits: Limits, ends_turn: Callable[[int], bool]) -> bool:
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
    return True


def _split_answered(pending: list[_Step]) -> tuple[list[_Step], list[_Step]]:
    """The steps whose calls are all done (or that made none), and the others."""
    answered: list[_Step] = []
    others: list[_Step] = []
    for step in pending:
        (answered if all(future.done() for future in step.futures) else others).append(step)
    return answered, others


def _has_room(trajectory: Trajectory, limits: Limits) -> bool:
    if limits.left(trajectory) > 0:
        return True
    trajectory.truncated = True
    return False


def group_parts(first: int, count: int, group_size: int, num_initial: int) -> list[Group]:
    """
    The groups, or parts of groups, that a process holds.

    Args:
        first (`int`): Place of the process's first row among the rows of all processes.
        count (`int`): Rows of the process.
        group_size (`int`): M.
        num_initial (`int`): N; each part gets its share, at least 1.
    """
    groups, row = [], first
    while row < first + count:
        start = row % group_size
        stop = min(group_size, start + first + count - row)
        share = min(initial_share(start, stop, group_size, num_initial), stop - start)
        groups.append(Group(range(row - first, row - first + stop - start), share, group_size, first_row=start))
        row += stop - start
    return groups
