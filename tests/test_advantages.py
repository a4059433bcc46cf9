"""Hard and tree attribution, against numbers worked by hand."""

import random

from hypothesis import given
from hypothesis import strategies as st

from arpo_trl.advantages import Span, hard_advantages, tree_advantages


def test_a_tree_of_three_levels():
    # row 0: 100 tokens; row 1 leaves 0 at 40; row 2 leaves 1 at 70; row 3 leaves 0 at 60; row 4 on its own
    spans = hard_advantages(
        advantages=[1.0, -1.0, 3.0, 0.0, 5.0],
        parents=[None, 0, 1, 0, None],
        fork_tokens=[None, 40, 70, 60, None],
        lengths=[100, 90, 80, 75, 10],
    )
    everyone, left, below = (1 - 1 + 3 + 0) / 4, (1 + 0) / 2, (-1 + 3) / 2
    assert spans[0] == [Span(0, 40, everyone), Span(40, 60, left), Span(60, 100, 1.0)]
    assert spans[1] == [Span(0, 40, everyone), Span(40, 70, below), Span(70, 90, -1.0)]
    assert spans[2] == [Span(0, 40, everyone), Span(40, 70, below), Span(70, 80, 3.0)]
    assert spans[3] == [Span(0, 40, everyone), Span(40, 60, left), Span(60, 75, 0.0)]
    assert spans[4] == [Span(0, 10, 5.0)]


def test_two_forks_at_one_token():
    spans = hard_advantages([3.0, 0.0, 0.0], [None, 0, 0], [None, 5, 5], [9, 8, 7])
    assert [row[0] for row in spans] == [Span(0, 5, 1.0)] * 3


def test_nothing_shared_is_soft():
    assert hard_advantages([1.0, 2.0], [None, None], [None, None], [4, 6]) == [[Span(0, 4, 1.0)], [Span(0, 6, 2.0)]]


def test_tree_compares_a_branch_with_what_was_before_it():
    # row 0: 100 tokens; row 1 leaves 0 at 40; row 2 leaves 1 at 70; row 3 on its own
    spans = tree_advantages([1.0, -2.0, 4.0, -3.0], [None, 0, 1, None], [None, 40, 70, None], [100, 90, 80, 10])
    # V of the tokens before 40 is (1 - 2 + 4) / 3 = 1, of those between 40 and 70 of row 1 (-2 + 4) / 2 = 1
    assert spans[0] == [Span(0, 40, 1.0), Span(40, 100, 1 - 1 / 2)]
    assert spans[1] == [Span(0, 40, 1.0), Span(40, 70, 1 - 1 / 2), Span(70, 90, -2 - 1 / 2)]
    assert spans[2] == [Span(0, 40, 1.0), Span(40, 70, 1 - 1 / 2), Span(70, 80, 4 - 1 / 2)]
    assert spans[3] == [Span(0, 10, -3.0)]


@given(st.integers(1, 12), st.randoms(use_true_random=False))
def test_every_token_has_the_mean_of_the_rows_that_share_it(rows: int, rng: random.Random):
    parents, forks, lengths, owners = [], [], [], []
    for row in range(rows):
        parent = rng.choice([None, *range(row)]) if row else None
        # a fork leaves after its parent's own start and before its parent's end
        start = (forks[parent] or 0) if parent is not None else 0
        fork = rng.randint(start, lengths[parent] - 1) if parent is not None else None
        length = (fork or 0) + rng.randint(1, 9)
        owner = (owners[parent][:fork] if parent is not None else []) + [row] * (length - (fork or 0))
        parents, forks, lengths, owners = parents + [parent], forks + [fork], lengths + [length], owners + [owner]
    advantages = [rng.randint(-9, 9) for _ in range(rows)]
    spans = hard_advantages(advantages, parents, forks, lengths)
    for row in range(rows):
        covered = [position for span in spans[row] for position in range(span.start, span.end)]
        assert covered == list(range(lengths[row]))
        for span in spans[row]:
            for position in range(span.start, span.end):
                sharing = [
                    other
                    for other in range(rows)
                    if position < lengths[other] and owners[other][position] == owners[row][position]
                ]
                assert abs(span.advantage - sum(advantages[other] for other in sharing) / len(sharing)) < 1e-9
