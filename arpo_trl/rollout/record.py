"""Rollout records: what is kept of a trajectory, read by the viewer, the metrics and the checks (format:
docs/records.md). Their files are `record_files.py`.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ..advantages import Span
from .tree import Group, Trajectory

# What TRL and the trainer put among the columns of a row
_NOT_OF_THE_DATA = frozenset({"prompt", "completion", "tool_calls", "model_text"})
_COLUMNS, _CHARACTERS = 20, 2000  # so that a record stays about as long as the tokens of its row make it


def rollout_records(
    step: int,
    groups: Sequence[Group],
    rewards: Mapping[str, Sequence[float | None]],
    advantages: Sequence[float],
    shared_advantages: Sequence[Sequence[Span]] | None,
    first_group: int = 0,
    examples: Sequence[Mapping[str, Any]] = (),
) -> list[dict[str, Any]]:
    """
    The records of one generation batch, one a trajectory.

    Args:
        step (`int`): Global step.
        groups (`Sequence[Group]`): Groups of this process.
        rewards (`Mapping[str, Sequence[float | None]]`): By name of the reward function, one value a row.
        advantages (`Sequence[float]`): Group-normalised advantage of each row.
        shared_advantages (`Sequence[Sequence[Span]]`, *optional*): Hard attribution of each row; `None` for soft.
        first_group (`int`): `prompt_index` of the first group: above 0 for a later generation batch of the same step.
        examples (`Sequence[Mapping[str, Any]]`): Columns of the data set, by row of this process. The first row of
            each group keeps them, see [`example_texts`].
    """
    records = []
    for prompt_index, group in enumerate(groups, start=first_group):
        offset = group.first_row - group.rows.start  # from a row of this process to a row of the whole group
        for trajectory in group.trajectories:
            if trajectory.kind == "idle":
                continue
            row = trajectory.row
            spans = None
            if shared_advantages is not None:
                spans = [span._asdict() for span in shared_advantages[row]]
            records.append(
                {
                    "step": step,
                    "prompt_index": prompt_index,
                    "row": row + offset,
                    "kind": trajectory.kind,
                    "parent": None if trajectory.parent is None else trajectory.parent + offset,
                    "fork_token": trajectory.fork_token,
                    "prompt_ids": trajectory.prompt_ids,
                    "completion_ids": trajectory.completion_ids,
                    "tool_mask": trajectory.tool_mask,
                    "segments": [vars(segment) for segment in trajectory.segments],
                    "tool_calls": call_records(trajectory),
                    "images": trajectory.images,
                    "truncated": trajectory.truncated,
                    "out_of_turns": trajectory.out_of_turns,
                    "rewards": {name: values[row] for name, values in rewards.items()},
                    "advantage": advantages[row],
                    "shared_advantages": spans,
                    "example": example_texts(examples[row]) if examples and row == group.rows.start else None,
                }
            )
    return [rounded(record) for record in records]


def rounded(record: Mapping[str, Any]) -> dict[str, Any]:
    """
    A record whose measured numbers (entropies, log-probabilities, seconds, advantages) have six digits, which is what
    they are good for; the others would be most of a short record.
    """

    def digits(value: Any) -> Any:
        return float(f"{value:.6g}") if isinstance(value, float) else value

    def all_of(parts: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        return [{name: digits(value) for name, value in part.items()} for part in parts]

    spans = record["shared_advantages"]
    return {
        **record,
        "segments": all_of(record["segments"]),
        "tool_calls": [{**call, "seconds": digits(call["seconds"])} for call in record["tool_calls"]],
        "advantage": digits(record["advantage"]),
        "shared_advantages": None if spans is None else all_of(spans),
    }


def example_texts(example: Mapping[str, Any]) -> dict[str, str]:
    """
    The columns of a data set's row as a record keeps them: texts as they are and other JSON as its text, each of at
    most 2,000 characters, and at most 20 of them. The prompt is left out, which a record holds as tokens, and what is
    empty or no JSON, such as an image.
    """
    texts: dict[str, str] = {}
    for name, value in example.items():
        if name in _NOT_OF_THE_DATA or value in (None, "", [], {}) or len(texts) == _COLUMNS:
            continue
        try:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        except (TypeError, ValueError, RecursionError):
            continue
        texts[name] = text if len(text) <= _CHARACTERS else text[: _CHARACTERS - 1] + "…"
    return texts


def call_records(trajectory: Trajectory) -> list[dict[str, Any]]:
    """The tool calls of a row, as records hold them and reward functions read them."""
    return [{**vars(own.call), "shared": own.shared} for own in trajectory.calls]


def call_kind(call: Mapping[str, Any]) -> str:
    """
    What became of a call that a row made, of which `"executed"` alone ran a tool.

    Args:
        call (`Mapping[str, Any]`): As records hold it; what an older record lacks is false.

    Returns:
        `str`: `"shared"` (a row made it before a fork left), `"merged"` (another row of the group made the same call),
        `"cached"`, `"refused"` (answered with an error at once) or `"executed"`.
    """
    return next((kind for kind in ("shared", "merged", "cached", "refused") if call.get(kind)), "executed")
