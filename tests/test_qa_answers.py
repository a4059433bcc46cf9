"""Short answers in words: pairs by kind from `tests/answers/qa_pairs.json`, [truth, answer, exact match]."""

import json
from pathlib import Path

import pytest
from random_answers import random_answers

from arpo_trl.rewards import exact_match, normalize_answer, token_f1

PAIRS = json.loads((Path(__file__).parent / "answers/qa_pairs.json").read_text())


@pytest.mark.parametrize("kind", PAIRS)
def test_pairs(kind):
    wrong = [(truth, answer) for truth, answer, right in PAIRS[kind] if exact_match(answer, truth) != right]
    assert not wrong


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("“Rosemary’s” Baby", "rosemarys baby"),
        ("1988–1990", "1988-1990"),
        ("Jean‑Luc", "jeanluc"),
        ("-$5", "-5"),
        ("(-5)", "-5"),
        ("$-5", "-5"),
        ("3-1, 2:1, 1/2", "3-1 2:1 1/2"),
        ("1,234,567 and 1,5", "1234567 and 1,5"),
        ("《红楼梦》。", "红楼梦"),
        ("２０２０", "2020"),
        ("C++ or C#", "c++ or c#"),
        ("#1", "1"),
        ("Serie A", "serie a"),
        ("10²", "10^2"),
        ("½", "1/2"),
        (r"\textbf{\mathsf{Paris}}\quad", "paris"),
        (r"\frac{1}{2}", "1/2"),
        ("New\u200b York", "new york"),
    ],
)
def test_normalize_answer(text, expected):
    assert normalize_answer(text) == expected


def test_f1_of_signs_and_letters():
    assert token_f1("5", "-5") == token_f1("12", "1/2") == token_f1("C", "C++") == 0
    assert token_f1("Serie", "Serie A") == pytest.approx(2 / 3)
    assert token_f1("12 May 1990", "May 12, 1990") == 1


def test_random_answers_raise_nothing():
    for text in random_answers(10_000, seed=1):
        assert len(normalize_answer(text)) <= 18 * len(text)
        assert 0 <= token_f1(text, "Paris 5") <= 1
