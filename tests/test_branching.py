"""Entropies, gaps, probabilities and decisions, against numbers worked by hand."""

import math
import random
from collections import Counter

import pytest
from branching import rule

from arpo_trl.rollout.entropy import entropy_gap, mean_entropy, top_k_entropy
from arpo_trl.rollout.rules.base import allocate_forks
from arpo_trl.rollout.rules.expansion import expansion_weight, share_rows
from arpo_trl.rollout.rules.probability import fork_probability
from arpo_trl.rollout.tree import Segment, group_parts, initial_share


def test_mean_entropy_of_the_first_k_tokens():
    assert mean_entropy([1.0, 2.0, 9.0], window=2) == 1.5
    assert mean_entropy([1.0, 2.0], window=20) == 1.5  # a short segment is not read as a certain one
    assert mean_entropy([], window=20) is None


def test_top_k_entropy_spreads_the_remaining_mass():
    # p = 1/2, 1/4 and a rest of 1/4 over 2 tokens: 0.5 ln 2 + 0.25 ln 4 + 2 · 0.125 ln 8
    expected = 0.5 * math.log(2) + 0.25 * math.log(4) + 0.25 * math.log(8)
    assert top_k_entropy([math.log(0.5), math.log(0.25)], vocab_size=4) == pytest.approx(expected)
    # A uniform distribution is read exactly from any of its tokens
    assert top_k_entropy([math.log(1 / 8)] * 3, vocab_size=8) == pytest.approx(math.log(8))
    assert top_k_entropy([0.0, -math.inf], vocab_size=100) == 0.0
    assert top_k_entropy([math.log(0.5)] * 2, vocab_size=2) == pytest.approx(math.log(2))


def test_gap_and_probability():
    # k = 20, H_t − H_0 = 0.3, V = e^4: ΔH = 20 · 0.3 / 4 = 1.5; P = 0.5 + 0.2 · 1.5 = 0.8
    gap = entropy_gap(0.8, 0.5, window=20, vocab_size=math.e**4)
    assert gap == pytest.approx(1.5)
    assert fork_probability(gap, base=0.5, weight=0.2) == pytest.approx(0.8)
    assert fork_probability(9.0, base=0.5, weight=0.2) == 1.0
    assert fork_probability(-9.0, base=0.5, weight=0.2) == 0.0


def test_rules():
    rng = random.Random(0)
    threshold = rule("threshold", branch_threshold=0.5, branch_factor=3)
    assert threshold.forks(0.51, rng) == 3 and threshold.forks(0.5, rng) == 0
    for name in ("bernoulli", "random"):
        forks = rule(name, branch_factor=2).forks
        share = sum(forks(0.3, rng) == 2 for _ in range(4000)) / 4000
        assert share == pytest.approx(0.3, abs=0.03)
        assert all(forks(1.0, rng) for _ in range(100))
        assert not any(forks(0.0, rng) for _ in range(100))


def test_what_a_rule_reads_of_a_segment():
    unsure = Segment(10, 20, entropy=1.0, entropy_gap=1.5)
    for name, probability, priority in (("bernoulli", 0.8, 1.5), ("threshold", 0.8, 1.5), ("random", 0.5, 0.0)):
        assert rule(name).probability(unsure) == pytest.approx(probability)
        assert rule(name).priority(unsure) == priority
    for name in ("expansion", "random_expansion"):
        assert rule(name).probability(unsure) is None and rule(name).expands


def test_the_budget_goes_to_the_largest_gap():
    rng = random.Random(0)
    assert allocate_forks([0.1, 0.9, 0.5], [1, 1, 1], budget=2, rng=rng) == [0, 1, 1]
    assert allocate_forks([0.1, 0.9, 0.5], [2, 2, 2], budget=3, rng=rng) == [0, 2, 1]
    assert allocate_forks([0.1, 0.9], [1, 1], budget=0, rng=rng) == [0, 0]
    assert allocate_forks([], [], budget=4, rng=rng) == []


def test_ties_are_broken_at_random():
    rng = random.Random(0)
    winners = Counter(tuple(allocate_forks([1.0, 1.0, 1.0], [1, 1, 1], 1, rng)).index(1) for _ in range(3000))
    assert all(count == pytest.approx(1000, abs=120) for count in winners.values())


def test_initial_share_of_parts():
    assert [initial_share(a, a + 8, 16, 8) for a in (0, 8)] == [4, 4]
    assert [initial_share(a, a + 4, 16, 6) for a in (0, 4, 8, 12)] == [1, 2, 1, 2]
    assert initial_share(0, 2, 16, 1) == 1  # a part is never left without


def test_parts_of_groups_on_processes():
    # 2 groups of 8 on 2 processes with 8 rows each, and 3 groups of 8 on 2 processes with 12 rows each
    whole = group_parts(8, 8, group_size=8, num_initial=4)
    assert [(part.rows, part.num_initial, part.first_row) for part in whole] == [(range(0, 8), 4, 0)]
    first, second = (group_parts(process * 12, 12, group_size=8, num_initial=4) for process in (0, 1))
    assert [(part.rows, part.num_initial, part.first_row) for part in first] == [
        (range(0, 8), 4, 0),
        (range(8, 12), 2, 0),
    ]
    assert [(part.rows, part.num_initial, part.first_row) for part in second] == [
        (range(0, 4), 2, 4),
        (range(4, 12), 4, 0),
    ]


def test_the_weight_of_a_node_is_entropy_for_its_cost():
    assert expansion_weight(0.6, calls=2) == pytest.approx(0.2)
    assert expansion_weight(0.6, calls=0) == 0.6  # after the last call a row costs its tokens alone


def test_rows_are_shared_in_proportion_to_weight():
    rng = random.Random(0)
    # 0.9; then 0.9 / 2 < 0.5; then 0.45 is the largest again
    assert share_rows([0.9, 0.5, 0.2], [1, 1, 1], rows=3, rng=rng) == [2, 1, 0]
    # What has been sampled before counts: 0.3, 0.5, 0.2; then 0.3, 0.25, 0.2; then 0.225, 0.25, 0.2
    assert share_rows([0.9, 0.5, 0.2], [3, 1, 1], rows=3, rng=rng) == [1, 2, 0]
    assert share_rows([6.0, 3.0, 1.0], [1, 1, 1], rows=97, rng=rng) == [59, 29, 9]  # with the first ones 60, 30, 10
    assert share_rows([0.5], [1], rows=0, rng=rng) == [0]


def test_nodes_of_equal_weight_get_rows_at_random():
    first = Counter(share_rows([0.0, 0.0, 0.0], [1, 1, 1], 1, random.Random(seed)).index(1) for seed in range(300))
    assert set(first) == {0, 1, 2} and min(first.values()) > 60
