"""The reward of the ARPO paper (https://huggingface.co/papers/2507.19849, Eq. 8).

Bad format: -1. Good format and a wrong answer: 0. Otherwise the accuracy, plus 0.1 if both a search and a Python call
were executed in the row. Format is judged on the model's own text; a tool that is only mentioned earns nothing.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

from transformers.utils import logging

from .completions import executed_tools, final_answers, mean
from .format import chat_format_reward, tags_format_reward
from .mathematics import math_reward
from .qa import token_f1_reward

RewardFunction = Callable[..., Sequence[float | None]]

# What the `ability` column of published sets says, without regard to case: mathematics in ARPO's, DAPO's, Skywork's
# and verl's, questions in ARPO's and in Search-R1's
MATH_ABILITIES = {"math", "mathematics"}
QA_ABILITIES = {"qa", "fact-reasoning"}

logger = logging.get_logger(__name__)


def ability_name(ability: Any) -> str:
    """The name of an ability, as it is compared: lower case, no white space around it; `"qa"` where there is none."""
    return str(ability or "").strip().lower() or "qa"


def is_math(ability: Any) -> bool:
    """Whether rows of this ability are mathematics; case does not matter."""
    return ability_name(ability) in MATH_ABILITIES


def make_arpo_reward(
    protocol: Literal["tags", "chat_template"] = "tags",
    qa_reward: RewardFunction = token_f1_reward,
    math_reward: RewardFunction = math_reward,
    multi_tool_bonus: float = 0.1,
    search_tools: Sequence[str] = ("search",),
    python_tools: Sequence[str] = ("python",),
) -> RewardFunction:
    """
    Make the paper's reward.

    Args:
        protocol (`str`): Protocol whose format is judged, `"tags"` or `"chat_template"`.
        qa_reward, math_reward (`Callable`): Reward functions of accuracy, from 0 to 1. Rows whose `ability` column
            says `"math"` (in any case) go to `math_reward`, all others to `qa_reward`, also where there is no such
            column. An ability that is neither mathematics nor questions is told once, by its name.
        multi_tool_bonus (`float`): Added where a search and a Python call were executed and the answer is not wrong.
        search_tools, python_tools (`Sequence[str]`): Names of the tools that search, and of those that run code.

    Returns:
        `Callable`: A reward function named `arpo_reward`. It logs the mean of every part over all rows
        (`arpo_reward/bad_format`, `…/accuracy`, `…/accuracy_<ability>`, `…/multi_tool`), in which a bad format is an
        accuracy of 0, and `…/accuracy_good_format`, the mean accuracy of the rows of good format. What `qa_reward` and
        `math_reward` log is passed on, but for `<name>/mean`: they see the rows of good format alone. The parts of
        every row join the completions table. A row whose accuracy is `None` gets `None` unless its format is bad.
    """
    formats: dict[str, RewardFunction] = {"tags": tags_format_reward, "chat_template": chat_format_reward}
    if protocol not in formats:
        raise ValueError(f"protocol={protocol!r} is unknown: use one of {', '.join(map(repr, formats))}.")
    judge_format = formats[protocol]

    def arpo_reward(
        completions: list,
        ability: list[str] | None = None,
        model_text: list[str] | None = None,
        tool_calls: list[list[dict]] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
        log_extra: Callable[[str, list], None] | None = None,
        **kwargs: Any,
    ) -> list[float | None]:
        columns = {**kwargs, "completions": completions, "model_text": model_text}
        abilities = [ability_name(name) for name in ability or [""] * len(completions)]
        for name in sorted(set(abilities) - MATH_ABILITIES - QA_ABILITIES):
            logger.warning_once(
                f"The ability {name!r} is neither mathematics nor questions: its rows are scored by `qa_reward`. Call "
                "it 'math' or 'qa' in the data set if it is one of the two."
            )
        good_format = judge_format(**columns)
        accuracy: list[float | None] = [0.0] * len(completions)
        for judge, mathematics in ((math_reward, True), (qa_reward, False)):
            # a row with a bad format scores -1 whatever it answers: no judge is asked about it
            rows = [
                i for i, name in enumerate(abilities) if (name in MATH_ABILITIES) == mathematics and good_format[i]
            ]
            if rows:
                log = log_metric and _without_mean(judge, log_metric)
                for i, value in zip(rows, judge(**_select(columns, rows), log_metric=log), strict=True):
                    accuracy[i] = value
        used = executed_tools(completions, tool_calls)
        multi_tool = [not tools.isdisjoint(search_tools) and not tools.isdisjoint(python_tools) for tools in used]
        rewards = [
            -1.0 if not good else value and value + multi_tool_bonus * both
            for good, value, both in zip(good_format, accuracy, multi_tool, strict=True)
        ]
        if log_metric is not None:
            log_metric("arpo_reward/bad_format", mean([not good for good in good_format]))
            log_metric("arpo_reward/accuracy", mean([value for value in accuracy if value is not None]))
            scored = zip(good_format, accuracy, strict=True)
            if in_format := [value for good, value in scored if good and value is not None]:
                log_metric("arpo_reward/accuracy_good_format", mean(in_format))
            log_metric("arpo_reward/multi_tool", mean(multi_tool))
            for name in sorted(set(abilities)):
                of_ability = [value for value, other in zip(accuracy, abilities, strict=True) if other == name]
                log_metric(f"arpo_reward/accuracy_{name}", mean([value for value in of_ability if value is not None]))
        if log_extra is not None:
            log_extra("arpo_reward/answer", final_answers(completions, model_text))
            log_extra("arpo_reward/good_format", list(good_format))
            log_extra("arpo_reward/accuracy", accuracy)
            log_extra("arpo_reward/multi_tool", multi_tool)
        return rewards

    return arpo_reward


def _without_mean(judge: RewardFunction, log_metric: Callable[[str, float], None]) -> Callable[[str, float], None]:
    """`log_metric` that passes over the mean of `judge`, which would stand beside ours and be over other rows."""
    mean_name = f"{getattr(judge, '__name__', '')}/mean"

    def log(name: str, value: float) -> None:
        if name != mean_name:
            log_metric(name, value)

    return log


def _select(columns: dict[str, Any], rows: list[int]) -> dict[str, Any]:
    """The columns of some rows; what is not a column (a list with one entry per row) stays as it is."""
    size = len(columns["completions"])
    return {
        name: [value[i] for i in rows] if isinstance(value, list) and len(value) == size else value
        for name, value in columns.items()
    }


arpo_reward = make_arpo_reward()
arpo_reward.__doc__ = "The paper's reward for the tags protocol. See [`~rewards.make_arpo_reward`]."

arpo_chat_reward = make_arpo_reward("chat_template")
arpo_chat_reward.__name__ = "arpo_chat_reward"
arpo_chat_reward.__doc__ = "The paper's reward for the chat-template protocol. See [`~rewards.make_arpo_reward`]."
