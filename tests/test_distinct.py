"""Forks that differ from what was sampled at their node, their weights, and where they leave."""

import itertools
import json
import math
import random
from concurrent.futures import Future

import pytest
import torch
from branching import branching, rule
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import plan, rollout
from test_rollout_properties import CALL, END, RandomProtocol, cases
from test_trainer_options import build, records

from arpo_trl.rollout.distinct import fork_weights, sampled_at, weights_without_replacement
from arpo_trl.rollout.engines import Sample
from arpo_trl.rollout.entropy import segment_logprob
from arpo_trl.rollout.loop import Limits, RolloutHooks, run_waves
from arpo_trl.rollout.rules.base import PROMPT, Node
from arpo_trl.rollout.rules.expansion import node_novelties
from arpo_trl.rollout.tree import Group, Place, Segment, Trajectory, group_parts

# Weights


def test_weights_by_hand():
    assert weights_without_replacement([0.3]) == [1.0]
    # (1 − 0.25) / (2 − 0.75) and (1 − 0.5) / (2 − 0.75)
    assert weights_without_replacement([0.5, 0.25]) == pytest.approx([0.6, 0.4])
    # Of p = ½, ¼, ⅛: the orders that begin with the first have 1/½ · (1/¼ + 1/⅜), with the second 1/¾ · (1/¼ + 1/⅝),
    # with the third 1/⅞ · (1/⅜ + 1/⅝)
    shares = [2 * (4 + 8 / 3), 4 / 3 * (4 + 8 / 5), 8 / 7 * (8 / 3 + 8 / 5)]
    expected = [share / sum(shares) for share in shares]
    assert weights_without_replacement([0.5, 0.25, 0.125]) == pytest.approx(expected)
    assert weights_without_replacement([1e-200] * 4) == pytest.approx([0.25] * 4)
    sure = weights_without_replacement([1.0, 0.0])
    assert sure == pytest.approx([1.0, 0.0]) and not any(map(math.isnan, sure))


@settings(max_examples=50, deadline=None)
@given(
    masses=st.lists(st.floats(0.01, 1.0), min_size=2, max_size=5),
    values=st.lists(st.floats(-5, 5), min_size=5, max_size=5),
    data=st.data(),
)
def test_weighted_samples_without_replacement_have_the_expectation(masses, values, data):
    probabilities = [mass / sum(masses) for mass in masses]
    size = data.draw(st.integers(1, len(masses)))
    expected, total = 0.0, 0.0
    for order in itertools.permutations(range(len(masses)), size):
        chance, left = 1.0, 1.0
        for index in order:
            chance *= probabilities[index] / left
            left -= probabilities[index]
            left = max(left, 1e-15)
        weights = weights_without_replacement([probabilities[index] for index in order])
        assert sum(weights) == pytest.approx(1.0) and min(weights) >= 0
        expected += chance * sum(weight * values[index] for weight, index in zip(weights, order, strict=True))
        total += chance
    assert total == pytest.approx(1.0)
    assert expected == pytest.approx(sum(p * v for p, v in zip(probabilities, values, strict=False)), abs=1e-6)


def tree(*rows):
    """A group from (parent, fork token, segments), each segment (start, tokens, probability)."""
    group = Group(range(10, 10 + len(rows)), 1, len(rows))
    for number, (parent, token, segments) in enumerate(rows):
        row = Trajectory(10 + number, [1], parent=None if parent is None else 10 + parent, fork_token=token)
        if parent is not None:
            above = group.trajectories[parent]
            row.completion_ids = above.completion_ids[:token]
            row.segments = [segment for segment in above.segments if segment.start < token]
            row.starts = above.starts[: len(row.segments)]
        for start, tokens, probability in segments:
            row.completion_ids += [0] * (start - len(row.completion_ids)) + tokens
            logprob = None if probability is None else math.log(probability)
            row.segments.append(Segment(start, start + len(tokens), logprob=logprob))
            row.starts.append(Place(start, len(row.segments) - 1, 0, 0, 0))
        group.trajectories.append(row)
    return group


def test_weights_of_a_tree_multiply_along_a_row():
    group = tree(
        (None, None, [(0, [5], 0.9), (2, [6], 0.5), (4, [7], 0.5)]),
        (0, 2, [(2, [8], 0.25), (4, [9], 0.2)]),  # at the node of 0.5: weights 0.6 and 0.4, times 2
        (0, 4, [(4, [8], 0.5)]),  # at the next node of row 0: equal chances
        (1, 4, [(4, [5], 0.6)]),  # at the node of row 1, with 0.2: (1 − 0.6) / 1.2 and (1 − 0.2) / 1.2, times 2
    )
    assert fork_weights(group) == pytest.approx([1.2, 0.8 * 2 / 3, 1.2, 0.8 * 4 / 3])
    assert [row.row for row, _ in sampled_at(group, 10, 4)] == [10, 12]


@pytest.mark.parametrize("fork", [[(2, [6], 0.5)], [(2, [8], None)]], ids=["a copy", "a probability is not known"])
def test_a_node_that_cannot_be_weighed_weighs_its_rows_equally(fork):
    assert fork_weights(tree((None, None, [(0, [5], 0.9), (2, [6], 0.5)]), (0, 2, fork))) == [1.0, 1.0]


# Novelty


def test_novelty_by_hand():
    assert segment_logprob([math.log(0.5), math.log(0.25)]) == pytest.approx(math.log(0.125))
    assert segment_logprob(None) is segment_logprob([math.nan]) is None and segment_logprob([]) == 0.0
    segment = Segment(10, 12, entropy_gap=1.5, logprob=math.log(0.125))
    assert segment.novelty == pytest.approx(0.875) and Segment(0, 1).novelty is None
    for name in ("bernoulli", "threshold"):
        chosen = rule(name, branch_measure="novelty")
        assert chosen.probability(segment) == chosen.priority(segment) == pytest.approx(0.875)
        assert chosen.probability(Segment(0, 1)) is None
    assert rule("random", branch_measure="novelty").probability(segment) == 0.5


def test_novelty_of_a_node_is_what_its_segments_leave():
    group = tree(
        (None, None, [(0, [5], 0.9), (2, [6], 0.5)]),
        (0, 2, [(2, [8], 0.25)]),
        (0, 2, [(2, [8], 0.25)]),  # a copy takes nothing more
    )
    assert node_novelties(group) == pytest.approx({PROMPT: 0.1, Node(0, 1): 0.25})
    # One row more: 0.1 / (1 row, no call) at the prompt, 0.25 / 3 at the node
    group.rows = range(10, 14)
    for seed in range(5):
        chosen = rule("expansion", branch_measure="novelty").expand(group, random.Random(seed))
        assert chosen == [PROMPT]
    group.trajectories.pop()
    group.rows = range(10, 13)
    assert rule("expansion", branch_measure="novelty").expand(group, random.Random(0)) == [Node(0, 1)]  # 0.25 / 2


# Rollouts


WORDS = {3: 0.6, 4: 0.25, 5: 0.15}  # what may follow a tool result


def small_rollout(seed, groups, size, initial, branching, limits, eager=False):
    """A prompt is followed by a call, a result by one of three words and another call or the end."""
    rng = random.Random(seed)
    batches, kept, calls = [], [], []

    def sample(contexts, budgets):
        batches.append([tuple(context) for context in contexts])
        samples = []
        for context, budget in zip(contexts, budgets, strict=True):
            word = rng.choices(list(WORDS), list(WORDS.values()))[0]
            last = END if context.count(CALL) == 2 else CALL
            ids = [word, last][:budget]
            samples.append(Sample(ids, [rng.random() for _ in ids], [math.log(WORDS[word]), 0.0][:budget]))
        return samples

    def submit(trajectory, turn):
        futures = []
        for call in turn:
            calls.append(call)
            call.result = "1"
            future = Future()
            future.set_result(call)
            futures.append(future)
        return futures

    parts = group_parts(0, groups * size, size, initial)
    hooks = RolloutHooks(sample=sample, tools_of=lambda row: {}, submit=submit, keep=kept.append)
    prompts = [[100 + row // size] for row in range(groups * size)]
    run_waves(parts, prompts, RandomProtocol(), hooks, branching, limits, random.Random(seed), END.__eq__, eager)
    return parts, batches, kept, calls


LIMITS = Limits(completion=30, context=50, tool_turns=5)


def texts_by_node(group):
    nodes = {(row.parent, row.fork_token) for row in group.trajectories if row.parent is not None}
    for node in nodes:
        yield [tuple(row.completion_ids[s.start : s.end]) for row, s in sampled_at(group, *node)]


@pytest.mark.parametrize("eager", [False, True])
@settings(max_examples=100, deadline=None)
@given(case=cases())
def test_forks_differ_and_rows_are_as_many(eager, case):
    case["limits"] = LIMITS
    case["branching"].fork_tries = 60
    groups, batches, kept, calls = small_rollout(**case, eager=eager)
    rows = [row for group in groups for row in group.trajectories]
    assert len(rows) == case["groups"] * case["size"]
    for group in groups:
        for texts in texts_by_node(group):
            assert len(set(texts)) == min(len(texts), len(WORDS)), "as many different ones as there are"
    sampled = sum(len(row.segments) - sum(s.start < (row.fork_token or 0) for s in row.segments) for row in rows)
    thrown_away = sum(row.rejected_tokens for row in rows)
    assert sum(map(len, batches)) == sampled + thrown_away / 2, "each is a segment of two tokens"
    assert len(calls) == sum(not own.shared for row in rows for own in row.calls), "what is thrown away calls nothing"
    for row in rows:
        assert row.kind == "fork" or row.rejected_tokens == 0


def test_one_try_is_independent_sampling():
    case = dict(seed=4, groups=3, size=6, initial=2, limits=LIMITS)
    plain = small_rollout(**case, branching=branching(100, "random", branch_probability=1.0))
    chosen = branching(100, "random", branch_probability=1.0)
    chosen.fork_tries = 1
    assert small_rollout(**case, branching=chosen)[0] == plain[0]
    assert any(len(set(texts)) < len(texts) for group in plain[0] for texts in texts_by_node(group))


def test_forks_of_all_nodes_are_tried_together_and_what_the_others_go_on_from_is_kept():
    chosen = branching(100, "random", branch_probability=1.0)
    chosen.fork_tries = 3
    for seed in range(20):
        groups, batches, kept, _ = small_rollout(
            seed=seed, groups=4, size=4, initial=2, limits=LIMITS, branching=chosen
        )
        assert len(batches) <= 3 * 5, "at most three calls of the engine a wave"
        rows = [row for group in groups for row in group.trajectories]
        for context in (context for contexts in kept for context in contexts):
            assert any([*row.prompt_ids, *row.completion_ids][: len(context)] == context for row in rows)
    assert len(kept) == len(batches)


def test_weighted_rollouts_have_the_expectation_of_independent_ones():
    values = {3: 5.0, 4: 0.0, 5: 0.0}
    expected = sum(WORDS[word] * value for word, value in values.items())
    chosen = branching(100, "random", branch_probability=1.0, branch_factor=2)
    chosen.fork_tries = 100
    means = {"plain": 0.0, "weighted": 0.0}
    count = 3000
    for seed in range(count):
        (group,), *_ = small_rollout(seed=seed, groups=1, size=2, initial=1, limits=LIMITS, branching=chosen)
        rows = sampled_at(group, 0, group.trajectories[1].fork_token)
        weights = fork_weights(group)
        for row, segment in rows:
            value = values[row.completion_ids[segment.start]] / 2 / count
            means["plain"] += value
            means["weighted"] += value * weights[row.row]
    assert means["weighted"] == pytest.approx(expected, abs=0.15)
    assert abs(means["plain"] - expected) > 0.3, "what differs is drawn too often"


# With a model


class Search:
    def s(self, query: str) -> str:
        """Look up."""
        return "R"


CHOICE = plan("A<s>q</s>?c", (9, {"x": math.log(0.7), "y": math.log(0.1), "z": math.log(0.1), "w": math.log(0.1)}))


@pytest.mark.parametrize("rule_name", ["threshold", "expansion"])
def test_forks_of_the_trainer_differ(tmp_path, rule_name):
    settings_ = {"branch_rule": rule_name, "fork_tries": 400, "branch_factor": 3, "branch_probability": 1.0}
    rows, trainer, model = rollout(tmp_path, [CHOICE], [Search().s], 1, 4, fork_sampling="distinct", **settings_)
    forks = [row for row in rows if row["kind"] == "fork"]
    ends = [row["text"][-len("xc<end>") :] for row in rows if row["kind"] == "fork" or row["row"] == 0]
    assert len(forks) >= 2 and len(set(ends)) == len(ends)
    assert trainer.state.log_history[0]["arpo/rejected_tokens"] > 0 and len(model.batches) > 3


@pytest.mark.parametrize("sampling", ["distinct", "weighted"])
def test_weights_reach_the_advantage(tmp_path, sampling):
    choice = plan("A<s>q</s>?c", (9, {"x": math.log(0.6), "y": math.log(0.4)}))
    rows, *_ = rollout(
        *(tmp_path, [choice], [Search().s], 1, 2),
        branch_probability=1.0,
        fork_sampling=sampling,
        fork_tries=200,
        branch_measure="novelty",
        branch_threshold=0.0,
        scale_rewards="none",
        reward=lambda completions, **kwargs: [float("x" in text) for text in completions],
    )
    assert {row["text"][-7] for row in rows} == {"x", "y"}
    for row in rows:
        chance = 0.6 if row["rewards"]["<lambda>"] else 0.4
        assert math.exp(row["segments"][1]["logprob"]) == pytest.approx(chance, rel=1e-4)
        # weights (1 − 0.4) / 1 and (1 − 0.6) / 1, times 2
        weight = 2 * chance if sampling == "weighted" else 1.0
        assert row["advantage"] == pytest.approx((0.5 if chance == 0.6 else -0.5) * weight, rel=1e-4)
    (decided,) = [row["segments"][1]["branch_probability"] for row in rows if row["kind"] == "initial"]
    assert decided == pytest.approx(1 - math.exp(rows[0]["segments"][1]["logprob"]), rel=1e-4)


@pytest.mark.parametrize("sharing", [True, False])
def test_rows_trained_on_are_those_of_the_cache_or_without(agent_dirs, tokenizer, tmp_path, sharing):
    settings_ = {"branch_rule": "random", "branch_probability": 1.0, "fork_sampling": "weighted", "fork_tries": 4}
    trainer = build(agent_dirs, tokenizer, tmp_path, prefix_sharing=sharing, temperature=0.8, **settings_)
    seen = []
    sample = trainer._engine.sample

    def checked(contexts, limits):
        samples = sample(contexts, limits)
        for context, told in zip(contexts, samples, strict=True):
            with torch.no_grad():
                logits = trainer.model(torch.tensor([context + told.ids])).logits[0, len(context) - 1 : -1]
            logprobs = torch.log_softmax(logits / 0.8, dim=-1)[range(len(told.ids)), told.ids]
            assert told.logprobs == pytest.approx(logprobs.tolist(), abs=1e-3)
            seen.append(told)
        return samples

    trainer._engine.sample = checked
    trainer.train()
    assert seen and any(row["kind"] == "fork" for row in records(tmp_path))
    assert json.loads(json.dumps(records(tmp_path))), "records stay JSON"
