"""The waves of a rollout: from prompts to full groups of trajectories (ARPO, section 3.1 and Algorithm 1,
https://huggingface.co/papers/2507.19849).

One wave: generate the next segment of every waiting trajectory, read its entropy, decide and make forks, parse the
segments and start the calls of each as soon as it is parsed, append their results. The eager schedule does not wait
for the slowest tool: its next wave holds the trajectories whose results are there. The rules of expansion let all rows
of a group end and then fork anywhere in its tree. The loop knows nothing of models, tokenizers or TRL: it is handed
functions that sample, parse and run, so that tests drive it with scripts. `continuous.py` does the same without waves.
"""

import gc
import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from contextlib import contextmanager
from functools import partial
from typing import Any

from ..protocols import ToolProtocol
from .distinct import distinct_samples
from .engines.base import Sample
from .steps import (
    Branching,
    Limits,
    RolloutHooks,
    Step,
    Wave,
    append_results,
    append_segment,
    cut_segment,
    decide_forks,
    fill_group,
    has_room,
    needed_later,
    start_calls,
    start_row,
)
from .tree import Group, Trajectory


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
    images: Sequence[Sequence[Any]] = (),
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
        images (`Sequence[Sequence[PIL.Image.Image]]`): Images of each prompt; empty where none has any.

    Returns:
        `list[Trajectory]`: the rows of all groups, in order.
    """
    images = images or [[] for _ in prompts]
    waiting = [start_row(group, prompts, images, "initial") for group in groups for _ in range(group.num_initial)]
    group_of = {row: group for group in groups for row in group.rows}
    wave = Wave(index=0, active=0, calls=0, forks=0)
    pending: list[Step] = []  # read and appended, but not answered

    while hooks.anyone(bool(waiting)):
        later: list[list[int]] = []
        if eager or branching.rule.expands or branching.fork_tries > 1:
            later = needed_later(groups, waiting, pending, branching.rule)
            hooks.keep(later)
        with collector_paused():
            contexts = [trajectory.prompt_ids + trajectory.completion_ids for trajectory in waiting]
        budgets = [limits.completion if limits.cut_afterwards else limits.left(trajectory) for trajectory in waiting]
        seen = [trajectory.images for trajectory in waiting]
        with hooks.timed("sample"):
            sample = partial(hooks.sample, images=seen) if any(seen) else hooks.sample
            samples = sample(contexts, budgets)
            if branching.fork_tries > 1:
                again = partial(_sample_again, hooks, contexts, budgets, seen, later)
                samples = distinct_samples(samples, waiting, group_of, again, hooks.anyone, branching.fork_tries)

        # The forks first, and what they copy of environments: then a call starts as soon as its row is parsed
        with collector_paused():
            steps = [cut_segment(*pair, branching, limits) for pair in zip(waiting, samples, strict=True)]
            steps_of: dict[int, list[Step]] = {id(group): [] for group in groups}
            for step in steps:
                steps_of[id(group_of[step.trajectory.row])].append(step)
            forks = [
                fork
                for group in groups
                for fork in decide_forks(group, steps_of[id(group)], branching.rule, hooks, rng)
            ]
            with hooks.timed("parse"):
                for step, context in zip(steps, contexts, strict=True):
                    step.turn = protocol.parse(step.sample.ids, context, hooks.tools_of(step.trajectory))
                    append_segment(step)
                    step.futures = start_calls(step, limits, hooks)
        wave = Wave(
            wave.index + 1,
            active=len(steps),
            calls=sum(len(step.futures) for step in steps),
            forks=sum(row.kind == "fork" for group in groups for row in group.trajectories),
        )
        hooks.on_wave(wave)

        waiting, pending = forks, pending + steps
        while True:
            if not eager:
                with hooks.timed("wait"):
                    wait([future for step in pending for future in step.futures])
            answered, pending = _split_answered(pending)
            with hooks.timed("tools"), collector_paused():
                waiting += [step.trajectory for step in answered if append_results(step, protocol, limits, ends_turn)]
            if not limits.cut_afterwards:
                waiting = [trajectory for trajectory in waiting if has_room(trajectory, limits)]
            going = {trajectory.row for trajectory in waiting}
            hooks.on_end([step.trajectory for step in answered if step.trajectory.row not in going])
            unfinished = {id(group_of[trajectory.row]) for trajectory in waiting}
            unfinished |= {id(group_of[step.trajectory.row]) for step in pending}
            if not branching.rule.needs_rewards or _scored(groups, bool(unfinished), hooks):
                for group in groups:
                    if group.budget and id(group) not in unfinished:
                        waiting += fill_group(group, prompts, images, branching.rule, hooks, rng)
            if not eager or hooks.anyone(bool(waiting)) or not hooks.anyone(bool(pending)):
                break
            with hooks.timed("wait"):
                running = [future for step in pending for future in step.futures if not future.done()]
                wait(running, return_when=FIRST_COMPLETED)
        waiting.sort(key=lambda trajectory: trajectory.row)

    return [trajectory for group in groups for trajectory in group.trajectories]


@contextmanager
def collector_paused() -> Iterator[None]:
    """
    Python's cyclic garbage collector does not run within. It would look through the tokens of all rows, millions of
    them, again and again while a wave is read, which makes thousands of objects and no cycles.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _scored(groups: Sequence[Group], unfinished: bool, hooks: RolloutHooks) -> bool:
    """Score the rows of all groups, once none is unfinished on any process and rows are missing on one."""
    if hooks.anyone(unfinished) or not hooks.anyone(any(group.budget for group in groups)):
        return False
    hooks.score()
    return True


def _sample_again(
    hooks: RolloutHooks,
    contexts: Sequence[list[int]],
    budgets: Sequence[int],
    seen: Sequence[Sequence[Any]],
    later: Sequence[list[int]],
    rows: list[int],
    samples: Sequence[Sample],
) -> list[Sample]:
    """Sample some rows of a wave anew; the engine keeps what the others go on from."""
    others = [index for index in range(len(contexts)) if index not in rows]
    hooks.keep([*later, *(contexts[index] + samples[index].ids for index in others)])
    sample = partial(hooks.sample, images=[seen[index] for index in rows]) if any(seen) else hooks.sample
    return sample([contexts[index] for index in rows], [budgets[index] for index in rows])


def _split_answered(pending: list[Step]) -> tuple[list[Step], list[Step]]:
    """The steps whose calls are all done (or that made none), and the others."""
    answered: list[Step] = []
    others: list[Step] = []
    for step in pending:
        (answered if all(future.done() for future in step.futures) else others).append(step)
    return answered, others
