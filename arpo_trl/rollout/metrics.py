"""What a rollout logs: metrics from sums that add up over processes, and columns of the table of completions."""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .tree import Group


def rollout_sums(groups: Sequence[Group]) -> defaultdict[str, float]:
    """Sums and counts over the rows of this process, from which [`rollout_metrics`] makes means."""
    sums: defaultdict[str, float] = defaultdict(float)
    for group in groups:
        # A group that spans processes counts as a whole once
        sums["groups"] += len(group.rows) / group.size
        for trajectory in group.trajectories:
            sums[trajectory.kind] += 1
            first_own = trajectory.fork_token or 0
            sums["tokens"] += len(trajectory.completion_ids)
            sums["shared_tokens"] += first_own
            for segment in trajectory.segments:
                if segment.start < first_own or segment.entropy is None:
                    continue
                if segment.start == 0:
                    sums["entropy_initial"] += segment.entropy
                    sums["initial_segments"] += 1
                elif segment.entropy_gap is not None:
                    sums["entropy_after_tool"] += segment.entropy
                    sums["entropy_gap"] += segment.entropy_gap
                    sums["later_segments"] += 1
                if segment.forks is not None:
                    sums["decisions"] += 1
                    sums["decided_forks"] += segment.forks
            for own in trajectory.calls:
                if own.shared:
                    sums["calls_saved"] += 1
                    continue
                call = own.call
                sums["calls_executed"] += 1
                sums["calls_failed"] += call.error is not None
                sums[f"{call.name}/calls"] += 1
                sums[f"{call.name}/failures"] += call.error is not None
                sums[f"{call.name}/cache_hits"] += call.cached
                sums[f"{call.name}/seconds"] += call.seconds
    return sums


def slowest_calls(groups: Sequence[Group], tools: Sequence[str]) -> list[float]:
    """Seconds of the slowest call of each tool on this process."""
    seconds = dict.fromkeys(tools, 0.0)
    for group in groups:
        for trajectory in group.trajectories:
            for own in trajectory.calls:
                if own.call.name in seconds and not own.shared:
                    seconds[own.call.name] = max(seconds[own.call.name], own.call.seconds)
    return list(seconds.values())


def sum_names(tools: Iterable[str]) -> list[str]:
    """Names of the sums, the same on every process, in a fixed order."""
    names = ["groups", "initial", "fork", "supplement", "tokens", "shared_tokens", "entropy_initial"]
    names += ["initial_segments", "entropy_after_tool", "entropy_gap", "later_segments", "decisions", "decided_forks"]
    names += ["calls_saved", "calls_executed", "calls_failed", "prefix_cache_queries", "prefix_cache_hits"]
    return names + [f"{tool}/{part}" for tool in tools for part in ("calls", "failures", "cache_hits", "seconds")]


def rollout_metrics(sums: Mapping[str, float], slowest: Sequence[float], tools: Sequence[str]) -> dict[str, float]:
    """
    Metrics by name, from sums over all processes. A mean of nothing is left out.

    Args:
        sums (`Mapping[str, float]`): See [`rollout_sums`].
        slowest (`Sequence[float]`): Seconds of each tool's slowest call.
        tools (`Sequence[str]`): Names of the tools.
    """
    means = {
        "arpo/initial": ("initial", "groups"),
        "arpo/forks": ("fork", "groups"),
        "arpo/supplements": ("supplement", "groups"),
        "arpo/entropy_initial": ("entropy_initial", "initial_segments"),
        "arpo/entropy_after_tool": ("entropy_after_tool", "later_segments"),
        "arpo/entropy_gap": ("entropy_gap", "later_segments"),
        "arpo/fork_rate": ("decided_forks", "decisions"),
        "arpo/shared_token_fraction": ("shared_tokens", "tokens"),
        "arpo/prefix_cache_hit_rate": ("prefix_cache_hits", "prefix_cache_queries"),
    }
    metrics = {name: sums[above] / sums[below] for name, (above, below) in means.items() if sums[below]}
    metrics["tools/calls_executed"] = sums["calls_executed"]
    metrics["tools/calls_saved"] = sums["calls_saved"]
    for tool, longest in zip(tools, slowest, strict=True):
        calls = sums[f"{tool}/calls"]
        metrics |= {f"tools/{tool}/{part}": sums[f"{tool}/{part}"] for part in ("calls", "failures", "cache_hits")}
        if calls:
            metrics |= {f"tools/{tool}/seconds_mean": sums[f"{tool}/seconds"] / calls}
            metrics |= {f"tools/{tool}/seconds_max": longest}
    return metrics


def completion_columns(groups: Sequence[Group]) -> dict[str, list]:
    """
    What the table of completions tells of each row beside TRL's columns.

    Returns:
        `dict[str, list]`: `kind`; `fork_depth`, the forks between the row and the prompt; `calls`, the tool calls that
        the row reads, those made before its fork included.
    """
    columns: dict[str, list] = {"kind": [], "fork_depth": [], "calls": []}
    depths: dict[int | None, int] = {None: -1}  # by row; a parent comes before its forks
    for group in groups:
        for trajectory in group.trajectories:
            depths[trajectory.row] = depths[trajectory.parent] + 1
            columns["kind"].append(trajectory.kind)
            columns["fork_depth"].append(depths[trajectory.row])
            columns["calls"].append(len(trajectory.calls))
    return columns


def table_row(row: str | list[dict[str, Any]]) -> str | list[dict[str, Any]]:
    """
    A prompt or completion as the table of completions holds it. A table wants one type in each field, and what a model
    writes as arguments of a call is of any type: here they are the JSON of an object, as OpenAI's are. Other values that
    are no text are JSON too. Messages with images stay as they are.
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
