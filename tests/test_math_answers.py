r"""Answers in mathematics in the notations that models and data sets write them in.

`tests/answers/math_pairs.json` holds pairs by kind, [truth, answer, whether it is right]; most were written before the
code had seen them.
"""

import json
import os
import signal
from pathlib import Path

import pytest
from random_answers import random_answers

from arpo_trl.rewards import MathVerifier, math_reward
from arpo_trl.rewards.math_notation import intervals, normalise
from arpo_trl.rewards.math_readings import quantity, readings, sentence_value, units_clash
from arpo_trl.rewards.mathematics import MAX_LENGTH, clean_answer

ROOT = Path(__file__).parents[1]
PAIRS = json.loads((ROOT / "tests/answers/math_pairs.json").read_text())


@pytest.fixture(scope="module")
def verifier():
    pytest.importorskip("math_verify")
    verifier = MathVerifier(workers=2)
    yield verifier
    verifier.close()


def boxed(answer: str) -> str:
    return rf"<think>So.</think><answer>\boxed{{{answer}}}</answer>"


def test_pairs_of_every_kind(verifier):
    pairs = [pair for kind in PAIRS.values() for pair in kind]
    rewards = math_reward([boxed(a) for _, a, _ in pairs], answer=[truth for truth, _, _ in pairs], verifier=verifier)
    wrong = [pair for pair, reward in zip(pairs, rewards, strict=True) if reward != pair[2]]
    assert len(pairs) > 500
    assert len(wrong) <= 0.01 * len(pairs), wrong
    page = (ROOT / "docs/data.md").read_text()
    unlisted = [pair for pair in wrong if not pair[2] and f"| `{pair[0]}` | `{pair[1]}` |" not in page]
    assert not unlisted, "wrong answers that are paid and not listed in docs/data.md"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x² ≤ ½", r"x^{2} \le \frac{1}{2}"),
        ("–５", "-5"),
        (r"\textcolor{red}{\textbf{5}}", "5"),
        ("**5**.", "5"),
        ("1, 2, ..., n", r"1, 2, \ldots, n"),
        ("0.333...", "0.333"),
        (r"€1\,234\,567", "1234567"),
        ("negative 5 million", r"-5\times10^{6}"),
        (r"0.1\overline{6}", r"\frac{1}{6}"),
        (r"0.\dot{1}4\dot{2}", r"\frac{142}{999}"),
        ("3*x**2 - sqrt(2)/2", r"3 \cdot x^{2}-\frac{\sqrt{2}}{2}"),
        ("-(x + 1)**2", "-(x+1)^{2}"),
        ("Fraction(-3, 4)", r"\frac{-3}{4}"),
        ("1.5e-05", r"1.5\times10^{-5}"),
        ("[[1, 2], [3, 4]]", r"\begin{pmatrix}1 & 2 \\ 3 & 4\end{pmatrix}"),
        ("2 3/4", r"2\frac{3}{4}"),
        (r"\{x \mid 1 < x \le 2\}", "(1,2]"),
        (r"\left\langle 1, 2 \right\rangle", "( 1, 2)"),
        # what looks like one of these, and is none
        ("x_1", "x_1"),
        ("101_2", "101_2"),
        ("1,234", "1,234"),
        ("abc", "abc"),
        (r"\sum_{i=1}^n i", r"\sum_{i=1}^n i"),
    ],
)
def test_notation(text, expected):
    assert normalise(text) == expected
    assert normalise(expected) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("18 eggs", ("18", "eggs")),
        (r"9.8\text{ m/s}^2", ("9.8", "m/s^2")),
        (r"36\pi\ \mathrm{cm}^3", (r"36\pi", "cm^3")),
        ("20米", ("20", "米")),
        (r"18 \text{ (dollars)}", ("18", "dollars")),
        ("21st", ("21", "")),
        ("5 or more", ("5 or more", "")),
        ("5 less than 10", ("5 less than 10", "")),
        ("3 xy", ("3 xy", "")),
        ("2 sin x", ("2 sin x", "")),
        ("x - y", ("x - y", "")),
    ],
)
def test_value_and_unit(text, expected):
    assert quantity(normalise(text)) == expected


def test_units_that_clash():
    assert units_clash("km", "m") and units_clash("cm^2", "cm^3") and units_clash("hours", "minutes")
    assert not units_clash("km/h", "kilometers per hour") and not units_clash("miles per hour", "mph")
    assert not units_clash("eggs", "kg") and not units_clash("", "kg") and not units_clash("square cm", "cm^2")


def test_one_number_of_a_sentence():
    assert sentence_value("The answer is 18") == "18"
    assert sentence_value("Janet makes 18 every day") == "18"
    assert sentence_value("Total: 18") == "18"
    for text in ("March 4", "at least 3", "5 of 9", "it is 4 or 5", "the sum of 3", "Room 5", "no 5"):
        assert sentence_value(text) is None


def test_inequalities_as_intervals():
    assert intervals(r"x<1 \text{ or } x\ge 2") == ("x", r"(-\infty,1)\cup[2,\infty)")
    assert intervals(r"x \le 3 \text{ and } x > 1") == ("x", "(1,3]")
    assert intervals(r"3 > t \geq -1") == ("t", "[-1,3)")
    assert intervals(r"x \ne 0") == ("x", r"(-\infty,0)\cup(0,\infty)")
    assert intervals("a < b") is None and intervals("1 < x > 2") is None and intervals("5") is None


@pytest.mark.parametrize(
    ("truth", "answer", "expected"),
    [
        ("0", "0.0000001", 0),
        ("1", "0.9999999999", 0),
        (r"\frac{1}{3}", "0.33333333", 1),
        (r"\frac{1}{3}", "0.333334", 0),
        ("0.1", "0.10000000000000001", 1),
        (r"(1, 10^{-20})", "(1, 2\\cdot 10^{-20})", 0),
        (r"\{10^{-20}, 1\}", r"\{10^{-21}, 1\}", 0),
        (r"\begin{pmatrix}10^{-20}\\1\end{pmatrix}", r"\begin{pmatrix}10^{-21}\\1\end{pmatrix}", 0),
        (r"\sqrt{2}\cdot 10^{40}", r"\sqrt{2}\cdot 10^{40}+1", 0),
        (r"10^{-20} x", r"2\cdot 10^{-20} x", 0),
    ],
)
def test_numbers_are_compared_in_their_own_size(verifier, truth, answer, expected):
    assert math_reward([boxed(answer)], answer=[truth], verifier=verifier) == [expected]


def test_a_choice_with_its_value_has_to_be_right_in_both(verifier):
    answers = ["C", "12", "C: 12", "C. 24/2", "C: 13", "B: 12", "13"]
    rewards = math_reward([boxed(a) for a in answers], answer=["C: 12"] * len(answers), verifier=verifier)
    assert rewards == [1, 1, 1, 1, 0, 0, 0]


def test_random_answers_raise_nothing_and_stay_bounded():
    truths = ["18", "x^2+1", "[1,2)", "A", r"\text{Yes}", "101_2", "3:45 pm", r"\{1,2\}", r"60^\circ"]
    for i, text in enumerate(random_answers(10_000)):
        cleaned = clean_answer(text)
        assert len(cleaned) <= 16 * len(text) + 64
        cleaned.encode("utf-8")  # no lone surrogate is left
        if len(cleaned) > MAX_LENGTH:
            continue
        for found in (readings(truths[i % 9], cleaned), readings(cleaned, truths[(i + 4) % 9])):
            assert isinstance(found, bool) or len(found) <= 8


@pytest.mark.parametrize("step", [1, 7, 40])
def test_the_time_of_a_run_of_letters_is_not_exponential(step):
    """2^n ways to split a word would not end."""
    word = ("ab" * 60)[: 30 * step]
    assert quantity(f"5 {word},x") == (f"5 {word},x", "")
    assert sentence_value(f"there are 5 {word};") is None


def test_random_answers_in_the_workers(verifier):
    texts = [text for text in random_answers(400, seed=3) if len(text) < 400][:120]
    rewards = math_reward([boxed("x")] * len(texts), answer=[t or "1" for t in texts], verifier=verifier)
    assert all(reward in (0.0, 1.0, None) for reward in rewards)
    assert math_reward([boxed("4/2")], answer=["2"], verifier=verifier) == [1.0]


def test_hostile_answers_score_nothing(verifier):
    hostile = [
        "(" * 300 + "5" + ")" * 300 + "x",
        "9" * 1_000_000,
        "9" * (MAX_LENGTH - 1),
        "\ud8005\x00x",
        r"\frac{5}{0}",
    ]
    assert math_reward([boxed(a) for a in hostile], answer=["5"] * len(hostile), verifier=verifier) == [0.0] * len(
        hostile
    )
    assert math_reward([boxed("\ud8005\x00")], answer=["5"], verifier=verifier) == [1.0]
    long = "9" * 1_000_000
    assert math_reward([boxed(long)], answer=[long], verifier=verifier) == [1.0]


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="processes cannot be stopped here")
@pytest.mark.parametrize("answer", ["4/2", "+".join(["1"] * 60_000)], ids=["short", "longer than the pipe holds"])
def test_a_comparison_that_hangs_without_cpu_time_is_given_up(answer):
    pytest.importorskip("math_verify")
    verifier = MathVerifier(workers=1, wall_timeout=1.0)
    try:
        verifier.wall_timeout = 60.0
        assert verifier.compare([("2", "4/2")])[0].equal
        stopped = verifier._idle.queue[0]
        os.kill(stopped.pid, signal.SIGSTOP)
        verifier.wall_timeout = 1.0
        assert verifier.compare([("2", answer)]) == [None]
        assert stopped.returncode is not None
        verifier.wall_timeout = 60.0
        assert verifier.compare([("2", "4/2")])[0].equal
        assert verifier._idle.queue[0].pid != stopped.pid
    finally:
        verifier.close()


def test_the_function_of_math_verify_that_is_replaced_is_there():
    """`math_worker.py` puts `numeric_eq` in its place, which takes the same arguments."""
    grader = pytest.importorskip("math_verify.grader")
    import inspect

    from arpo_trl.rewards.math_worker import numeric_eq

    assert len(inspect.signature(grader.sympy_numeric_eq).parameters) == len(inspect.signature(numeric_eq).parameters)
    assert "sympy_numeric_eq(" in inspect.getsource(grader.sympy_expr_eq)
    assert callable(grader.get_pct_val)
