"""Equal calls of a group are executed once, and nothing else changes by it."""

import random
import threading
from collections import Counter, defaultdict
from concurrent.futures import Future
from types import SimpleNamespace

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import plan, rollout
from test_rollout_properties import CALL, END, RandomProtocol, cases
from test_trainer_grpo_equivalence import run
from test_trainer_options import build, records

from arpo_trl import ARPOConfig, ARPOTrainer
from arpo_trl.execution.arguments import canonical_json
from arpo_trl.protocols import Turn
from arpo_trl.rollout.engines import Sample
from arpo_trl.rollout.environments import RowTools
from arpo_trl.rollout.loop import run_waves
from arpo_trl.rollout.merging import CallMerger
from arpo_trl.rollout.metrics import CALL_KINDS, rollout_metrics, rollout_sums, slowest_calls
from arpo_trl.rollout.record import call_kind
from arpo_trl.rollout.steps import RolloutHooks
from arpo_trl.rollout.tree import CallOfRow, Group, Trajectory, group_parts
from arpo_trl.tools import ToolCall, ToolExecutor, tool, tool_options
from arpo_trl.tools.python import PythonSandbox
from arpo_trl.tools.python.remote import RemoteSandbox
from arpo_trl.tools.search import BM25Search
from arpo_trl.tools.search.dense import DenseSearch, HybridSearch
from arpo_trl.tools.search.http import RetrieveClient, SerperSearch
from arpo_trl.tools.search.replay import ReplaySearch
from arpo_trl.tools.web.browse import Browser


def distinct_and_executed(rows):
    """Of each group: the distinct calls (tool, arguments) that were not refused, and how many calls were executed."""
    groups = defaultdict(list)
    for row in rows:
        groups[row["step"], row["prompt_index"]] += row["tool_calls"]
    for calls in groups.values():
        yield (
            len({(call["name"], canonical_json(call["arguments"])) for call in calls if not call["refused"]}),
            sum(call_kind(call) == "executed" for call in calls),
        )


# Which tools say so


@pytest.mark.parametrize("source", [BM25Search, DenseSearch, HybridSearch, ReplaySearch, RetrieveClient, SerperSearch])
def test_every_search_says_that_it_is_deterministic(source):
    assert tool_options(source.search).deterministic


def test_python_and_browse_say_so_and_a_function_does_not_unless_it_is_told():
    assert tool_options(PythonSandbox.python).deterministic and tool_options(RemoteSandbox.python).deterministic
    assert tool_options(Browser.browse).deterministic
    assert not tool_options(tiny.add).deterministic and not tool_options(tool(tiny.add, timeout=1)).deterministic
    assert tool_options(tool(tiny.add, deterministic=True)).deterministic
    assert tool_options(tool(deterministic=True)(tiny.add)).deterministic


def test_what_a_tool_says_is_kept_by_other_options_and_can_be_taken_back(tmp_path):
    index = BM25Search(["one", "two"], top_k=1)
    limited = tool(index.search, max_calls_per_row=5)
    assert tool_options(limited).deterministic and limited("two") == "Page 1: two"
    assert tool_options(limited).max_calls_per_row == 5
    assert not tool_options(tool(index.search, deterministic=False)).deterministic
    assert tool_options(tool(tiny.add, cache=tmp_path / "c.sqlite")).deterministic, "a cache has the same condition"


def test_contradictions_are_refused(tmp_path):
    with pytest.raises(ValueError, match="`deterministic=False` contradicts `cache`"):
        tool(tiny.add, cache=tmp_path / "c.sqlite", deterministic=False)
    with pytest.raises(ValueError, match="`deterministic` must be True, False or None, not 'yes'"):
        tool(tiny.add, deterministic="yes")


# One execution, by hand


class Handmade:
    """Executes nothing until it is told the answer."""

    def __init__(self):
        self.calls: list[ToolCall] = []
        self.futures: list[Future] = []

    def submit(self, call, function):
        self.calls.append(call)
        self.futures.append(Future())
        return self.futures[-1]

    def answer(self, index, result=None, error=None):
        self.calls[index].result, self.calls[index].error = result or error, error
        self.calls[index].seconds = 2.0
        self.futures[index].set_result(self.calls[index])


@tool(deterministic=True)
def look_up(key, many=3):
    """Look up."""


def call(**arguments):
    return ToolCall("look_up", arguments)


@pytest.fixture
def handmade():
    return Handmade()


def test_a_call_joins_one_in_flight_and_one_that_was_answered(handmade):
    merger = CallMerger(handmade.submit)
    first, second = (merger.submit(0, call(key="a"), look_up) for _ in range(2))
    assert len(handmade.calls) == 1 and not second.done()
    handmade.answer(0, "A")
    merger.next_wave()
    third = merger.submit(0, call(key="a"), look_up)
    assert len(handmade.calls) == 1
    assert [future.result().result for future in (first, second, third)] == ["A"] * 3
    assert [future.result().merged for future in (first, second, third)] == [False, True, True]
    assert [future.result().seconds for future in (first, second, third)] == [2.0, 0.0, 0.0]
    assert len({id(future.result()) for future in (first, second, third)}) == 3, "each row has a call of its own"


def test_what_makes_two_calls_equal(handmade):
    merger = CallMerger(handmade.submit)
    merger.submit(0, ToolCall("look_up", {"key": {"x": 1, "y": 2}}), look_up)
    merger.submit(0, ToolCall("look_up", {"many": 3, "key": {"y": 2, "x": 1}}), look_up)  # the default, another order
    assert len(handmade.calls) == 1
    for key in (1, 1.0, True, "1", None, [1], {"1": 1}):
        merger.submit(0, call(key=key), look_up)
    assert len(handmade.calls) == 8, "values that Python holds for equal may be answered differently"


def test_calls_that_are_never_merged(handmade):
    merger = CallMerger(handmade.submit)
    for _ in range(2):
        merger.submit(0, ToolCall("add", {"a": 1, "b": 2}), tiny.add)  # does not say that it is deterministic
        merger.submit(0, ToolCall("nowhere", {}), None)
        merger.submit(0, ToolCall("look_up", {"key": "a"}, error="over its limit"), look_up)
        merger.submit(0, call(key={1, 2}), look_up)  # no JSON
    assert len(handmade.calls) == 8
    merger.submit(0, call(key="a"), look_up)
    merger.submit(1, call(key="a"), look_up)
    assert len(handmade.calls) == 10, "groups have nothing to do with each other"
    merger.clear()
    merger.submit(0, call(key="a"), look_up)
    assert len(handmade.calls) == 11


def test_an_error_is_shared_within_a_wave_and_not_later(handmade):
    merger = CallMerger(handmade.submit)
    first = merger.submit(0, call(key="a"), look_up)
    handmade.answer(0, error="TimeoutError: no answer")
    second = merger.submit(0, call(key="a"), look_up)  # of the same wave, however fast the error was
    assert len(handmade.calls) == 1
    assert (second.result().error, second.result().merged) == (first.result().error, True)
    merger.next_wave()
    third = merger.submit(0, call(key="a"), look_up)
    assert len(handmade.calls) == 2
    merger.next_wave()
    fourth = merger.submit(0, call(key="a"), look_up)  # the third is still running
    assert len(handmade.calls) == 2
    handmade.answer(1, "A")
    assert (third.result().result, fourth.result().result) == ("A", "A")


def test_an_exception_that_is_not_the_tools_reaches_every_row(handmade):
    merger = CallMerger(handmade.submit)
    merger.submit(0, call(key="a"), look_up)
    joined = merger.submit(0, call(key="a"), look_up)
    handmade.futures[0].set_exception(ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        joined.result()
    merger.next_wave()
    merger.submit(0, call(key="a"), look_up)
    assert len(handmade.calls) == 2


# In rollouts


class Search:
    """A deterministic tool that counts its calls and fails at the first so many."""

    def __init__(self, failures=0):
        self.queries = []
        self.failures = failures

    @tool(deterministic=True, max_calls_per_row=2)
    def s(self, query: str) -> str:
        """
        Search.

        Args:
            query: What to look for.
        """
        self.queries.append(query)
        if len(self.queries) <= self.failures:
            raise RuntimeError("no network")
        return "found"


def test_rows_of_a_group_share_one_execution(tmp_path):
    search = Search()
    plans = [plan("A<s>q</s>a<s>r</s>!"), plan("B<s>r</s>b<s>q</s>!"), plan("C<s>q</s>c")]
    rows, trainer, _ = rollout(tmp_path, plans, [search.s], 3, 3)
    assert sorted(search.queries) == ["q", "r"]
    kinds = [[call_kind(call) for call in row["tool_calls"]] for row in rows]
    assert kinds == [["executed", "merged"], ["executed", "merged"], ["merged"]]
    assert all(call["result"] == "found" for row in rows for call in row["tool_calls"])
    log = trainer.state.log_history[0]
    counts = {"made": 5, "shared": 0, "merged": 3, "cached": 0, "refused": 0, "executed": 2}
    assert {name: log[f"tools/calls_{name}"] for name in counts} == counts
    assert (log["tools/s/calls"], log["tools/s/merged"], log["tools/s/executed"]) == (5, 3, 2)
    assert log["tools/call_frequency"] == pytest.approx(5 / 3), "as TRL counts them: what the rows did"


def test_an_error_costs_the_rows_of_its_wave_and_is_not_remembered(tmp_path):
    search = Search(failures=1)
    plans = [plan("A<s>q</s>a<s>q</s>!"), plan("B<s>q</s>b<s>q</s>!")]
    rows, trainer, _ = rollout(tmp_path, plans, [search.s], 2, 2)
    assert search.queries == ["q", "q"]
    for row in rows:
        assert [call["error"] for call in row["tool_calls"]] == ["RuntimeError: no network", None]
        assert row["text"].count("no network") == 1 and "found" in row["text"]
    assert trainer.state.log_history[0]["tools/s/failures"] == 2


def test_merged_calls_count_against_a_rows_limits(tmp_path):
    search = Search()
    text = plan("A<s>q</s>a<s>q</s>b<s>q</s>!")
    rows, trainer, _ = rollout(tmp_path, [text], [search.s], 2, 2)
    assert search.queries == ["q"]
    for row in rows:
        assert "may be called 2 times" in row["tool_calls"][2]["error"]
    assert [call_kind(call) for call in rows[1]["tool_calls"]] == ["merged", "merged", "refused"]
    log = trainer.state.log_history[0]
    assert (log["tools/calls_made"], log["tools/calls_refused"], log["tools/calls_executed"]) == (6, 2, 1)


def test_a_cache_answers_once_for_the_group_and_reaches_over_groups(tmp_path):
    search = Search()
    cached = tool(search.s, cache=tmp_path / "cache.sqlite")
    settings_ = {"per_device_train_batch_size": 2, "steps_per_generation": 2}
    _, trainer, _ = rollout(tmp_path, [plan("A<s>q</s>a")], [cached], 2, 2, max_steps=3, **settings_)
    assert search.queries == ["q"]
    first, _, third = trainer.state.log_history[:3]
    names = ("made", "merged", "cached", "executed")
    assert [first[f"tools/calls_{name}"] for name in names] == [4, 2, 1, 1], "two groups of two rows"
    assert [third[f"tools/calls_{name}"] for name in names] == [4, 2, 2, 0]


def test_seconds_are_those_of_executed_calls():
    def made(seconds, **flags):
        return CallOfRow(ToolCall("s", seconds=seconds, **flags))

    row = Trajectory(0, [1], calls=[made(2.0), made(4.0), made(0.0, merged=True), made(0.0, cached=True)])
    group = Group(range(1), 1, 1, trajectories=[row])
    metrics = rollout_metrics(rollout_sums([group]), slowest_calls([group], ["s"]), ["s"])
    assert (metrics["tools/s/seconds_mean"], metrics["tools/s/seconds_max"]) == (3.0, 4.0)


# Properties


class SmallWorld(RandomProtocol):
    """Calls one of a few queries, so that rows of a group make the same calls; some fail."""

    def parse(self, ids, context, tools):
        if ids[-1:] != [CALL]:
            return Turn(list(ids), [])
        return Turn(list(ids), [ToolCall("look_up", {"query": token % 3}) for token in ids[:-1][:3] or [0]])

    def result_ids(self, calls, written=()):
        return [0] * sum(len(str(call.result)) % 5 + 1 for call in calls)


def small_rollout(deterministic, seed, groups, size, initial, branching, limits, eager=False, failing=()):
    rng = random.Random(seed)
    executed = Counter()
    lock = threading.Lock()

    def look_up(query: int) -> str:
        with lock:
            executed[query] += 1
        if query in failing:
            raise ValueError(f"no {query}")
        return f"answer {query}" * (query + 1)

    def sample(contexts, budgets):
        samples = []
        for budget in budgets:
            ids = [rng.randint(3, 50) for _ in range(rng.randint(0, 8))] + [rng.choice([END, CALL, CALL])]
            samples.append(Sample(ids[:budget], [rng.random() for _ in ids[:budget]]))
        return samples

    parts = group_parts(0, groups * size, size, initial)
    function = tool(look_up, deterministic=deterministic)
    trainer = SimpleNamespace(
        environment_factories=None,
        environments=None,
        tools=[function],
        _sync_tool_dicts=[{"look_up": function}] * (groups * size),
        _async_tool_dicts=[{}] * (groups * size),
    )
    prompts = [[100 + row // size] for row in range(groups * size)]
    with ToolExecutor() as executor:
        row_tools = RowTools(trainer, executor, forks=True)
        row_tools.begin(parts)
        hooks = RolloutHooks(
            sample=sample,
            tools_of=row_tools.of,
            submit=row_tools.submit,
            copy_state=row_tools.copy,
            on_wave=lambda wave: row_tools.next_wave(),
        )
        rows = run_waves(
            parts, prompts, SmallWorld(), hooks, branching, limits, random.Random(seed + 1), END.__eq__, eager
        )
    return parts, rows, executed


def calls_of(group):
    return [own for trajectory in group.trajectories for own in trajectory.calls]


def kinds_of(group):
    return Counter(call_kind({**vars(own.call), "shared": own.shared}) for own in calls_of(group))


@settings(max_examples=30, deadline=None)
@given(case=cases(), failing=st.sets(st.integers(0, 2), max_size=1))
def test_rollouts_are_those_without_merging(case, failing):
    plain, merged = (small_rollout(deterministic, **case, failing=failing) for deterministic in (False, True))
    for left, right in zip(plain[1], merged[1], strict=True):
        for name in (
            "completion_ids",
            "tool_mask",
            "kind",
            "parent",
            "fork_token",
            "turns",
            "truncated",
            "tool_turns",
        ):
            assert getattr(left, name) == getattr(right, name), name
        assert [segment for segment in left.segments] == [segment for segment in right.segments]
        for one, other in zip(left.calls, right.calls, strict=True):
            for name in ("name", "arguments", "result", "error"):
                assert getattr(one.call, name) == getattr(other.call, name)
            assert one.shared == other.shared
    assert sum(plain[2].values()) == sum(kinds_of(group)["executed"] for group in plain[0])
    assert sum(merged[2].values()) == sum(kinds_of(group)["executed"] for group in merged[0])


@pytest.mark.parametrize("eager", [False, True])
@settings(max_examples=30, deadline=None)
@given(case=cases())
def test_each_distinct_call_of_a_group_is_executed_once(eager, case):
    groups, _, executed = small_rollout(True, **case, eager=eager)
    distinct = [{own.call.arguments["query"] for own in calls_of(group)} for group in groups]
    assert executed == Counter(query for queries in distinct for query in queries)
    for group, queries in zip(groups, distinct, strict=True):
        kinds = kinds_of(group)
        assert kinds["executed"] == len(queries)
        assert sum(kinds[kind] for kind in CALL_KINDS) == len(calls_of(group))
        assert all(own.call.result.startswith(f"answer {own.call.arguments['query']}") for own in calls_of(group))


# To the bit


@pytest.mark.parametrize("initial", [4, 2], ids=["GRPO", "ARPO"])
def test_a_training_run_is_that_without_merging_to_the_bit(agent_dirs, tokenizer, tmp_path, monkeypatch, initial):
    runs = {}
    for deterministic in (False, True):
        monkeypatch.setattr(tiny, "add", tool(PLAIN_ADD, deterministic=deterministic))
        runs[deterministic] = run(
            *(ARPOTrainer, ARPOConfig, agent_dirs["chat_template"], tokenizer, str(tmp_path / str(deterministic))),
            num_initial_generations=initial,
            branch_rule="random",
            log_rollouts=True,
            temperature=0.5,  # rows of a group make the same call more often
        )
    for key in ("completions", "rewards", "losses", "weights"):
        for left, right in zip(runs[False][key], runs[True][key], strict=True):
            assert torch.equal(left, right), key
    plain, merged = (list(distinct_and_executed(records(tmp_path / name))) for name in ("False", "True"))
    assert all(executed == distinct for distinct, executed in merged)
    assert sum(executed for _, executed in plain) > sum(executed for _, executed in merged) > 0
    same = [name for name in runs[True]["log"][0] if name.startswith(("arpo/", "tools/ca")) and "seconds" not in name]
    same = [name for name in same if name not in ("tools/calls_executed", "tools/calls_merged")]
    assert {name: runs[False]["log"][0][name] for name in same} == {name: runs[True]["log"][0][name] for name in same}


PLAIN_ADD = tiny.add


def test_the_eager_schedule_merges_too(agent_dirs, tokenizer, tmp_path):
    settings_ = {"branch_rule": "random", "rollout_schedule": "eager"}
    trainer = build(agent_dirs, tokenizer, tmp_path, tools=(tool(tiny.add, deterministic=True),), **settings_)
    trainer.train()
    counts = list(distinct_and_executed(records(tmp_path)))
    assert counts and all(executed == distinct for distinct, executed in counts)
