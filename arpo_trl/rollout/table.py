"""What the table of completions shows of a rollout: columns beside TRL's, and rows that every backend takes."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from .observations import fork_depths
from .tree import Group


def completion_columns(groups: Sequence[Group]) -> dict[str, list]:
    """
    What the table of completions tells of each row beside TRL's columns.

    Returns:
        `dict[str, list]`: `kind`; `fork_depth`, the forks between the row and the prompt; `calls`, the tool calls that
        the row reads, those made before its fork included.
    """
    columns: dict[str, list] = {"kind": [], "fork_depth": [], "calls": []}
    for group in groups:
        columns["kind"] += [trajectory.kind for trajectory in group.trajectories]
        columns["fork_depth"] += fork_depths(group)
        columns["calls"] += [len(trajectory.calls) for trajectory in group.trajectories]
    return columns


def table_row(row: str | list[dict[str, Any]]) -> str | list[dict[str, Any]]:
    """
    A prompt or completion as the table of completions holds it. A table wants one type in each field, and what a model
    writes as arguments of a call is of any type: here they are the JSON of an object, as OpenAI's are. Other values
    that are no text are JSON too. Messages with images stay as they are.
    """
    if isinstance(row, str) or any(_has_images(message) for message in row):
        return row
    return [{key: _table_value(key, value) for key, value in message.items()} for message in row]


def table_text(row: str | list[dict[str, Any]]) -> str:
    """A prompt or completion as one text."""
    return row if isinstance(row, str) else json.dumps(row, default=str)


def _has_images(message: Mapping[str, Any]) -> bool:
    content = message.get("content")
    return isinstance(content, list) and any(
        isinstance(part, dict) and part.get("type") == "image" for part in content
    )


def _table_value(key: str, value: Any) -> Any:
    if value is None:
        return None
    if key == "tool_calls":
        return [_table_call(call) for call in (value if isinstance(value, list) else [value])]
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _table_call(call: Any) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        return {"type": "function", "function": {"name": table_text([call]), "arguments": "{}"}}
    arguments = function.get("arguments")
    if not _is_json_object(arguments):
        arguments = json.dumps(arguments if isinstance(arguments, dict) else {"arguments": arguments}, default=str)
    return {"type": "function", "function": {"name": str(function.get("name")), "arguments": arguments}}


def _is_json_object(text: Any) -> bool:
    try:
        return isinstance(text, str) and isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False
