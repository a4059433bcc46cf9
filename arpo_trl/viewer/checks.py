"""Whether a JSON object is a rollout record that the page can show. Files are checked, since others than the trainer
write such files too; what the trainer writes passes.

What is not here: whether the parts of a record agree with each other beyond what the page needs.
"""

from collections.abc import Callable, Mapping
from typing import Any

_KINDS = ("initial", "fork", "supplement")
_LARGEST = 2**53  # beyond that a browser's numbers are not exact
_DEEPEST = 200  # levels of a tool's arguments and results


def find_fault(row: Any) -> str | None:
    """What keeps a line's JSON from being a rollout record, as the rest of a sentence; `None` if nothing does."""
    if not isinstance(row, dict):
        return "it is no object"
    return _fault_of_fields(row, _ROW) or _fault_of_parts(row)


def _fault_of_fields(
    value: Any, fields: Mapping[str, tuple[Callable[[Any], bool], str]], where: str = ""
) -> str | None:
    """What is wrong with the fields of an object, each of which has a check and what it asks for in words."""
    if not isinstance(value, dict):
        return f"{where or 'it'} is no object"
    missing = [name for name in fields if name not in value]
    if missing:
        return f"{where or 'it'} lacks {', '.join(missing)}"
    for name, (check, wanted) in fields.items():
        if not check(value[name]):
            return f"{where + '.' if where else ''}{name} is not {wanted}"
    return None


def _fault_of_parts(row: dict[str, Any]) -> str | None:
    length = len(row["completion_ids"])
    if row["kind"] == "fork":
        # A fork is made after its parent, so that no row descends from itself
        if row["parent"] is None or row["parent"] >= row["row"]:
            return "parent of a fork is not an earlier row"
        if row["fork_token"] is None or row["fork_token"] > length:
            return "fork_token of a fork is not a place in completion_ids"
    end = 0
    for index, segment in enumerate(row["segments"]):
        fault = _fault_of_fields(segment, _SEGMENT, f"segments[{index}]")
        if fault:
            return fault
        if not end <= segment["start"] <= segment["end"] <= length:
            return f"segments[{index}] is not a stretch of completion_ids behind the one before it"
        end = segment["end"]
    for index, call in enumerate(row["tool_calls"]):
        told = call if isinstance(call, dict) else {}
        fields = _CALL | {name: check for name, check in _CALL_NOW.items() if name in told}
        fault = _fault_of_fields(call, fields, f"tool_calls[{index}]")
        if fault:
            return fault
    for name, (check, wanted) in (_OF_AN_EVALUATION | _ADDED).items():
        if name in row and not check(row[name]):
            return f"{name} is not {wanted}"
    return None


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _LARGEST


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and -_LARGEST <= value <= _LARGEST


def _are_counts(value: Any) -> bool:
    # By type and extremes rather than one by one: a record has thousands of tokens
    return isinstance(value, list) and (not value or (set(map(type, value)) == {int} and _is_ordered(value)))


def _is_ordered(tokens: list[int]) -> bool:
    return min(tokens) >= 0 and max(tokens) < 2**31


def _or_none(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or check(value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_list(value: Any) -> bool:
    return isinstance(value, list)


def _are_rewards(value: Any) -> bool:
    return isinstance(value, dict) and all(reward is None or _is_number(reward) for reward in value.values())


def _are_texts(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_text, value.values()))


def _are_spans(value: Any) -> bool:
    fields = {"start": (_is_count, ""), "end": (_is_count, ""), "advantage": (_is_number, "")}
    return isinstance(value, list) and all(_fault_of_fields(span, fields) is None for span in value)


def _is_shallow(value: Any) -> bool:
    """Whether lists and objects are nested no deeper than what reads them can follow."""
    level = [value]
    for _ in range(_DEEPEST):
        level = [
            item
            for each in level
            if isinstance(each, list | dict)
            for item in (each.values() if isinstance(each, dict) else each)
        ]
        if not level:
            return True
    return False


_COUNT = (_is_count, "a whole number of 0 or more")
_COUNT_OR_NULL = (_or_none(_is_count), "a whole number of 0 or more, or null")
_NUMBER_OR_NULL = (_or_none(_is_number), "a number, or null")
_COUNTS = (_are_counts, "a list of whole numbers of 0 or more")
_LIST = (_is_list, "a list")
_TEXT = (_is_text, "a string")
_TEXT_OR_NULL = (_or_none(_is_text), "a string, or null")
_BOOLEAN = (lambda value: isinstance(value, bool), "true or false")
_ANYTHING = (_is_shallow, f"nested less than {_DEEPEST} levels deep")

_ROW = {
    "prompt_index": _COUNT,
    "row": _COUNT,
    "kind": (lambda value: value in _KINDS, f"one of {', '.join(_KINDS)}"),
    "parent": _COUNT_OR_NULL,
    "fork_token": _COUNT_OR_NULL,
    "prompt_ids": _COUNTS,
    "completion_ids": _COUNTS,
    "tool_mask": _COUNTS,
    "segments": _LIST,
    "tool_calls": _LIST,
    "truncated": _BOOLEAN,
    "rewards": (_are_rewards, "an object of numbers, or null for none"),
    "advantage": _NUMBER_OR_NULL,
    "shared_advantages": (_or_none(_are_spans), "a list of objects with start, end and advantage, or null"),
}
_SEGMENT = {
    "start": _COUNT,
    "end": _COUNT,
    "entropy": _NUMBER_OR_NULL,
    "entropy_gap": _NUMBER_OR_NULL,
    "branch_probability": _NUMBER_OR_NULL,
    "forks": _COUNT_OR_NULL,
}
_CALL = {
    "name": _TEXT,
    "arguments": _ANYTHING,
    "result": _ANYTHING,
    "error": _TEXT_OR_NULL,
    "seconds": (_is_number, "a number"),
    "cached": _BOOLEAN,
    "shared": _BOOLEAN,
}
_CALL_NOW = {"merged": _BOOLEAN, "refused": _BOOLEAN}  # absent from older records
_ADDED = {  # what older records lack
    "out_of_turns": _BOOLEAN,
    "example": (_or_none(_are_texts), "an object of strings, or null"),
}
_OF_AN_EVALUATION = {
    "question": _TEXT,
    "answer": _ANYTHING,
    "prediction": _ANYTHING,
    "score": _NUMBER_OR_NULL,
    "correct": _NUMBER_OR_NULL,
}
