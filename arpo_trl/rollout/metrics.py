"""Metrics of a rollout, from sums that add up over processes."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from .record import call_kind, call_records
from .tree import Group

CALL_KINDS = ("shared", "merged", "cached", "refused", "executed")
"""What becomes of the calls that rows make; each call is of one kind."""
_PARTS = ("calls", "failures", "merged", "cached", "executed")
"""Counts of one tool, calls before a fork left out."""


def rollout_sums(groups: Sequence[Group]) -> defaultdict[str, float]:
    """Sums and counts over the rows of this process, from which [`rollout_metrics`] makes means."""
    sums: defaultdict[str, float] = defaultdict(float)
    for group in groups:
        # A group that spans processes counts as a whole once
        sums["groups"] += len(group.rows) / group.size
        for trajectory in group.trajectories:
            sums[trajectory.kind] += 1
            if trajectory.kind == "idle":
                continue
            first_own = trajectory.fork_token or 0
            sums["tokens"] += len(trajectory.completion_ids)
            sums["shared_tokens"] += first_own
            sums["rejected_tokens"] += trajectory.rejected_tokens
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
            for call in call_records(trajectory):
                kind, name = call_kind(call), call["name"]
                sums[f"calls_{kind}"] += 1
                if kind == "shared":
                    continue
                sums[f"{name}/calls"] += 1
                sums[f"{name}/failures"] += call["error"] is not None
                sums[f"{name}/{kind}"] += 1
                sums[f"{name}/seconds"] += call["seconds"]
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
    names += ["rejected_tokens", "idle"]
    names += ["initial_segments", "entropy_after_tool", "entropy_gap", "later_segments", "decisions", "decided_forks"]
    names += ["prefix_cache_queries", "prefix_cache_hits", *(f"calls_{kind}" for kind in CALL_KINDS)]
    return names + [f"{tool}/{part}" for tool in tools for part in (*_PARTS, "seconds")]


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
        "arpo/idle": ("idle", "groups"),
        "arpo/rejected_tokens": ("rejected_tokens", "groups"),
        "arpo/entropy_initial": ("entropy_initial", "initial_segments"),
        "arpo/entropy_after_tool": ("entropy_after_tool", "later_segments"),
        "arpo/entropy_gap": ("entropy_gap", "later_segments"),
        "arpo/fork_rate": ("decided_forks", "decisions"),
        "arpo/shared_token_fraction": ("shared_tokens", "tokens"),
        "arpo/prefix_cache_hit_rate": ("prefix_cache_hits", "prefix_cache_queries"),
    }
    metrics = {name: sums[above] / sums[below] for name, (above, below) in means.items() if sums[below]}
    metrics["tools/calls_made"] = sum(sums[f"calls_{kind}"] for kind in CALL_KINDS)
    metrics |= {f"tools/calls_{kind}": sums[f"calls_{kind}"] for kind in CALL_KINDS}
    for tool, longest in zip(tools, slowest, strict=True):
        metrics |= {f"tools/{tool}/{part}": sums[f"{tool}/{part}"] for part in _PARTS}
        if executed := sums[f"{tool}/executed"]:
            metrics |= {f"tools/{tool}/seconds_mean": sums[f"{tool}/seconds"] / executed}
            metrics |= {f"tools/{tool}/seconds_max": longest}
    return metrics
