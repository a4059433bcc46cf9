r"""Rows that the reward of the ARPO paper's released code scores wrongly, with the right score and the reason.

`released` is what `deep_research.compute_score` of that code returns for `text`; it was measured once by running it,
and is here as a number only.
"""

from dataclasses import dataclass, field

import pytest

from arpo_trl.rewards import arpo_reward


@dataclass
class Case:
    """A row: the `parts` of its text in order, ("model" | "tool", text), and the calls that were executed in it."""

    reason: str
    parts: list[tuple[str, str]]
    truth: str | list[str]
    ability: str
    released: float
    right: float
    executed: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(text for _, text in self.parts)

    @property
    def model_text(self) -> str:
        return "".join(text for author, text in self.parts if author == "model")

    @property
    def tool_calls(self) -> list[dict]:
        calls = [(name, None) for name in self.executed] + [(name, "timed out") for name in self.failed]
        return [
            {
                "name": name,
                "arguments": {},
                "result": "",
                "error": error,
                "seconds": 0.0,
                "cached": False,
                "shared": False,
            }
            for name, error in calls
        ]


def says(answer: str, thought: str = "So it is.") -> list[tuple[str, str]]:
    return [("model", rf"<think>{thought}</think><answer>\boxed{{{answer}}}</answer>")]


def searches(query: str, result: str, answer: str) -> list[tuple[str, str]]:
    return [
        ("model", f"<think>Look it up.</think><search>{query}</search>"),
        ("tool", f"<result>{result}</result>"),
        *says(answer),
    ]


CASES = [
    # mathematics
    Case("punctuation is dropped: the sign is lost", says("-3"), "3", "math", 1.0, 0.0),
    Case("punctuation is dropped: a half equals twelve", says("1/2"), "12", "math", 1.0, 0.0),
    Case("punctuation is dropped: the decimal point is lost", says("1.5"), "15", "math", 1.0, 0.0),
    Case("equal values in different notation", says("1/2"), "0.5", "math", 0.0, 1.0),
    Case("equal values in different notation", says(r"\dfrac{8}{17}"), r"\frac{40}{85}", "math", 0.0, 1.0),
    Case("an exponent is not a digit", says("2^{10}"), "210", "math", 1.0, 0.0),
    Case("a product is not a list of digits", says(r"(1,2)"), "12", "math", 1.0, 0.0),
    Case("the order of a sum does not matter", says("274i+1"), "1+274i", "math", 0.0, 1.0),
    Case("a thousands separator next to a fraction bar", says("518400"), r"518,\!400.0", "math", 0.0, 1.0),
    Case("a word of the truth is no part of the answer", says("x + 2"), "x - 2", "math", 1.0, 0.0),
    Case("naming every candidate earns no part", says("1, 2, 3, 4"), "3", "math", 0.4, 0.0),
    Case("a currency sign and a unit are no tokens", says(r"\$950.00"), r"\$950", "math", 0.0, 1.0),
    # answers in words
    Case("LaTeX markup sticks to the word", says(r"\text{Paris}"), "Paris", "qa", 0.0, 1.0),
    Case("the sign of a number in words is lost", says("-40"), "40", "qa", 1.0, 0.0),
    Case("nothing is left of an answer of articles", says("The The"), "The The", "qa", 0.0, 1.0),
    Case(
        r"a box with a space before its brace hides the one after it",
        [("model", r"<think>a</think><answer>not \boxed {Rome} but \boxed{Paris}</answer>")],
        "Paris",
        "qa",
        0.0,
        1.0,
    ),
    Case("a printed brace is taken for a group", says(r"\{1, 2"), r"\{1, 2", "math", -1.0, 1.0),
    # format: what a tool answers is not the model's fault, nor its merit
    Case(
        "a page that holds <think>",
        searches("q", "how to write <think> in HTML", "Paris"),
        "Paris",
        "qa",
        -1.0,
        1.0,
        ["search"],
    ),
    Case(
        "a page that holds <answer>",
        searches("q", "<answer>\\boxed{Rome}</answer>", "Paris"),
        "Paris",
        "qa",
        -1.0,
        1.0,
        ["search"],
    ),
    Case(
        "a page that mentions </result>",
        searches("q", "it ends with </result> <search>", "Paris"),
        "Paris",
        "qa",
        -1.0,
        1.0,
        ["search"],
    ),
    Case(
        "a page that brings the answer for a model that gives none",
        [
            ("model", "<think>Look it up.</think><search>q</search>"),
            ("tool", "<result><answer>\\boxed{Paris}</answer></result>"),
            ("model", "<think>I do not know.</think>"),
        ],
        "Paris",
        "qa",
        1.0,
        -1.0,
        ["search"],
    ),
    Case(
        "code that prints a tag",
        [
            ("model", '<think>Run it.</think><python>print("<answer>")</python>'),
            ("tool", "<result>4</result>"),
            *says("4"),
        ],
        "4",
        "math",
        -1.0,
        1.0,
        ["python"],
    ),
    Case(
        "a thought that mentions a tag",
        says("4", "I could <search> for it, and end with <answer>."),
        "4",
        "math",
        -1.0,
        1.0,
    ),
    Case(
        "the model writes the search result itself",
        [
            (
                "model",
                "<think>a</think><search>q</search><result>Paris</result>"
                "<think>b</think><answer>\\boxed{Paris}</answer>",
            )
        ],
        "Paris",
        "qa",
        1.0,
        -1.0,
    ),
    Case(
        "the whole answer is part of a thought",
        [("model", "<think>So <answer>\\boxed{4}</answer></think>")],
        "4",
        "math",
        1.0,
        -1.0,
    ),
    Case("the row goes on after the answer", [*says("4"), ("model", " and on, and on")], "4", "math", 1.0, -1.0),
    Case("the row thinks after the answer", [*says("4"), ("model", "<think>or 5?</think>")], "4", "math", 1.0, -1.0),
    Case(
        "thoughts close before they open",
        [("model", "</think>hm<think><answer>\\boxed{4}</answer>")],
        "4",
        "math",
        1.0,
        -1.0,
    ),
    # the bonus: executed calls
    Case("tools that are only mentioned", says("4", "No need of </search> or </python>."), "4", "math", 1.1, 1.0),
    Case(
        "a page that holds </python>",
        searches("q", "write code between <b>and</b> </python>", "Paris"),
        "Paris",
        "qa",
        1.1,
        1.0,
        ["search"],
    ),
    Case(
        "a call that never ran",
        [
            ("model", "<think>a</think><search>q</search>"),
            ("tool", "<result>Paris</result>"),
            ("model", "<think>b</think><python></python>"),
            ("tool", "<result>The call is empty.</result>"),
            *says("Paris"),
        ],
        "Paris",
        "qa",
        1.1,
        1.0,
        ["search"],
        ["python"],
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.reason)
def test_released_reward_is_wrong_and_ours_is_right(case: Case):
    pytest.importorskip("math_verify")
    assert case.released != case.right, "not a case"
    rewards = arpo_reward(
        completions=[[{"role": "assistant", "content": case.text}]],
        model_text=[case.model_text],
        tool_calls=[case.tool_calls],
        answer=[case.truth],
        ability=[case.ability],
    )
    assert rewards == [pytest.approx(case.right)]
