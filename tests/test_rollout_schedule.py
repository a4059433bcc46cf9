"""The eager and the continuous schedule: rows whose tools are done do not wait for the others."""

import gc
import random
import runpy
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Event

import pytest
import tiny
from branching import branching
from test_rollout_properties import CALL, END, RandomProtocol
from test_trainer_options import build, check, records

from arpo_trl.config import ROLLOUT_SCHEDULES
from arpo_trl.rollout.continuous import Cut, run_continuous
from arpo_trl.rollout.engines import BatchStream, Sample
from arpo_trl.rollout.loop import run_waves
from arpo_trl.rollout.steps import Limits, RolloutHooks
from arpo_trl.rollout.tree import group_parts

SLOW, FAST = 10, 20  # the prompts of two groups
SECONDS = 20  # after which a test gives up


def run(
    sample,
    call,
    schedule,
    size=1,
    prompts=(SLOW, FAST),
    kept=None,
    branch_probability=1.0,
    rule="bernoulli",
    cut=None,
    **settings,
):
    """Run a rollout with `sample(contexts)` and tools that are threads running `call(trajectory)`."""
    with ThreadPoolExecutor(8) as pool:

        def work(trajectory, tool_call):
            call(trajectory)
            tool_call.result = "2"
            return tool_call

        def submit(trajectory, calls):
            return [pool.submit(work, trajectory, tool_call) for tool_call in calls]

        hooks = RolloutHooks(
            sample=lambda contexts, limits: sample(contexts),
            tools_of=lambda trajectory: {},
            submit=submit,
            keep=lambda contexts: kept.append(contexts) if kept is not None else None,
        )
        rollout = (
            group_parts(0, size * len(prompts), size, num_initial=1),
            [[prompt] for prompt in prompts for _ in range(size)],
            RandomProtocol(),
            hooks,
            branching(100, rule, branch_probability=branch_probability, **settings),
            Limits(completion=100, context=200, tool_turns=4),
            random.Random(0),
            END.__eq__,
        )
        if schedule == "continuous":
            return run_continuous(*rollout, BatchStream(hooks.sample, hooks.keep), cut)
        return run_waves(*rollout, eager=schedule == "eager")


def one_call_then_end(context):
    return Sample([5, END] if CALL in context else [5, CALL], [1.0, 1.0])


@pytest.mark.parametrize("schedule", ROLLOUT_SCHEDULES)
def test_a_fast_row_ends_before_a_slow_tool(schedule):
    fast_row_ended = Event()

    def sample(contexts):
        samples = [one_call_then_end(context) for context in contexts]
        if any(context[0] == FAST and CALL in context for context in contexts):
            fast_row_ended.set()
        return samples

    waited: list[bool] = []

    def call(trajectory):
        if trajectory.prompt_ids == [SLOW]:
            waited.append(fast_row_ended.wait(0.2 if schedule == "waves" else SECONDS))

    kept: list = []
    trajectories = run(sample, call, schedule, kept=kept)
    assert waited == [schedule != "waves"], "in waves the fast row waits until the slow tool gives up"
    assert [trajectory.completion_ids for trajectory in trajectories] == [[5, CALL, 0, 0, 5, END]] * 2
    # The slow row was waiting for its tool while the fast one generated
    assert kept == ([] if schedule == "waves" else [[], [[SLOW, 5, CALL]], []])


@pytest.mark.parametrize("schedule", ["eager", "continuous"])
def test_a_fork_generates_while_the_tool_of_its_parent_runs(schedule):
    fork_generated = Event()

    def sample(contexts):
        for context in contexts:
            if context == [FAST, 5, CALL, 0, 0] and sample.segments:
                fork_generated.set()
            sample.segments += context == [FAST, 5, CALL, 0, 0]
        # Two calls, then the end
        return [Sample([5, END] if context.count(CALL) == 2 else [5, CALL], [1.0, 1.0]) for context in contexts]

    sample.segments = 0
    waited = []

    def call(trajectory):
        if trajectory.kind == "initial" and len(trajectory.calls) == 1:
            waited.append(fork_generated.wait(SECONDS))

    trajectories = run(sample, call, schedule, size=2, prompts=(FAST,))
    assert waited == [True]
    assert [trajectory.kind for trajectory in trajectories] == ["initial", "fork"]


@pytest.mark.parametrize("schedule", ["eager", "continuous"])
def test_supplements_wait_for_rows_whose_tools_still_run(schedule):
    """Nothing forks, so the second row of a group is a supplement. The tool of the slow group's first row ends after
    the fast group is full."""
    fast_group_is_full = Event()
    order = []

    def sample(contexts):
        order.append([context[0] for context in contexts])
        if sum(contexts.count(FAST) for contexts in order) == 2:
            fast_group_is_full.set()
        return [
            one_call_then_end(context) if context[0] == SLOW else Sample([5, END], [1.0] * 2) for context in contexts
        ]

    trajectories = run(
        sample, lambda trajectory: fast_group_is_full.wait(SECONDS), schedule, size=2, branch_probability=0.0
    )
    assert [trajectory.kind for trajectory in trajectories] == ["initial", "supplement"] * 2
    # Both start; the fast supplement; the slow answer; the slow supplement, and its answer
    assert order == [[SLOW, FAST], [FAST], [SLOW], [SLOW], [SLOW]]


@pytest.mark.parametrize("schedule", ["waves", "continuous"])
@pytest.mark.parametrize("rounds, parents", [(1, {0}), (2, {0, 1, 2})])
def test_a_second_round_of_expansion_forks_from_rows_of_the_first(rounds, parents, schedule):
    """The root calls once and ends, a little unsure; its forks call a second time and are very unsure after that."""
    root = [FAST, 5, CALL, 0, 0]
    kept = []

    def sample(contexts):
        samples = []
        for context in contexts:
            if context == [FAST]:
                samples.append(Sample([5, CALL], [0.0] * 2))
            elif context == root:
                samples.append(Sample([6, CALL] if sample.root_ended else [6, END], [1.0] * 2))
                sample.root_ended = True
            else:
                samples.append(Sample([7, END], [50.0] * 2))
        return samples

    sample.root_ended = False
    trajectories = run(
        sample, lambda trajectory: None, schedule, size=5, prompts=(FAST,), kept=kept, rule="expansion",
        expansion_rounds=rounds,
    )  # fmt: skip
    assert [trajectory.kind for trajectory in trajectories] == ["initial"] + ["fork"] * 4
    assert [trajectory.parent for trajectory in trajectories[1:3]] == [0, 0]
    assert {trajectory.parent for trajectory in trajectories[1:]} == parents
    for trajectory in trajectories[1:]:
        assert trajectory.completion_ids == [5, CALL, 0, 0, 6, CALL, 0, 0, 7, END]
        assert [call.shared for call in trajectory.calls] == [True, trajectory.parent != 0]
    if rounds == 2:  # the engine is told to keep the row that has ended as long as rows are missing
        assert root in kept[2]
    assert kept[-1] == []


@pytest.mark.parametrize("schedule", ["eager", "continuous"])
@pytest.mark.parametrize("protocol, sharing", [("chat_template", True), ("tags", True), ("tags", False)])
def test_training(agent_dirs, tokenizer, tmp_path, protocol, sharing, schedule):
    trainer = build(
        agent_dirs, tokenizer, tmp_path, protocol, rollout_schedule=schedule, prefix_sharing=sharing, seed=1
    )
    trainer.train()
    check(trainer, tmp_path, groups=4)
    found = records(tmp_path)
    assert {"initial", "fork"} <= {record["kind"] for record in found}
    for record in found:
        for call in record["tool_calls"]:
            arguments = call["arguments"]
            assert call["error"] or call["result"] == str(tiny.add(**arguments))


class SlowStream(BatchStream):
    """Samples the rows of all prompts but one; those of that one are never done."""

    def __init__(self, sample, never):
        super().__init__(sample)
        self.never, self.running = never, []

    def start(self, context, limit, images=()):
        if context[0] == self.never:
            self.running.append(Future())
            return self.running[-1]
        return super().start(context, limit)


def cut_rollout(cut, prompts, hang=()):
    """One call a row, then the end. SLOW is never sampled, the tools of the rows in `hang` never answer."""

    def submit(trajectory, calls):
        future = Future()
        if trajectory.row not in hang:
            calls[0].result = "2"
            future.set_result(calls[0])
        submitted.append(future)
        return [future]

    submitted: list[Future] = []
    stream = SlowStream(lambda contexts, limits: [one_call_then_end(context) for context in contexts], SLOW)
    groups = group_parts(0, 2 * len(prompts), 2, num_initial=1)
    hooks = RolloutHooks(sample=lambda contexts, limits: [], tools_of=lambda trajectory: {}, submit=submit)
    rows = run_continuous(
        groups,
        [[prompt] for prompt in prompts for _ in range(2)],
        RandomProtocol(),
        hooks,
        branching(100, branch_probability=1.0),
        Limits(completion=100, context=200, tool_turns=4),
        random.Random(0),
        END.__eq__,
        stream,
        cut,
    )
    return rows, submitted


def test_the_deadline_ends_rows_where_they_are():
    rows, submitted = cut_rollout(Cut(seconds=0.3, token=END), [SLOW, FAST, 30], hang={4})
    # Never sampled, and the row that it left no time for: one token that is not the model's
    for row in rows[:2]:
        assert (row.completion_ids, row.tool_mask, row.logprobs) == ([END], [0], [0.0]) and not row.segments
    assert [row.completion_ids for row in rows[2:4]] == [[5, CALL, 0, 0, 5, END]] * 2
    # Its tool never answers: the row ends with the call, which is nobody's
    assert rows[4].completion_ids == [5, CALL] and rows[4].calls == []
    assert [row.kind for row in rows] == ["initial", "supplement", "initial", "fork", "initial", "supplement"]
    assert [row.truncated for row in rows] == [True, True, False, False, True, True]
    assert [future.cancelled() for future in submitted].count(True) == 1


def test_a_fraction_of_the_rows_ends_the_rollout():
    rows, _ = cut_rollout(Cut(fraction=0.8, token=END), [*range(20, 24), SLOW])  # 8 of 10 rows end
    assert [row.truncated for row in rows] == [False] * 8 + [True] * 2


def test_without_a_cut_every_row_is_waited_for():
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(cut_rollout, None, [FAST, 30])
        rows, _ = running.result(SECONDS)
    assert not any(row.truncated for row in rows) and len(rows) == 4


def test_training_goes_on_with_rows_that_the_deadline_left_empty(agent_dirs, tokenizer, tmp_path):
    trainer = build(agent_dirs, tokenizer, tmp_path, rollout_schedule="continuous", rollout_deadline=1e-9, max_steps=1)
    trainer.train()
    found = records(tmp_path)
    assert [record["row"] for record in found] == [0, 1, 2, 3] * 2
    assert all(record["truncated"] and record["tool_mask"] == [0] for record in found)
    # An evaluation measures what the model can do, and has no deadline
    trainer.evaluate(trainer.train_dataset.select(range(2)))
    assert all(row.segments for group in trainer._groups for row in group.trajectories)


def test_processes_that_do_not_wait_for_each_other_take_a_third_of_the_time_at_most():
    """The benchmark's 8 × 256 rows on its computed clock, so that it is the same on every machine."""
    benchmark = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "schedules.py"))
    waves, counts = benchmark["computed_waves"](8, 256)
    continuous, slowest, own_counts = benchmark["computed_continuous"](8, 256, tools=True)
    without, _, _ = benchmark["computed_continuous"](8, 256, tools=False)
    assert 0.9 < own_counts["tokens"] / counts["tokens"] < 1.1, "the same work in law"
    assert waves > 3 * continuous and continuous < 1.3 * max(slowest, without)


def test_a_call_starts_when_its_row_is_parsed_and_after_the_forks_were_copied():
    order = []

    class Protocol(RandomProtocol):
        def parse(self, ids, context, tools):
            order.append("parse")
            return super().parse(ids, context, tools)

    def submit(trajectory, calls):
        order.append("call")
        for tool_call in calls:
            tool_call.result = "2"
        futures = [Future() for _ in calls]
        for future, tool_call in zip(futures, calls, strict=True):
            future.set_result(tool_call)
        return futures

    def sample(contexts, limits):
        order.append("sample")
        return [Sample([5, END] if context.count(CALL) == 2 else [5, CALL], [1.0, 1.0]) for context in contexts]

    def copy_state(parent, fork):
        order.append("copy")
        return True

    run_waves(
        group_parts(0, 4, 4, num_initial=2),
        [[FAST]] * 4,
        Protocol(),
        RolloutHooks(sample, lambda trajectory: {}, submit, copy_state=copy_state),
        branching(100, "bernoulli", branch_probability=1.0),
        Limits(completion=100, context=200, tool_turns=4),
        random.Random(0),
        END.__eq__,
    )
    assert order[:5] == ["sample", "parse", "call", "parse", "call"]
    # The two forks leave where their parents' second segments begin
    assert order[5:12] == ["sample", "copy", "copy", "parse", "call", "parse", "call"]


@pytest.mark.parametrize("enabled", [True, False])
def test_the_collector_pauses_while_a_wave_is_read_and_goes_on(enabled):
    """It looks through whatever lists there are: the tokens of all rows."""
    running = []

    class Protocol(RandomProtocol):
        def parse(self, ids, context, tools):
            running.append(gc.isenabled())
            return super().parse(ids, context, tools)

    def sample(contexts, limits):
        running.append(gc.isenabled())
        return [Sample([5, END], [1.0, 1.0]) for _ in contexts]

    try:
        (gc.enable if enabled else gc.disable)()
        run_waves(
            group_parts(0, 2, 2, num_initial=2),
            [[FAST]] * 2,
            Protocol(),
            RolloutHooks(sample, lambda row: {}, list),
            branching(100, "bernoulli", branch_probability=1.0),
            Limits(completion=100, context=2_000, tool_turns=4),
            random.Random(0),
            END.__eq__,
        )
        assert running == [enabled, False, False] and gc.isenabled() == enabled
    finally:
        gc.enable()
