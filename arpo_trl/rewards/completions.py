"""Read a completion: the model's own text, its final answer, the tools it ran. Pure functions on text and messages.

Completions come as a string, as the messages of the chat-template protocol (assistant turns with `tool_calls`, tool
turns), or as the one assistant message of the tags protocol, whose text holds the tool results.

What is not here: [`ARPOTrainer`] says which tokens the model wrote (`model_text`) and which calls were executed
(`tool_calls`). Plain TRL does not, so both are then read off the text, and a result that the model invented in the
tags protocol, right after a call, cannot be told from a real one.
"""

import re
from collections.abc import Sequence
from typing import Any

ANSWER_COLUMNS = ("answer", "solution", "ground_truth")

# A call's closing tag, right before a result. The token that ends the tag may reach beyond it ("><"), which leaves a
# character or two of the model's between the two.
_CALL_END = re.compile(r"</(?!(?:think|answer|result)>)([\w.-]+)>(?:\s*|[^\w>]{0,8}?)(?=<result>)")
_END_TOKEN = re.compile(r"(<\|[^|<>\s]{1,40}\|>|</s>|<eos>)\Z")


def ground_truths(columns: dict[str, Any]) -> list[list[str]]:
    """
    The accepted answers of every row.

    Args:
        columns (`dict[str, Any]`): Keyword arguments of a reward function. The first of the columns `answer`,
            `solution` and `ground_truth` is read; a row holds one answer or a list of them.

    Returns:
        `list[list[str]]`: Accepted answers per row; an empty list for a row that has none (`None` or blank).

    Raises:
        `ValueError`: There is no such column.
    """
    name = next((name for name in ANSWER_COLUMNS if columns.get(name) is not None), None)
    if name is None:
        present = sorted(key for key, value in columns.items() if isinstance(value, list))
        raise ValueError(
            f"No ground truth: the dataset has none of the columns {', '.join(ANSWER_COLUMNS)} (it has "
            f"{', '.join(present) or 'no columns'}). Rename the column that holds the answers to `answer`."
        )
    rows = [[row] if isinstance(row, str) or not isinstance(row, Sequence) else row for row in columns[name]]
    return [[str(truth) for truth in row if truth is not None and str(truth).strip()] for row in rows]


def model_texts(completions: list, model_text: list[str] | None = None) -> list[str]:
    """What the model wrote in each row, tool results left out: `model_text` where the trainer gives it."""
    if model_text is not None:
        return model_text
    return [strip_results("\n".join(assistant_texts(completion))) for completion in completions]


def final_answers(completions: list, model_text: list[str] | None = None) -> list[str | None]:
    """What each row boxed as its answer; `None` where nothing was."""
    texts = model_texts(completions, model_text)
    return [
        extract_answer(closing_text(completion) if is_structured(completion) else text)
        for completion, text in zip(completions, texts, strict=True)
    ]


def extract_answer(text: str) -> str | None:
    r"""The content of the last `\boxed{}` in the last `<answer>…</answer>`, or after the thoughts where there is none."""
    start = text.rfind("<answer>")
    if start >= 0:
        text = text[start + len("<answer>") :].partition("</answer>")[0]
    else:
        text = text.rpartition("</think>")[2]
    return extract_boxed(text)


def extract_boxed(text: str) -> str | None:
    r"""
    The content of the last `\boxed{…}`, braces matched, or the number or choice of `\boxed 5`; `None` where there is none
    or it is never closed.
    """
    openings = list(re.finditer(r"\\boxed(?:\s*\{|\s*(-?\d+(?:[.,/]\d+)*)|\s+([A-E])\b)", text))
    if not openings:
        return None
    if bare := openings[-1].group(1) or openings[-1].group(2):
        return bare
    text, depth = text[openings[-1].end() :], 1
    for brace in re.finditer(r"\\.|[{}]", text, flags=re.DOTALL):  # "\{" is a printed brace
        depth += {"{": 1, "}": -1}.get(brace.group(), 0)
        if depth == 0:
            return text[: brace.start()]
    return None


def executed_tools(completions: list, tool_calls: list[list[dict]] | None = None) -> list[set[str]]:
    """
    Names of the tools that were executed in each row and answered without an error.

    Args:
        completions (`list`): Completions, read where `tool_calls` is not given.
        tool_calls (`list[list[dict]]`, *optional*): Executed calls per row, as [`ARPOTrainer`] passes them. A call that
            an ancestor executed before a fork belongs to the row.
    """
    if tool_calls is not None:
        return [{call["name"] for call in calls if not call.get("error")} for calls in tool_calls]
    return [_answered_tools(completion) for completion in completions]


def _answered_tools(completion: Any) -> set[str]:
    if is_structured(completion):
        # TRL answers a call that failed with the text of {"error": …}
        results = [message for message in completion if message["role"] == "tool"]
        return {m["name"] for m in results if m.get("name") and not str(m["content"]).startswith("{'error':")}
    text = "\n".join(assistant_texts(completion))
    return {name for name, _, _ in result_spans(text)}


def is_structured(completion: Any) -> bool:
    """Whether a completion is in the chat-template protocol: calls and results are messages of their own."""
    if isinstance(completion, str):
        return False
    return len(completion) > 1 or any(message.get("tool_calls") for message in completion)


def assistant_texts(completion: Any) -> list[str]:
    """The text of every assistant turn."""
    if isinstance(completion, str):
        return [completion]
    return [message_text(message) for message in completion if message["role"] == "assistant"]


def closing_text(completion: list[dict]) -> str:
    """The text of the last turn if that is an assistant's who calls no tool; otherwise nothing."""
    last = completion[-1] if completion else {"role": None}
    return message_text(last) if last["role"] == "assistant" and not last.get("tool_calls") else ""


def message_text(message: dict) -> str:
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    return "".join(part.get("text") or "" for part in content if part.get("type") == "text")


def strip_results(text: str) -> str:
    """`text` without the tool results of the tags protocol."""
    kept, position = [], 0
    for _, start, end in result_spans(text):
        kept.append(text[position:start])
        position = end
    return "".join([*kept, text[position:]])


def result_spans(text: str) -> list[tuple[str, int, int]]:
    """
    Where the tool results of the tags protocol are.

    Only a `<result>` right behind the closing tag of a call is a result: one in a thought is the model's own text. A
    result that is never closed reaches to the end.

    Returns:
        `list[tuple[str, int, int]]`: Name of the tool, start and end of `<result>…</result>`.
    """
    spans: list[tuple[str, int, int]] = []
    position = 0
    while found := _CALL_END.search(text, position):
        closing = text.find("</result>", found.end())
        position = len(text) if closing < 0 else closing + len("</result>")
        spans.append((found.group(1), found.end(), position))
    return spans


def strip_end(text: str) -> str:
    """`text` without trailing white space and end-of-turn tokens."""
    text = text.rstrip()
    while token := _END_TOKEN.search(text, max(len(text) - 64, 0)):
        text = text[: token.start()].rstrip()
    return text


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
