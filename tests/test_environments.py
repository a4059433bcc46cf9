"""Environments of rows: whose methods are tools, what a fork copies, when the copy is closed; names of tools."""

import asyncio
import functools
import threading

import pytest
import tiny
from datasets import Dataset
from test_faults import Unspeakable
from test_trainer_options import build, records

from arpo_trl.execution.names import distinct_tools
from arpo_trl.rollout.environments import close_environments, environment_tools, fork_environment
from arpo_trl.tools import ToolExecutor

FORKS = {"branch_rule": "random", "branch_probability": 1.0, "max_completion_length": 80, "learning_rate": 0.0}


class Desk:
    """An environment that says what becomes of it."""

    log: list[str] = []

    def reset(self, **kwargs):
        pass

    def add(self, a: int, b: int) -> int:
        return a + b

    add.__doc__ = tiny.add.__doc__  # the schema that the model has learnt

    def fork(self):
        self.log.append("fork")
        return type(self)()

    def close(self):
        self.log.append("close")

    def get_reward(self):
        self.log.append("reward")
        return 1.0


@pytest.fixture(autouse=True)
def log():
    Desk.log.clear()
    return Desk.log


def train(agent_dirs, tokenizer, tmp_path, factory, **settings):
    trainer = build(agent_dirs, tokenizer, tmp_path, tools=(), environment_factory=factory, **{**FORKS, **settings})
    trainer.train()
    return trainer


def test_a_forks_environment_is_closed_once_it_has_been_scored_and_no_other_is(agent_dirs, tokenizer, tmp_path, log):
    trainer = train(agent_dirs, tokenizer, tmp_path, Desk)
    assert trainer._row_tools.names == ["add"] and [tool.__name__ for tool in trainer._env_tools[None]] == ["add"]
    forks = sum(record["kind"] == "fork" for record in records(tmp_path))
    assert forks > 0 and log[:2] == ["fork", "close"], "the trainer tries a copy when it is made"
    assert log.count("fork") == log.count("close") == forks + 1
    assert log[: log.index("close", 2)].count("reward") == 8, "the rows of the first step are scored before that"


def test_what_the_model_calls_close_is_no_tool(agent_dirs, tokenizer, tmp_path):
    trainer = build(agent_dirs, tokenizer, tmp_path, tools=(), environment_factory=Desk)
    assert "close" not in trainer._row_tools.names
    with pytest.raises(ValueError, match=r"`Door.close` takes arguments.*Give the tool another name"):

        class Door(Desk):
            def close(self, softly: bool):
                """Close the door."""

        build(agent_dirs, tokenizer, tmp_path, tools=(), environment_factory=Door)


def test_a_close_that_fails_hangs_or_waits_ends_nothing(caplog):
    opened = threading.Event()

    class Failing(Desk):
        def close(self):
            raise RuntimeError("stuck")

    class Hanging(Desk):
        def close(self):
            opened.wait()

    class Waiting(Desk):
        async def close(self):
            await asyncio.sleep(0)
            self.log.append("close")

    class Without:
        pass

    with ToolExecutor(timeout=0.05) as executor:
        close_environments([Failing(), Hanging(), Waiting(), Without(), Desk()], executor)
        assert Desk.log == ["close", "close"]
        assert "A fork's `Failing` could not be closed (RuntimeError: stuck)" in caplog.text
        assert "A fork's `Hanging` could not be closed (TimeoutError" in caplog.text
        opened.set()


def test_a_fork_that_fails_in_the_midst_of_a_run_is_not_made(agent_dirs, tokenizer, tmp_path, caplog):
    class Brittle(Desk):
        made = 0

        def fork(self):
            type(self).made += 1
            if self.made > 2:
                raise Unspeakable
            return type(self)()

    train(agent_dirs, tokenizer, tmp_path, Brittle)
    rows = records(tmp_path)
    kinds = [record["kind"] for record in rows]
    assert kinds.count("fork") == 1 and kinds.count("supplement") > 0 and len(rows) == 16
    assert sum(segment["forks"] or 0 for row in rows for segment in row["segments"] if row["kind"] != "fork") == 1
    assert "A `Brittle` could not be copied for a fork, which is not made (Unspeakable)" in caplog.text


@pytest.mark.parametrize("returned", [None, "itself"])
def test_a_fork_is_another_environment(returned):
    class Odd(Desk):
        def fork(self):
            return self if returned == "itself" else returned

    with pytest.raises(TypeError, match="`Odd.fork` returned .*another environment of the same class"):
        fork_environment(Odd())


def test_environments_may_share_a_methods_name(agent_dirs, tokenizer, tmp_path):
    class Other(Desk):
        def get_reward(self):
            return -1.0

    rows = [{"prompt": tiny.question(a, 1), "environment": "own" if a % 2 else "other"} for a in range(8)]
    trainer = train(
        agent_dirs,
        tokenizer,
        tmp_path,
        {"own": Desk, "other": Other},
        train_dataset=Dataset.from_list(rows),
        reward_funcs=None,
    )
    assert trainer._row_tools.names == ["add"]
    rewards = [record["rewards"] for record in records(tmp_path)]
    assert {"Desk": 1.0, "Other": None} in rewards and {"Desk": None, "Other": -1.0} in rewards
    calls = sum(not call["shared"] for record in records(tmp_path) for call in record["tool_calls"])
    logged = [log["tools/add/calls"] for log in trainer.state.log_history if "tools/add/calls" in log]
    assert calls > 0 and sum(logged) == calls


def test_a_tool_and_a_method_of_the_same_name_are_refused(agent_dirs, tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"`environment_factory` \(Desk\) together with `tools` holds two .*'add'"):
        build(agent_dirs, tokenizer, tmp_path, tools=(tiny.add,), environment_factory=Desk)

    def close(text: str) -> str:
        """Close."""

    desk = Desk()
    with pytest.raises(ValueError, match="'close'"):
        environment_tools([close, desk.add, desk.close], desk)
    desk.close = None
    assert environment_tools([close, desk.add], desk) == [close, desk.add]


# Names of tools


def test_a_tool_given_twice_is_one_tool_and_two_of_one_name_are_refused(agent_dirs, tokenizer, tmp_path):
    def web(a: int, b: int) -> int:
        """Another tool."""

    web.__name__ = "add"
    assert distinct_tools([tiny.add, tiny.add]) == [tiny.add]
    with pytest.raises(ValueError, match="`tools` holds two tools named 'add'.*another name"):
        build(agent_dirs, tokenizer, tmp_path, tools=(tiny.add, web))
    with pytest.raises(TypeError, match="`tools` holds functools.partial.*which has no name"):
        build(agent_dirs, tokenizer, tmp_path, tools=(functools.partial(tiny.add, 1),))
    trainer = build(agent_dirs, tokenizer, tmp_path, tools=(tiny.add, tiny.add), max_completion_length=60)
    trainer.train()
    assert trainer.tools == [tiny.add] and len(records(tmp_path)) == 16
