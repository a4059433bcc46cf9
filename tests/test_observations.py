"""What is observed of trees, with numbers worked by hand, and through a real trainer with a scripted model."""

import pytest
from scripted import plan, rollout

from arpo_trl.reporting import USELESS_ROLLOUTS
from arpo_trl.rollout.observations import (
    PLACES,
    add_observations,
    observation_metrics,
    observe,
    useless_signs,
)
from arpo_trl.rollout.record import example_texts
from arpo_trl.rollout.tree import Group, Segment, Trajectory
from arpo_trl.viewer.records import read_file


def row(number, ids, starts, parent=None, at=None, gaps=(), probabilities=(), kind=None, **changes):
    """A row whose segments start at `starts`; its tool results are one token long."""
    ends = [start - 1 for start in starts[1:]] + [len(ids)]
    readings = zip(starts, ends, [None, *gaps], [None, *probabilities], strict=True)
    segments = [Segment(start, end, 0.5, gap, probability) for start, end, gap, probability in readings]
    kind = kind or ("initial" if parent is None else "fork")
    return Trajectory(number, [9], kind, parent, at, list(ids), segments=segments, **changes)


def tree():
    """
    Rows 0, 3 and 4 start at the prompt. Row 1 leaves row 0 at its first result and ends like it token for token; row 2
    leaves row 1 at its second result and has another answer; row 5 leaves row 0 at its first result, says something
    else and has its answer.
    """
    return [
        row(0, [1, 2, 0, 3, 4, 0, 7, 8], [0, 3, 6], gaps=(0.4, -0.2), probabilities=(0.58, 0.46)),
        row(1, [1, 2, 0, 3, 4, 0, 7, 8], [0, 3, 6], 0, 3, gaps=(0.1, 0.3), probabilities=(None, 0.56)),
        row(2, [1, 2, 0, 3, 4, 0, 7, 9, 9], [0, 3, 6], 1, 6, gaps=(0.1, 0.5), probabilities=(None, None)),
        row(3, [5], [0], truncated=True, out_of_turns=True),
        row(4, [6, 6], [0], kind="supplement", truncated=True),
        row(5, [1, 2, 0, 5, 5, 0, 7, 8], [0, 3, 6], 0, 3, gaps=(0.1, -0.4), probabilities=(None, 0.42)),
    ]


REWARDS = [1.0, 0.0, 1.0, -1.0, None, 0.0]
EXPECTED = {
    # initial: rows 0 and 3; fork: rows 1, 2 and 5; supplement: row 4, which has no score
    "arpo/reward/initial": 0.0,
    "arpo/reward/fork": 1 / 3,
    "arpo/length/initial": 4.5,
    "arpo/length/fork": 25 / 3,
    "arpo/length/supplement": 2,
    "arpo/advantage/initial": 0.0,
    "arpo/advantage/fork": 2.5 / 3,
    "arpo/advantage/supplement": 0.0,
    "arpo/truncated/initial": 0.5,
    "arpo/truncated/fork": 0,
    "arpo/truncated/supplement": 1,
    # rewards 1, 0, 1, 0 in the tree of row 0 (mean 0.5) and −1 in that of row 3; mean of the group 0.2
    "arpo/reward_variance_between_trees": (4 * 0.3**2 + 1.2**2) / 5,
    "arpo/reward_variance_within_trees": 4 * 0.5**2 / 5,
    "arpo/forks_at_depth/1": 2,
    "arpo/forks_at_depth/2": 1,
    "arpo/forks_at_depth/3": 0,
    "arpo/forks_at_depth/4_or_more": 0,
    "arpo/forks_at_result/1": 2,
    "arpo/forks_at_result/2": 1,
    "arpo/forks_at_result/3": 0,
    "arpo/forks_at_result/4_or_more": 0,
    "arpo/forks_like_parent": 1 / 3,
    "arpo/forks_ending_like_parent": 2 / 3,
    # of row 0: 0.4, −0.2; of row 1: 0.1, 0.3; of row 2: 0.5; of row 5: 0.1, −0.4
    "arpo/entropy_gap_std": (0.72 / 7 - (0.8 / 7) ** 2) ** 0.5,
    "arpo/entropy_gap_q10": pytest.approx(-0.28),
    "arpo/entropy_gap_q50": pytest.approx(0.1),
    "arpo/entropy_gap_q90": pytest.approx(0.44),
    "arpo/branch_probability": (0.58 + 0.46 + 0.56 + 0.42) / 4,
    "arpo/branch_probability_std": pytest.approx(0.0669, abs=1e-4),
    "arpo/branch_probability_q10": pytest.approx(0.432),
    "arpo/branch_probability_q50": pytest.approx(0.51),
    "arpo/branch_probability_q90": pytest.approx(0.574),
    "completions/mean_full_length": 6,
    "completions/max_full_length": 9,
    "completions/cut_by_length": 1 / 6,
    "completions/cut_by_turns": 1 / 6,
}


def seen(trajectories, rewards, advantages=None):
    group = Group(range(len(trajectories)), 1, len(trajectories), trajectories=trajectories)
    return observe([group], [rewards], advantages or [0.0] * len(trajectories))


def test_the_metrics_of_a_tree_worked_by_hand():
    metrics = observation_metrics(seen(tree(), REWARDS, [1.0, 0.5, 2.0, -1.0, 0.0, 0.0]))
    assert metrics == {
        name: pytest.approx(value) if isinstance(value, float) else value for name, value in EXPECTED.items()
    }


def test_the_two_variances_are_the_reward_variance_of_groups():
    rewards = [0.5, 0.0, 1.0, -1.0, 2.0, 0.25]
    metrics = observation_metrics(seen(tree(), rewards))
    mean = sum(rewards) / 6
    total = metrics["arpo/reward_variance_between_trees"] + metrics["arpo/reward_variance_within_trees"]
    assert total == pytest.approx(sum((reward - mean) ** 2 for reward in rewards) / 6)


def test_a_group_on_two_processes_is_observed_as_on_one():
    """Row 0 and its forks on one process; rows 3 and 4, numbered from 0 there, on the other."""
    whole = observation_metrics(seen([*tree()[:3], tree()[3], tree()[4]], REWARDS[:5]))
    first = Group(range(3), 1, 5, trajectories=tree()[:3])
    rest = [tree()[3], tree()[4]]
    for place, trajectory in enumerate(rest):
        trajectory.row = place
    second = Group(range(2), 1, 5, first_row=3, trajectories=rest)
    parts = [observe([part], [REWARDS[:5]], [0.0] * 3) for part in (first, second)]
    assert observation_metrics(add_observations(parts)) == pytest.approx(whole)


def test_deep_forks_are_counted_together_and_a_mean_of_nothing_is_left_out():
    ids = [1, 0] * 6
    chain = [row(0, ids, [0, 2, 4, 6, 8, 10], gaps=[0.0] * 5, probabilities=[None] * 5)]
    for depth in range(1, 6):
        chain.append(
            row(depth, ids, [0, 2, 4, 6, 8, 10], depth - 1, 2 * depth, gaps=[0.0] * 5, probabilities=[None] * 5)
        )
    metrics = observation_metrics(seen(chain, [None] * 6))
    for name in ("forks_at_depth", "forks_at_result"):
        assert [metrics[f"arpo/{name}/{place}"] for place in PLACES] == [1, 1, 1, 2]
    assert not any("reward" in name or "probability" in name or "supplement" in name for name in metrics)
    assert observation_metrics(observe([], [], [])) == {}
    grpo = observation_metrics(seen([row(0, [1], [0]), row(1, [2], [0])], [1.0, 0.0]))
    assert not any("forks" in name or "entropy" in name for name in grpo)


@pytest.mark.parametrize(
    "rows, rewards, tools, expected",
    [
        ([{}, {}], [-1.0, -1.0], [], {"reward": "Every row had the reward -1, so that all advantages"}),
        ([{}, {}], [-1.0, None], [], {"reward": "Every row had the reward -1"}),
        ([{}, {}], [None, None], [], {"score": "No row had a score"}),
        ([{}, {}], [1.0, 0.0], ["search"], {"calls": "No row called a tool"}),
        (
            [{"truncated": True}, {"truncated": True, "out_of_turns": True}],
            [1.0, 0.0],
            [],
            {"truncated": "Every row was"},
        ),
        ([{"truncated": True}, {}], [1.0, 0.0], [], {}),
    ],
)
def test_signs_of_a_useless_rollout(rows, rewards, tools, expected):
    signs = useless_signs(seen([row(i, [1], [0], **changes) for i, changes in enumerate(rows)], rewards), tools)
    assert signs.keys() == expected.keys()
    assert all(signs[name].startswith(text) for name, text in expected.items())


def test_groups_of_one_reward_each_are_a_sign_too():
    groups = [
        Group(range(2 * i, 2 * i + 2), 1, 2, trajectories=[row(2 * i, [1], [0]), row(2 * i + 1, [1], [0])])
        for i in (0, 1)
    ]
    signs = useless_signs(observe(groups, [[0.0, 0.0], [1.0, 1.0]], [0.0] * 4), [])
    assert signs["reward"].startswith("All rows of a group had one reward, so")
    assert useless_signs(observe(groups, [[0.0, 0.0], [1.0, 0.0]], [0.0] * 4), []) == {}
    assert useless_signs(observe([], [], []), ["search"]) == {}


def test_example_texts_are_bounded():
    example = {
        "prompt": "q",
        "answer": ["Paris", "paris"],
        "question": "x" * 5000,
        "level": 3,
        "image": object(),
        "none": None,
    }
    texts = example_texts(example)
    assert texts == {"answer": '["Paris", "paris"]', "question": "x" * 1999 + "…", "level": "3"}
    assert len(example_texts({f"column_{i}": "a" for i in range(50)})) == 20


# ------------------------------------------------------------------------------------------- through a real trainer


def search(query: str = "") -> str:
    """
    Search.

    Args:
        query: Query.
    """
    return "found"


def test_a_run_tells_its_trees_and_keeps_its_examples(tmp_path):
    """One row calls a tool, and every tool result forks at once, so that a group is a tree of one result."""
    plans = [plan("A<search>q</search>yes"), plan("Bno")]
    records, trainer, _ = rollout(
        tmp_path,
        plans,
        [search],
        initial=2,
        generations=4,
        branch_rule="bernoulli",
        branch_probability=1.0,
        entropy_weight=0.0,
        reward=lambda completions, **kwargs: [1.0 if "yes" in text else -1.0 for text in completions],
    )
    kinds = [record["kind"] for record in records]
    assert kinds[:3] == ["initial", "initial", "fork"]
    logged = trainer.state.log_history[0]
    forks = kinds.count("fork")
    assert logged["arpo/forks"] == forks == logged["arpo/forks_at_depth/1"] == logged["arpo/forks_at_result/1"]
    assert (
        logged["arpo/forks_like_parent"] == logged["arpo/forks_ending_like_parent"] == 1
    )  # the plan leaves no choice
    assert logged["arpo/reward/fork"] == 1 and logged["arpo/reward/initial"] == 0
    lengths = [len(record["completion_ids"]) for record in records]
    assert logged["completions/mean_full_length"] == pytest.approx(sum(lengths) / 4)
    assert logged["completions/max_full_length"] == max(lengths) > logged["completions/max_length"]
    assert logged["completions/cut_by_length"] == logged["completions/cut_by_turns"] == 0
    assert logged["arpo/branch_probability"] == 1 and logged["arpo/branch_probability_std"] == 0
    assert logged["arpo/waves"] >= 2
    variance = logged["arpo/reward_variance_between_trees"] + logged["arpo/reward_variance_within_trees"]
    rewards = [record["rewards"]["<lambda>"] for record in records]
    assert variance == pytest.approx(sum(value**2 for value in rewards) / 4 - (sum(rewards) / 4) ** 2)


def test_a_row_that_is_out_of_turns_is_told_from_one_that_is_too_long(tmp_path):
    plans = [plan("A<search>q</search>x<search>q</search>"), plan("B" + "x" * 150)]
    records, trainer, _ = rollout(
        tmp_path, plans, [search], 2, 4, branch_threshold=1.0, max_tool_calling_iterations=1, max_completion_length=80
    )
    told = {record["text"][0]: (record["truncated"], record["out_of_turns"]) for record in records}
    assert told == {"A": (True, True), "B": (True, False)}
    logged = trainer.state.log_history[0]
    assert logged["completions/cut_by_length"] + logged["completions/cut_by_turns"] == 1
    assert logged["completions/cut_by_turns"] == sum(record["out_of_turns"] for record in records) / 4


def test_a_useless_run_says_why_once(tmp_path, caplog):
    rollout(
        tmp_path,
        [plan("Ano"), plan("Bno")],
        [search],
        initial=2,
        generations=4,
        max_steps=USELESS_ROLLOUTS + 2,
        reward=lambda completions, **kwargs: [-1.0] * len(completions),
    )
    told = [record.message for record in caplog.records if f"The last {USELESS_ROLLOUTS} rollouts" in record.message]
    assert len(told) == 1
    assert "Every row had the reward -1" in told[0] and "No row called a tool" in told[0]
    assert "truncated" not in told[0]


def test_the_first_row_of_each_group_keeps_the_columns_of_the_data(tmp_path):
    rollout(tmp_path, [plan("Ano"), plan("Bno")], [search], 2, 4, columns={"answer": ["yes", "y"], "level": 2})
    rows, _ = read_file(tmp_path / "rollouts" / "step-000000.jsonl.gz")
    examples = [row["example"] for row in rows]
    assert examples == [{"answer": '["yes", "y"]', "level": "2"}, None, None, None]
