"""`examples/arpo_in_one_file.py` is the library's algorithm: on the same random numbers it decides and credits so."""

import ast
import random
import sys
from concurrent.futures import Future
from pathlib import Path

import pytest
from branching import branching

from arpo_trl.advantages import hard_advantages
from arpo_trl.execution.executor import ToolCall
from arpo_trl.protocols import Turn
from arpo_trl.rollout.engines import Sample
from arpo_trl.rollout.loop import run_waves
from arpo_trl.rollout.steps import Limits, RolloutHooks
from arpo_trl.rollout.tree import group_parts

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))
import arpo_in_one_file as one_file  # noqa: E402

VOCAB, CALL, END = 100, 98, 99  # a segment that ends in CALL calls a tool
RESULT = [7, 7]


class Script:
    """Segments and entropies that depend on the context alone, so that both sides are told the same."""

    def __call__(self, contexts: list[list[int]], limits: list[int]) -> list[tuple[list[int], list[float]]]:
        segments = []
        for context, limit in zip(contexts, limits, strict=True):
            rng = random.Random(str(context) + str(self.seen(context)))
            ids = [rng.randrange(90) for _ in range(rng.randint(1, 8))]
            ids = [*ids, rng.choice((CALL, CALL, CALL, END))][:limit]
            segments.append((ids, [rng.random() * 3 for _ in ids]))
        return segments

    def __init__(self) -> None:
        self.counts: dict[tuple[int, ...], int] = {}

    def seen(self, context: list[int]) -> int:
        """Siblings have equal contexts and still go different ways."""
        self.counts[tuple(context)] = self.counts.get(tuple(context), 0) + 1
        return self.counts[tuple(context)]


class Protocol:
    schema_in_prompt = False
    stop_strings: list[str] = []

    def parse(self, ids, context, tools):
        return Turn(ids, [ToolCall("tool", {})] if ids[-1] == CALL else [])

    def result_ids(self, calls, written=()):
        return RESULT

    def results_turn(self, calls, written=()):
        return []


def submit(trajectory, calls):
    future: Future = Future()
    future.set_result(calls[0])
    return [future]


def library(prompts, seed):
    groups = group_parts(0, len(prompts) * one_file.M, one_file.M, one_file.N)
    script = Script()
    run_waves(
        groups,
        [prompt for prompt in prompts for _ in range(one_file.M)],
        Protocol(),
        RolloutHooks(
            sample=lambda contexts, limits: [Sample(*segment) for segment in script(contexts, limits)],
            tools_of=lambda trajectory: {},
            submit=submit,
        ),
        branching(VOCAB),
        Limits(completion=one_file.MAX_TOKENS, context=10**6, tool_turns=one_file.MAX_CALLS),
        random.Random(seed),
        END.__eq__,
    )
    return groups


@pytest.mark.parametrize("seed", range(20))
def test_the_same_forks_and_advantages(seed):
    prompts = [[1, 2, 3], [4, 5], [6]]
    answer = lambda ids: list(RESULT) if ids[-1] == CALL else None  # noqa: E731
    ours = one_file.rollout(prompts, Script(), answer, VOCAB, random.Random(seed))
    theirs = library(prompts, seed)
    kinds = {trajectory.kind for group in theirs for trajectory in group.trajectories}
    assert "fork" in kinds, "the comparison is of rollouts that branch"
    for rows, group in zip(ours, theirs, strict=True):
        assert [row.completion for row in rows] == [row.completion_ids for row in group.trajectories]
        assert [row.own for row in rows] == [row.tool_mask for row in group.trajectories]
        first = group.rows.start
        rewards = [random.Random(f"{seed} {row.row}").choice((0.0, 1.0)) for row in group.trajectories]
        advantages = one_file.normalised(rewards)
        spans = hard_advantages(
            advantages,
            [None if row.parent is None else row.parent - first for row in group.trajectories],
            [row.fork_token for row in group.trajectories],
            [len(row.completion_ids) for row in group.trajectories],
        )
        expected = [[span.advantage for span in row for _ in range(span.start, span.end)] for row in spans]
        for mine, wanted in zip(one_file.hard_advantages(rows, advantages), expected, strict=True):
            assert mine == pytest.approx(wanted)
        assert one_file.soft_advantages(rows, advantages)[3] == [advantages[3]] * len(rows[3].completion)


def test_the_advantage_and_the_loss_are_grpos():
    import torch

    assert one_file.normalised([1.0, 0.0, 0.0, 0.0]) == pytest.approx(
        [1.49970, -0.49990, -0.49990, -0.49990], abs=1e-4
    )
    logprobs, old = torch.tensor([[-1.0, -1.0]]), torch.tensor([[-1.5, -1.0]])
    # Ratios e^0.5 = 1.6487, clipped to 1.2 for a positive advantage, and 1
    assert one_file.policy_loss(logprobs, old, torch.tensor([[1.0, 1.0]]), torch.ones(1, 2)).item() == pytest.approx(
        -1.1
    )
    assert one_file.policy_loss(
        logprobs, old, torch.tensor([[-1.0, 0.0]]), torch.tensor([[1, 0]])
    ).item() == pytest.approx(1.64872, abs=1e-4)


def test_it_is_short_and_needs_nothing_of_the_package():
    lines = (EXAMPLES / "arpo_in_one_file.py").read_text().splitlines()
    assert len(lines) <= 250
    for name in ("arpo_in_one_file.py", "demo_world.py"):
        tree = ast.parse((EXAMPLES / name).read_text())
        imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        imported |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert not any(module.split(".")[0] in ("arpo_trl", "trl") for module in imported)
