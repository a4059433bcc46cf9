"""Rows share the executions of a deterministic environment, and forks find the environment as it was; nothing else
changes by it."""

import random
import threading
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from branching import branching as make_branching
from hypothesis import given, settings
from hypothesis import strategies as st
from test_environments import Desk, train
from test_merging import SmallWorld, kinds_of
from test_rollout_properties import CALL, END, cases
from test_trainer_grpo_equivalence import run
from test_trainer_options import build, records

from arpo_trl import ARPOConfig, ARPOTrainer
from arpo_trl.rollout.engines import Sample
from arpo_trl.rollout.environments import RowTools, is_deterministic
from arpo_trl.rollout.loop import Limits, RolloutHooks, run_waves
from arpo_trl.rollout.record import call_kind
from arpo_trl.rollout.tree import group_parts
from arpo_trl.tools import ToolExecutor


class Maze:
    """Answers by everything that was done in it."""

    deterministic = False
    world: "SimpleNamespace"  # what all mazes of a test did
    copies_fail = False

    def __init__(self):
        self.steps: list = []
        self.open = True

    def look_up(self, query: int) -> str:
        assert self.open
        self.steps.append(query)
        with self.world.lock:
            self.world.executed.append(tuple(self.steps))
        if sum(self.steps) % 7 in self.world.failing:
            raise ValueError("a wall")
        return "x" * (sum(self.steps) % 4 + 1) + str(self.steps)

    def fork(self):
        if self.copies_fail:
            raise RuntimeError("no copy")
        twin = type(self)()
        twin.steps = list(self.steps)
        self.world.copies.append(twin)
        return twin

    def close(self):
        assert self.open
        self.open = False


class SureMaze(Maze):
    deterministic = True


class UniqueMaze(SureMaze):
    copies_fail = True


def maze_rollout(kind, seed, groups, size, initial, branching, limits, eager=False, failing=(), kept_states=1000):
    rng = random.Random(seed)
    kind.world = SimpleNamespace(lock=threading.Lock(), executed=[], copies=[], failing=failing)

    def sample(contexts, budgets):
        samples = []
        for budget in budgets:
            ids = [rng.randint(3, 50) for _ in range(rng.randint(0, 2))] + [rng.choice([END, CALL, CALL, CALL])]
            samples.append(Sample(ids[:budget], [rng.random() for _ in ids[:budget]]))
        return samples

    parts = group_parts(0, groups * size, size, initial)
    mazes = [kind() for _ in range(groups * size)]
    trainer = SimpleNamespace(
        environment_factories=None,
        environments=list(mazes),
        tools=[mazes[0].look_up],
        _sync_tool_dicts=[{"look_up": maze.look_up} for maze in mazes],
        _async_tool_dicts=[{} for _ in mazes],
    )
    prompts = [[100 + row // size] for row in range(groups * size)]
    most_kept = 0
    with ToolExecutor() as executor:
        row_tools = RowTools(trainer, executor, forks=True, kept_states=kept_states if branching.rule.expands else 0)
        row_tools.begin(parts)

        def on_wave(wave):
            nonlocal most_kept
            row_tools.next_wave()
            most_kept = max(most_kept, len(row_tools._states._keeping))

        hooks = RolloutHooks(
            sample=sample,
            tools_of=row_tools.of,
            submit=row_tools.submit,
            copy_state=row_tools.copy,
            on_wave=on_wave,
        )
        rows = run_waves(
            parts, prompts, SmallWorld(), hooks, branching, limits, random.Random(seed + 1), END.__eq__, eager
        )
        row_tools.settle()
        used = trainer.environments
        assert len({id(maze) for maze in used}) == len(used), "each row has one of its own"
        assert all(maze.open for maze in used)
        for row, maze in zip(rows, used, strict=True):
            assert maze.steps == [own.call.arguments["query"] for own in row.calls]
        assert len(row_tools._copies) == sum(maze not in mazes for maze in used), "no other copy is held"
        row_tools.end()
    assert not any(maze.open for maze in kind.world.copies) and all(maze.open for maze in mazes)
    return SimpleNamespace(
        groups=parts, rows=rows, executed=Counter(kind.world.executed), copies=kind.world.copies, most_kept=most_kept
    )


def told(row):
    names = ("completion_ids", "tool_mask", "kind", "parent", "fork_token", "turns", "truncated", "tool_turns")
    calls = [(own.call.name, own.call.arguments, own.call.result, own.call.error, own.shared) for own in row.calls]
    return [getattr(row, name) for name in names], row.segments, calls


@pytest.mark.parametrize("kind", [SureMaze, UniqueMaze], ids=["copied", "repeated"])
@settings(max_examples=60, deadline=None)
@given(case=cases(), failing=st.sets(st.integers(0, 6), max_size=2))
def test_rollouts_are_those_without_sharing(kind, case, failing):
    if kind is UniqueMaze:  # what cannot be copied cannot fork either
        case["branching"] = make_branching(100, "bernoulli", branch_probability=0.0, entropy_weight=0.0)
    plain, shared = (maze_rollout(each, **case, failing=failing) for each in (Maze, kind))
    assert list(map(told, plain.rows)) == list(map(told, shared.rows))
    for rollout in (plain, shared):
        assert rollout.executed.total() == sum(kinds_of(group)["executed"] for group in rollout.groups)
    assert shared.executed.total() <= plain.executed.total()


@pytest.mark.parametrize("eager", [False, True])
@settings(max_examples=40, deadline=None)
@given(case=cases())
def test_what_happens_in_any_schedule(eager, case):
    """The asserts of `maze_rollout` itself: siblings never meet, and every copy is closed once."""
    rollout = maze_rollout(SureMaze, **case, eager=eager)
    assert rollout.executed.total() == sum(kinds_of(group)["executed"] for group in rollout.groups)


@settings(max_examples=40, deadline=None)
@given(case=cases())
def test_rows_that_start_together_execute_each_history_of_turns_once(case):
    case["initial"] = case["size"]
    rollout = maze_rollout(SureMaze, **case)
    histories = 0
    for group in rollout.groups:
        seen = set()
        for row in group.trajectories:
            queries = [own.call.arguments["query"] for own in row.calls]
            # A turn ends where a segment does: its calls stand before the start of the next one
            ends = [place.calls for place in row.starts[1:]] + [len(queries)]
            turns = [tuple(queries[start:end]) for start, end in zip([0, *ends], ends, strict=False) if end > start]
            seen |= {tuple(turns[:number]) for number in range(1, len(turns) + 1)}
        histories += sum(len(history[-1]) for history in seen)
    assert rollout.executed.total() == histories


LIMITS = Limits(completion=60, context=80, tool_turns=6)


def test_a_bound_on_copies_costs_forks_and_nothing_else(caplog):
    case = dict(seed=3, groups=2, size=10, initial=2, branching=make_branching(100, "random_expansion"), limits=LIMITS)
    free, bound = (maze_rollout(Maze, **case, kept_states=limit) for limit in (1000, 2))
    assert free.most_kept > 2 and bound.most_kept == 2
    assert "More than `max_environment_states` (2) copies" in caplog.text
    forks = [sum(row.kind == "fork" for row in rollout.rows) for rollout in (free, bound)]
    assert forks[0] > forks[1] and len(bound.rows) == 20


@pytest.mark.parametrize("rule", ["expansion", "random_expansion"])
def test_a_rule_of_expansion_forks_from_environments_as_they_were(rule):
    forks = 0
    for seed in range(5):
        case = dict(seed=seed, groups=2, size=8, initial=2, limits=LIMITS)
        rollout = maze_rollout(Maze, **case, branching=make_branching(100, rule))
        forks += sum(row.kind == "fork" for row in rollout.rows)
    assert forks > 10


def test_what_a_class_says():
    assert not is_deterministic(Desk()) and is_deterministic(SureMaze())

    class Odd(Desk):
        deterministic = "yes"

    with pytest.raises(TypeError, match="`Odd.deterministic` is 'yes'; set it to True"):
        is_deterministic(Odd())


# In the trainer


class Tally(Desk):
    """Counts what it executes, and what it says depends on how often it was asked."""

    executed = 0

    def __init__(self):
        self.added: list = []

    def reset(self, **kwargs):
        self.added = []

    def add(self, a: int, b: int) -> int:
        type(self).executed += 1
        self.added.append((a, b))
        return a + b + len(self.added) - 1

    add.__doc__ = Desk.add.__doc__

    def fork(self):
        twin = type(self)()
        twin.added = list(self.added)
        return twin

    def get_reward(self):
        return float(len(self.added))


@pytest.mark.parametrize("rule", ["random", "expansion"])
@pytest.mark.parametrize("initial", [4, 2], ids=["GRPO", "ARPO"])
def test_a_training_run_is_that_without_sharing_to_the_bit(agent_dirs, tokenizer, tmp_path, initial, rule):
    runs, executed, counted = {}, {}, {}
    for says in (False, True):

        class Counted(Tally):
            deterministic = says

        class Trainer(ARPOTrainer):
            def __init__(self, tools, **kwargs):
                super().__init__(environment_factory=Counted, **kwargs)

        runs[says] = run(
            *(Trainer, ARPOConfig, agent_dirs["chat_template"], tokenizer, str(tmp_path / str(says))),
            num_initial_generations=initial,
            branch_rule=rule,
            log_rollouts=True,
            temperature=0.5,
        )
        executed[says] = Counted.executed
        rows = records(tmp_path / str(says))
        counted[says] = sum(call_kind(call) == "executed" for row in rows for call in row["tool_calls"])
    for key in ("completions", "rewards", "losses", "weights"):
        for left, right in zip(runs[False][key], runs[True][key], strict=True):
            assert torch.equal(left, right), key
    assert executed == counted and 0 < executed[True] < executed[False]


def test_a_rule_of_expansion_trains_with_an_environment(agent_dirs, tokenizer, tmp_path):
    train(agent_dirs, tokenizer, tmp_path, Tally, branch_rule="random_expansion", max_environment_states=4)
    rows = records(tmp_path)
    assert any(row["kind"] == "fork" for row in rows)
    for row in rows:
        assert row["rewards"]["Tally"] == len([call for call in row["tool_calls"] if not call["refused"]])
    assert Desk.log.count("close") > 0


def test_an_environment_that_says_so_and_cannot_be_copied_is_refused(agent_dirs, tokenizer, tmp_path):
    class Locked(Desk):
        deterministic = True

        def fork(self):
            raise RuntimeError("locked")

    with pytest.raises(RuntimeError, match="locked"):
        build(agent_dirs, tokenizer, tmp_path, tools=(), environment_factory=Locked, num_initial_generations=4)
