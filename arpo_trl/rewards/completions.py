"""Read a completion: the model's own text, its final answer, the tools it ran. Pure functions on text and messages.

Completions come as a string, as the messages of the chat-template protocol (assistant turns with `tool_calls`, tool
turns), or as the one assistant message of the tags protocol, whose text holds the tool results.

What is not here: [`ARPOTrainer`] says which tokens the model wrote (`model_text`) and which calls were executed
(`tool_calls`). Plain TRL does not, so both are then read off the text, and a result that the model invented in the
tags protocol, right after a call, cannot be told from a real one.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from numbers import Number
from typing import Any

ANSWER_COLUMNS = ("answer", "solution", "ground_truth")

# Keys under which published sets hold accepted answers in a dict: Search-R1 and verl's recipes `target`, TriviaQA
# `value` and `aliases`, SQuAD `text`, FlashRAG `golden_answers`, MuSiQue `answer_aliases`
_ANSWER_KEYS = (
    *("answer", "answers", "target", "targets", "ground_truth", "ground_truths", "golden_answer", "golden_answers"),
    *("gold", "final_answer", "value", "aliases", "answer_aliases", "text"),
)
# What stands beside them and is no answer. Any other key is told, since it may change what is asked: `numbers` beside
# the `target` of the countdown task
_OTHER_KEYS = {
    *("answer_start", "answer_type", "id", "index", "level", "matched_wiki_entity_name", "normalized_aliases"),
    *("normalized_matched_wiki_entity_name", "normalized_value", "question", "score", "solution", "style", "type"),
}

# A call's closing tag, right before a result. The token that ends the tag may reach beyond it ("><"), which leaves a
# character or two of the model's between the two.
_CALL_END = re.compile(r"</(?!(?:think|answer|result)>)([\w.-]+)>(?:\s*|[^\w>]{0,8}?)(?=<result>)")
_END_TOKEN = re.compile(r"(<\|[^|<>\s]{1,40}\|>|</s>|<eos>)\Z")
_TAG = re.compile(r"<(/?)([\w.-]+)>")
_THOUGHT_TAGS = {"think", "thinking", "thought", "reasoning"}
# A box with braces, or one without: a number, a command of TeX with its arguments, or the letter of a choice
_BOX = re.compile(
    r"\\boxed(?:\s*(?P<brace>\{)|"
    r"[^\S\n]*(?P<number>[-+]?\.?\d(?:[\w.,/^*+%°-]|\\%|\{[^{}]*\})*+)(?!\()|"
    r"[^\S\n]*(?P<command>[-+]?\\(?!boxed)[a-zA-Z]+(?:\s*\{[^{}]*\}|[\w.,/^*+%°-])*+)(?!\()|"
    r"[^\S\n]+(?P<letter>[A-Z])(?![\w']))"
)


def ground_truths(columns: dict[str, Any]) -> list[list[str]]:
    """
    The accepted answers of every row.

    Args:
        columns (`dict[str, Any]`): Keyword arguments of a reward function. The first of the columns `answer`,
            `solution` and `ground_truth` is read; a row holds what [`accepted_answers`] reads.

    Returns:
        `list[list[str]]`: Accepted answers per row; an empty list for a row that has none (`None` or blank).

    Raises:
        `ValueError`: There is no such column, or a row of it cannot be read as answers.
    """
    name = next((name for name in ANSWER_COLUMNS if columns.get(name) is not None), None)
    if name is None:
        present = sorted(key for key, value in columns.items() if isinstance(value, list))
        raise ValueError(
            f"No ground truth: the dataset has none of the columns {', '.join(ANSWER_COLUMNS)} (it has "
            f"{', '.join(present) or 'no columns'}). Rename the column that holds the answers to `answer`."
        )
    return [accepted_answers(row) for row in columns[name]]


def accepted_answers(truth: Any) -> list[str]:
    """
    The accepted answers that a ground truth holds, as text.

    Args:
        truth (`Any`): A string, a number, a list of them (lists in it, tuples and arrays too), or a dict that holds
            them under a key such as `target`, `answer`, `answers`, `ground_truth`, or `value` and `aliases`. A string
            stays as it is. A whole number that became a float (5.0) is written without its point, as it was before a
            column with a missing or a broken number made it a float.

    Returns:
        `list[str]`: The answers, none twice and none blank; an empty list for `None` and NaN.

    Raises:
        `ValueError`: It holds something else, such as a dict of which we cannot tell which keys are answers.
    """
    return list(dict.fromkeys(text for text in _answer_texts(truth) if text.strip()))


def _answer_texts(truth: Any) -> Iterator[str]:
    if truth is None or isinstance(truth, str):
        yield truth or ""
    elif isinstance(truth, Mapping):
        filled = {key: value for key, value in truth.items() if value is not None}  # a struct of Arrow has every key
        keys = [key for key in _ANSWER_KEYS if key in filled]
        if filled and (not keys or set(filled) - set(_ANSWER_KEYS) - _OTHER_KEYS):
            raise ValueError(
                f"A ground truth is a dict with the keys {', '.join(map(repr, filled))}, which do not tell what the "
                "accepted answers are. Put the answers alone into the column: a string, a number or a list of them."
            )
        for key in keys:
            yield from _answer_texts(filled[key])
    elif hasattr(truth, "tolist"):  # arrays, tensors, and the numbers that they hold
        yield from _answer_texts(truth.tolist())
    elif isinstance(truth, (Sequence, set, frozenset)) and not isinstance(truth, (bytes, bytearray)):
        for item in truth if isinstance(truth, Sequence) else sorted(truth, key=str):
            yield from _answer_texts(item)
    elif isinstance(truth, float):
        if not math.isnan(truth):
            yield str(int(truth)) if truth.is_integer() and abs(truth) < 2**53 else repr(truth)
    elif isinstance(truth, Number):
        yield str(truth)
    elif hasattr(truth, "isoformat"):  # dates and times
        yield str(truth)
    else:
        raise ValueError(
            f"A ground truth is {str(truth)[:80]!r}, of type {type(truth).__name__}. Give a string, a number or a "
            "list of them."
        )


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
    r"""
    The content of the last `\boxed{}` in the last `<answer>…</answer>`, or anywhere where there is none; never one in
    a thought, whether it ended or was cut off.
    """
    text = outside_thoughts(text)
    start = text.rfind("<answer>")
    if start >= 0:
        text = text[start + len("<answer>") :].partition("</answer>")[0]
    return extract_boxed(text)


def outside_thoughts(text: str) -> str:
    """
    `text` without its thoughts: `<think>…</think>`, also under the names `thinking`, `thought` and `reasoning`.

    A thought that is never closed reaches to the end. A closing tag without an opening one ends a thought that the
    prompt opened. A tag inside another block (code that prints "<think>") opens nothing.
    """
    tags = [(found.start(), found.end(), found.group(1) == "/", found.group(2)) for found in _TAG.finditer(text)]
    closings: dict[str, list[tuple[int, int]]] = {}
    for start, end, closing, name in reversed(tags):
        if closing:
            closings.setdefault(name, []).append((start, end))
    kept: list[str] = []
    position = 0
    for start, end, closing, name in tags:
        own = closings.get(name, [])
        while own and own[-1][1] <= end:  # those behind us; the next one is the last of the list
            own.pop()
        if start < position:  # inside the block before
            continue
        if name in _THOUGHT_TAGS:
            if closing:
                kept = []
            else:
                kept.append(text[position:start])
            if not closing and not own:
                return "".join(kept)
            position = end if closing else own[-1][1]
        elif not closing and own:
            kept.append(text[position : own[-1][1]])
            position = own[-1][1]
    return "".join([*kept, text[position:]])


def extract_boxed(text: str) -> str | None:
    r"""
    The content of the last box; `None` where there is none or it is never closed.

    A box is `\boxed{…}`, braces matched, or without braces `\boxed 5`, `\boxed\frac{1}{2}` and `\boxed C`: a number, a
    command of TeX or a capital letter, up to the next white space or `$`.
    """
    openings = list(_BOX.finditer(text))
    if not openings:
        return None
    last = openings[-1]
    if last.group("brace") is None:
        return (last.group("number") or last.group("command") or last.group("letter")).rstrip(".,;:!?")
    text, depth = text[last.end() :], 1
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
        tool_calls (`list[list[dict]]`, *optional*): Executed calls per row, as [`ARPOTrainer`] passes them. A call
            that an ancestor executed before a fork belongs to the row.
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
