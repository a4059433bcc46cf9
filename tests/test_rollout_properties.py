"""What holds for every rollout, over random policies, tools and settings."""

import random
import threading
from concurrent.futures import Future

import pytest
from branching import branching as make_branching
from hypothesis import given, settings
from hypothesis import strategies as st

from arpo_trl.advantages import hard_advantages
from arpo_trl.config import ROLLOUT_SCHEDULES
from arpo_trl.execution.executor import ToolCall
from arpo_trl.protocols import Turn
from arpo_trl.rollout.continuous import Cut, run_continuous
from arpo_trl.rollout.engines import BatchStream, Sample
from arpo_trl.rollout.loop import Limits, RolloutHooks, run_waves
from arpo_trl.rollout.record import call_records, rollout_records
from arpo_trl.rollout.rules import BRANCH_RULES
from arpo_trl.rollout.tree import group_parts

END, CALL = 1, 2  # tokens; all others are text


class RandomProtocol:
    """A segment that ends with CALL calls the tool; a result is some 0 tokens."""

    schema_in_prompt, stop_strings = False, []

    def parse(self, ids, context, tools):
        return Turn(
            list(ids), [ToolCall("tool", {"context": tuple(context), "ids": tuple(ids)})] if ids[-1:] == [CALL] else []
        )

    def result_ids(self, calls, written=()):
        return [0] * int(calls[0].result)

    def images(self, calls):
        return []

    def results_turn(self, calls, written=()):
        return [self.result_ids(calls)]

    def completion(self, turns, conversational):
        return turns


def random_rollout(seed, groups, size, initial, branching, limits, offset=0, rows=None, schedule="waves", cut=None):
    rng = random.Random(seed)
    executed = []

    def sample(contexts, budgets):
        samples = []
        for budget in budgets:
            assert budget > 0
            ids = [rng.randint(3, 50) for _ in range(rng.randint(0, 8))] + [rng.choice([END, CALL])]
            ids = ids[:budget]
            samples.append(Sample(ids, [rng.random() for _ in ids], [-rng.random() for _ in ids]))
        return samples

    def submit(trajectory, calls):
        futures = []
        for call in calls:
            executed.append(call)
            call.result, future = str(rng.randint(1, 6)), Future()
            future.set_running_or_notify_cancel()
            if schedule != "waves":
                threading.Timer(rng.random() / 1000, future.set_result, [call]).start()
            else:
                future.set_result(call)
            futures.append(future)
        return futures

    parts = group_parts(offset, rows or groups * size, size, initial)
    prompts = [[100 + (offset + row) // size] for row in range(rows or groups * size)]
    hooks = RolloutHooks(sample=sample, tools_of=lambda trajectory: {}, submit=submit)
    settings_ = (parts, prompts, RandomProtocol(), hooks, branching, limits, random.Random(seed + 1), END.__eq__)
    if schedule == "continuous":
        trajectories = run_continuous(*settings_, BatchStream(sample), cut)
    else:
        trajectories = run_waves(*settings_, eager=schedule == "eager")
    return parts, trajectories, executed


@st.composite
def cases(draw):
    size = draw(st.integers(2, 10))
    return dict(
        seed=draw(st.integers(0, 10**6)),
        groups=draw(st.integers(1, 3)),
        size=size,
        initial=draw(st.integers(1, size)),
        branching=make_branching(
            vocab_size=100,
            branch_factor=draw(st.integers(1, 3)),
            entropy_window=draw(st.integers(1, 5)),
            branch_probability=draw(st.sampled_from([0.0, 0.5, 1.0])),
            # The rule that asks for rewards has a test of its own
            name=draw(st.sampled_from(sorted(name for name in BRANCH_RULES if not BRANCH_RULES[name].needs_rewards))),
            expansion_rounds=draw(st.integers(1, 3)),
        ),
        limits=Limits(
            completion=draw(st.integers(1, 60)), context=draw(st.integers(30, 80)), tool_turns=draw(st.integers(0, 6))
        ),
    )


@pytest.mark.parametrize("schedule", ROLLOUT_SCHEDULES)
@settings(max_examples=200, deadline=None)
@given(case=cases())
def test_invariants_of_a_rollout(schedule, case):
    groups, trajectories, executed = random_rollout(**case, schedule=schedule)
    size, limits = case["size"], case["limits"]
    assert [trajectory.row for trajectory in trajectories] == list(range(case["groups"] * size)), "M rows, in order"
    for group in groups:
        kinds = [trajectory.kind for trajectory in group.trajectories]
        assert kinds.count("initial") == case["initial"]
        assert sum(
            s.forks or 0 for t in group.trajectories for s in t.segments if s.start >= (t.fork_token or 0)
        ) == kinds.count("fork")
    own_calls = 0
    for trajectory in trajectories:
        length = len(trajectory.completion_ids)
        assert length == len(trajectory.tool_mask) == len(trajectory.logprobs)
        assert length <= limits.completion and length + len(trajectory.prompt_ids) <= limits.context
        assert trajectory.tool_turns <= limits.tool_turns
        sampled = [i for segment in trajectory.segments for i in range(segment.start, segment.end)]
        assert sum(trajectory.tool_mask) == len(sampled) and all(trajectory.tool_mask[i] for i in sampled)
        assert all(
            logprob == 0.0 for logprob, mask in zip(trajectory.logprobs, trajectory.tool_mask, strict=True) if not mask
        )
        assert trajectory.truncated == (trajectory.completion_ids[-1:] != [END])
        own_calls += sum(not call.shared for call in trajectory.calls)
        if trajectory.parent is None:
            assert trajectory.fork_token is None and not any(call.shared for call in trajectory.calls)
            continue
        parent, fork = trajectories[trajectory.parent], trajectory.fork_token
        assert parent.prompt_ids == trajectory.prompt_ids and parent.row < trajectory.row
        for field in ("completion_ids", "tool_mask", "logprobs"):
            assert getattr(parent, field)[:fork] == getattr(trajectory, field)[:fork]
        assert parent.tool_mask[fork - 1] == 0 and parent.tool_mask[fork] == 1, "the end of a tool result"
        shared = [own.call for own in trajectory.calls if own.shared]
        assert shared == [own.call for own in parent.calls][: len(shared)]
        assert trajectory.baseline == parent.baseline
        resampled = next(segment for segment in trajectory.segments if segment.start == fork)
        assert resampled.forks is None and resampled.branch_probability is None and resampled.entropy_gap is not None
    assert own_calls == len(executed) and len({id(call) for call in executed}) == len(executed)


@settings(max_examples=200, deadline=None)
@given(cases(), st.sampled_from([0.01, 0.3, 0.7, 0.95]))
def test_a_rollout_that_is_cut_has_whole_groups(case, fraction):
    groups, trajectories, executed = random_rollout(
        **case, schedule="continuous", cut=Cut(fraction=fraction, token=END)
    )
    assert [trajectory.row for trajectory in trajectories] == list(range(case["groups"] * case["size"]))
    for trajectory in trajectories:
        assert trajectory.completion_ids, "no row without a token"
        assert len(trajectory.completion_ids) == len(trajectory.tool_mask) == len(trajectory.logprobs)
        assert len(trajectory.completion_ids) <= case["limits"].completion
        sampled = [i for segment in trajectory.segments for i in range(segment.start, segment.end)]
        assert sum(trajectory.tool_mask) == len(sampled) and all(trajectory.tool_mask[i] for i in sampled)
        whole = trajectory.completion_ids[-1] == END and trajectory.tool_mask[-1] == 1
        assert trajectory.truncated == (not whole)
    own = [own.call for trajectory in trajectories for own in trajectory.calls if not own.shared]
    assert {id(call) for call in own} <= {id(call) for call in executed}
    assert rollout_records(0, groups, {}, [0.0] * len(trajectories), None)


@settings(max_examples=100, deadline=None)
@given(cases())
def test_a_seed_decides_everything(case):
    _, first, _ = random_rollout(**case)
    _, second, _ = random_rollout(**case)
    assert first == second


@settings(max_examples=100, deadline=None)
@given(cases())
def test_hard_attribution_agrees_with_the_tree(case):
    groups, trajectories, _ = random_rollout(**case)
    rng = random.Random(0)
    for group in groups:
        first = group.rows.start
        rows = group.trajectories
        advantages = [rng.gauss(0, 1) for _ in rows]
        parents = [None if row.parent is None else row.parent - first for row in rows]
        spans = hard_advantages(
            advantages, parents, [row.fork_token for row in rows], [len(row.completion_ids) for row in rows]
        )
        for row, row_spans in zip(rows, spans, strict=True):
            for span in row_spans:
                for position in range(span.start, span.end):
                    sharing = [i for i, other in enumerate(rows) if _shares(row, other, position, trajectories)]
                    mean = sum(advantages[i] for i in sharing) / len(sharing)
                    assert abs(span.advantage - mean) < 1e-9
            if all(row.row != other.parent for other in rows) and row.parent is None:
                assert row_spans == [(0, len(row.completion_ids), advantages[row.row - first])], "soft and hard agree"


def _owner(row, position, trajectories):
    while row.parent is not None and position < row.fork_token:
        row = trajectories[row.parent]
    return row.row


def _shares(row, other, position, trajectories):
    return position < len(other.completion_ids) and _owner(row, position, trajectories) == _owner(
        other, position, trajectories
    )


def test_the_parts_of_a_group_on_two_processes_fill_up_alone():
    settings_ = dict(
        groups=1, size=8, initial=4, branching=make_branching(100, branch_probability=1.0), limits=Limits(60, 80, 4)
    )
    for process in (0, 1):
        groups, trajectories, _ = random_rollout(seed=process, offset=4 * process, rows=4, **settings_)
        assert len(trajectories) == 4 and groups[0].num_initial == 2
        records = rollout_records(0, groups, {}, [0.0] * 4, None)
        assert [record["row"] for record in records] == list(range(4 * process, 4 * process + 4))
        parents = [record["parent"] for record in records if record["parent"] is not None]
        assert all(4 * process <= parent < 4 * process + 4 for parent in parents)
        assert all(call_records(trajectory) is not None for trajectory in trajectories)
