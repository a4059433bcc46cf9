"""Rows where outcomes are likely mixed, none for a group that has its answer; groups that teach nothing left out."""

import math
import random
from concurrent.futures import Future

import pytest
import torch
from accelerate import Accelerator
from branching import branching, rule
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import plan, rollout
from test_config import Board
from test_config import build as build_plain
from test_distinct import LIMITS, Search, tree
from test_rollout_properties import CALL, END, RandomProtocol
from test_trainer_options import build, records

from arpo_trl.rewards.memory import RewardMemory
from arpo_trl.rollout.engines import Sample
from arpo_trl.rollout.loop import RolloutHooks, run_waves
from arpo_trl.rollout.outputs import mask_uniform, row_rewards
from arpo_trl.rollout.rules.base import PROMPT, Node
from arpo_trl.rollout.rules.contrast import mixed_chance
from arpo_trl.rollout.rules.expansion import stretches
from arpo_trl.rollout.tree import Group, group_parts

# Where, and whether


def test_mixed_chance_by_hand():
    assert mixed_chance([1.0, 0.0], 0.5) == 1.0  # p = 1.5 / 3
    assert mixed_chance([1.0, 1.0], 0.5) == pytest.approx(5 / 9)  # p = 2.5 / 3: 4 · 5/6 · 1/6
    assert mixed_chance([0.0, 0.0], 0.5) == pytest.approx(5 / 9)
    assert mixed_chance([], 0.25) == 0.75
    assert mixed_chance([1.0] * 8, 0.9) < mixed_chance([1.0], 0.9), "the more agree, the surer"


def three_rows():
    return tree(
        (None, None, [(0, [5], 0.5), (2, [6], 0.5)]),
        (0, 2, [(2, [7], 0.5)]),
        (None, None, [(0, [8], 0.5), (2, [6], 0.5)]),
    )


def test_rows_go_where_they_are_likely_to_end_differently():
    group = three_rows()
    assert {node: sampled.rows for node, sampled in stretches(group).items()} == {
        PROMPT: [0, 1, 2],
        Node(0, 1): [0, 1],
        Node(2, 1): [2],
    }
    group.rows = range(10, 14)
    group.rewards = [5.0, 3.0, 5.0]  # 1, 0, 1 of what the group has earned; mean ⅔
    # Prompt: p = (2 + ⅔) / 4 = ⅔, 8/9 of 2 segments; the node: p = (1 + ⅔) / 3 = 5/9, 80/81 of 2; row 2: p = 5/6, 5/9
    # of 1
    assert rule("contrast").expand(group, random.Random(0)) == [Node(2, 1)]
    group.rewards = [5.0, 3.0, 3.0]
    group.rows = range(10, 17)
    granted = rule("contrast", expansion_rounds=1).expand(group, random.Random(0))
    assert len(granted) == 4


@pytest.mark.parametrize("rewards", [[1.0, 1.0, 1.0], [0.0, None, 0.0], [None, None, None]])
def test_a_group_whose_rows_have_earned_the_same_gets_no_more(rewards):
    group = three_rows()
    group.rows, group.rewards = range(10, 16), rewards
    assert rule("contrast").expand(group, random.Random(0)) == []
    group.end()
    assert [row.kind for row in group.trajectories[3:]] == ["idle"] * 3 and group.budget == 0
    for row in group.trajectories[3:]:
        assert row.tool_mask == [0] and len(row.completion_ids) == 1 and not row.calls and not row.segments


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    groups=st.integers(1, 3),
    size=st.integers(2, 9),
    initial=st.integers(1, 9),
    rounds=st.integers(1, 3),
    eager=st.booleans(),
    share=st.floats(0, 1),
)
def test_rollouts_with_rewards(seed, groups, size, initial, rounds, eager, share):
    rng = random.Random(seed)
    parts = group_parts(0, groups * size, size, min(initial, size))
    asked = []

    def sample(contexts, budgets):
        return [
            Sample([rng.randint(3, 9), rng.choice([END, CALL])][:budget], [0.5, 0.5][:budget]) for budget in budgets
        ]

    def submit(trajectory, calls):
        futures = [Future() for _ in calls]
        for call, future in zip(calls, futures, strict=True):
            call.result = "1"
            future.set_result(call)
        return futures

    earned = {}

    def score():
        asked.append(sum(len(group.trajectories) for group in parts))
        for group in parts:
            for row in group.trajectories:
                assert row.kind == "idle" or row.completion_ids[-1:] == [END] or row.truncated, "all rows have ended"
                earned.setdefault(row.row, float(rng.random() < share))
            group.rewards = [None if row.kind == "idle" else earned[row.row] for row in group.trajectories]

    hooks = RolloutHooks(sample=sample, tools_of=lambda row: {}, submit=submit, score=score)
    prompts = [[100 + row // size] for row in range(groups * size)]
    rows = run_waves(
        parts,
        prompts,
        RandomProtocol(),
        hooks,
        branching(100, "contrast", expansion_rounds=rounds),
        LIMITS,
        random.Random(seed),
        END.__eq__,
        eager,
    )
    assert [row.row for row in rows] == list(range(groups * size))
    assert len(asked) <= rounds
    for group in parts:
        kinds = [row.kind for row in group.trajectories]
        working = kinds.index("idle") if "idle" in kinds else len(kinds)
        assert set(kinds[working:]) <= {"idle"} and "idle" not in kinds[:working]
        if working < size:
            assert len({earned[row.row] for row in group.trajectories[:working]}) == 1


# Rewards, once a row


def test_a_row_is_scored_once():
    memory, seen = RewardMemory(), []

    def reward(completions, letter, **kwargs):
        seen.append((completions, letter))
        kwargs["log_extra"]("column", completions)
        kwargs["log_metric"]("metric", 1.0)
        return [None if text == "b" else float(len(text)) for text in completions]

    logged = []
    log = {"log_extra": lambda *of: logged.append(of), "log_metric": lambda *of: logged.append(of)}
    memory.rows = {0, 1}
    first = memory.of(0, reward, quiet=True)(completions=["aa", "b", "stand-in"], letter=["x", "y", "z"], **log)
    assert first == [2.0, None, 0.0] and seen == [(["aa", "b"], ["x", "y"])] and logged == []
    memory.rows = {0, 1, 2}
    again = memory.of(0, reward, quiet=False)
    assert again(completions=["aa", "b", "ccc"], letter=["x", "y", "z"], **log) == [2.0, None, 3.0]
    assert seen[1:] == [(["ccc"], ["z"])]
    assert logged == [("column", [None, None, "ccc"]), ("metric", 1.0)]
    again(completions=["aa", "b", "ccc"], letter=["x", "y", "z"], **log)
    assert len(seen) == 2, "nothing is left to score"
    memory.clear()
    memory.of(0, reward, quiet=True)(completions=["aa", "b", "ccc"], letter=["x", "y", "z"], **log)
    assert len(seen) == 3


def test_row_rewards_by_hand():
    scores = torch.tensor([[1.0, 2.0], [math.nan, 3.0], [math.nan, math.nan]])
    assert row_rewards(scores, torch.tensor([1.0, 0.5])) == [2.0, 1.5, None]


# In the trainer


CHOICE = plan("A<s>q</s>?c", (9, "xy"))


def contrast(tmp_path, reward, **settings):
    return rollout(
        *(tmp_path, [CHOICE], [Search().s], 2, 6),
        branch_rule="contrast",
        reward=reward,
        scale_rewards="none",
        **settings,
    )


@pytest.mark.parametrize("attribution", ["soft", "hard"])
def test_a_group_with_one_reward_costs_no_more_rows_and_changes_no_weight(tmp_path, attribution):
    seen = []

    def reward(completions, **kwargs):
        seen.extend(completions)
        return [1.0] * len(completions)

    rows, trainer, _ = contrast(tmp_path, reward, advantage_attribution=attribution)
    assert [row["kind"] for row in rows] == ["initial"] * 2 and len(seen) == 2
    log = trainer.state.log_history[0]
    assert log["arpo/idle"] == 4 and log["tools/calls_executed"] == 2 and log["loss"] == 0.0
    assert log["reward"] == 1.0 and log["frac_reward_zero_std"] == 1.0


def test_a_mixed_group_is_filled_and_each_row_is_scored_once(tmp_path):
    seen = []

    def reward(completions, tool_calls, model_text, **kwargs):
        assert len(completions) == len(tool_calls) == len(model_text)
        first = len(seen)
        seen.extend(completions)
        return [float(first + index) for index in range(len(completions))]  # no two the same

    rows, trainer, _ = contrast(tmp_path, reward)
    assert len(rows) == len(seen) == 6 and trainer.state.log_history[0]["arpo/idle"] == 0
    assert {row["kind"] for row in rows} > {"initial"}
    assert sum(row["advantage"] for row in rows) == pytest.approx(0.0, abs=1e-5)


def test_groups_of_unequal_size_are_normalised_by_their_own_rows(agent_dirs, tokenizer, tmp_path):
    settings_ = dict(num_generations=4, num_initial_generations=2, max_steps=3, temperature=0.7, scale_rewards="none")
    trainer = build(agent_dirs, tokenizer, tmp_path, branch_rule="contrast", **settings_)
    trainer.train()
    sizes = set()
    groups = {}
    for row in records(tmp_path):
        groups.setdefault((row["step"], row["prompt_index"]), []).append(row)
    for rows in groups.values():
        sizes.add(len(rows))
        rewards = [sum(row["rewards"].values()) for row in rows]
        for row, reward in zip(rows, rewards, strict=True):
            assert row["advantage"] == pytest.approx(reward - sum(rewards) / len(rows), abs=1e-4)
    assert sizes <= {2, 3, 4} and all(math.isfinite(log.get("loss", 0.0)) for log in trainer.state.log_history)


def test_environments_are_refused(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="`branch_rule='contrast'` scores rows before .*`environment_factory`"):
        build_plain(tmp_path, tokenizer, {"branch_rule": "contrast"}, tools=(), environment_factory=Board)


# Dynamic sampling


def test_groups_with_one_reward_are_left_out_of_the_loss():
    output = {
        "completion_mask": torch.ones(6, 3, dtype=torch.long),
        "tool_mask": torch.tensor([[1, 0, 1]] * 6),
        "num_items_in_batch": torch.tensor(12),
    }
    groups = [Group(range(2 * i, 2 * i + 2), 2, 2) for i in range(3)]
    mask_uniform(output, groups, [[1.0, 1.0], [0.0, 1.0], [None, 0.5]], Accelerator(cpu=True))
    assert output["completion_mask"].sum(1).tolist() == [0, 0, 3, 3, 0, 0]
    assert output["num_items_in_batch"].item() == 4
    mask_uniform(output, groups, [[1.0, 1.0]] * 3, Accelerator(cpu=True))
    assert output["num_items_in_batch"].item() == 1, "nothing is left, and nothing is divided by 0"


@pytest.mark.parametrize("initial", [4, 2], ids=["GRPO", "ARPO"])
def test_training_with_dynamic_sampling(agent_dirs, tokenizer, tmp_path, initial):
    masks = []
    trainer = build(
        *(agent_dirs, tokenizer, tmp_path),
        num_generations=4,
        num_initial_generations=initial,
        dynamic_sampling=True,
        reward_funcs=lambda completions, **kwargs: [1.0] * (len(completions) - 4) + [0.0, 1.0, 1.0, 1.0],
        branch_rule="random",
    )
    generate = trainer._generate_and_score_completions

    def spy(inputs):
        output = generate(inputs)
        masks.append((output["completion_mask"] * output["tool_mask"]).sum(1).tolist())
        assert output["num_items_in_batch"] == sum(masks[-1])
        return output

    trainer._generate_and_score_completions = spy
    trainer.train()
    assert all(mask[:-4] == [0] * (len(mask) - 4) and min(mask[-4:]) > 0 for mask in masks) and len(masks[0]) == 8
    assert all(math.isfinite(log.get("loss", 0.0)) for log in trainer.state.log_history)
