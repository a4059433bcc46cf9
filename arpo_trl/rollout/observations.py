"""What the trees of a rollout tell of the method: rows by kind, rewards within trees and between them, where forks
were made and whether they found anything new, how ΔH and P are distributed, and whether a rollout taught anything.

Pure functions of finished groups. A process takes [`observe`] of its own groups, the observations of all processes are
added, and [`observation_metrics`] and [`useless_signs`] read the sum.

What is not here: calls, entropies and shared tokens, which [`rollout_metrics`] tells.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from .tree import Group, Trajectory

KINDS = ("initial", "fork", "supplement")
PLACES = ("1", "2", "3", "4_or_more")
"""Depths of forks and numbers of tool results that are told apart. The names are the same in every rollout."""
QUANTILES = {"q10": 0.1, "q50": 0.5, "q90": 0.9}


@dataclass
class Observations:
    """
    What was seen in some rows. All of it adds up over processes.

    Args:
        sums (`defaultdict[str, float]`): Sums and counts by name.
        entropy_gaps (`list[float]`): ΔH of each segment that follows a tool result, those shared with a parent once.
        probabilities (`list[float]`): P of each decision.
        lengths (`list[int]`): Completion tokens of each row, tool results included.
        rewards (`list[float]`): Reward of each row that has one.
    """

    sums: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    entropy_gaps: list[float] = field(default_factory=list)
    probabilities: list[float] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)


def fork_depths(group: Group) -> list[int]:
    """Forks between each row of `group` and the prompt: 0 for a row that started there, 2 for a fork of a fork."""
    depths: dict[int | None, int] = {None: -1}  # by row; a parent comes before its forks
    for trajectory in group.trajectories:
        depths[trajectory.row] = depths.get(trajectory.parent, 0) + 1
    return [depths[trajectory.row] for trajectory in group.trajectories]


def observe(
    groups: Sequence[Group], rewards: Sequence[Sequence[float | None]], advantages: Sequence[float | None]
) -> Observations:
    """
    Observations of the rows of this process.

    Args:
        groups (`Sequence[Group]`): Finished groups of this process, or parts of groups.
        rewards (`Sequence[Sequence[float | None]]`): For each group the reward of each row of the whole group, M of
            them, the rows of other processes included; `None` for a row without a score.
        advantages (`Sequence[float | None]`): By row of this process.
    """
    seen = Observations()
    for group, group_rewards in zip(groups, rewards, strict=True):
        part = len(group.rows) / group.size  # a group that spans processes counts as a whole once
        scored = [reward for reward in group_rewards if reward is not None]
        seen.sums["groups"] += part
        seen.sums["mixed_groups"] += part if len(set(scored)) > 1 else 0
        own = [group_rewards[row.row - group.rows.start + group.first_row] for row in group.trajectories]
        _observe_rows(seen, group, own, advantages)
        _observe_trees(seen, group, own, sum(scored) / len(scored) if scored else 0.0)
        _observe_forks(seen, group)
    return seen


def _observe_rows(
    seen: Observations, group: Group, rewards: Sequence[float | None], advantages: Sequence[float | None]
) -> None:
    for trajectory, reward in zip(group.trajectories, rewards, strict=True):
        if trajectory.kind == "idle":
            continue
        kind, advantage = trajectory.kind, advantages[trajectory.row]
        length = len(trajectory.completion_ids)
        seen.sums[f"rows/{kind}"] += 1
        seen.sums[f"length/{kind}"] += length
        seen.sums[f"truncated/{kind}"] += trajectory.truncated
        seen.sums["cut_by_turns"] += trajectory.out_of_turns
        seen.sums["cut_by_length"] += trajectory.truncated and not trajectory.out_of_turns
        seen.sums["calling_rows"] += bool(trajectory.calls)
        seen.lengths.append(length)
        if reward is not None:
            seen.sums[f"reward/{kind}"] += reward
            seen.sums[f"scored/{kind}"] += 1
            seen.rewards.append(reward)
        if advantage is not None:
            seen.sums[f"advantage/{kind}"] += advantage
            seen.sums[f"advantages/{kind}"] += 1
        first_own = trajectory.fork_token or 0
        for segment in trajectory.segments:
            if segment.start < first_own:
                continue
            if segment.start > 0 and segment.entropy_gap is not None:
                seen.entropy_gaps.append(segment.entropy_gap)
            if segment.branch_probability is not None:
                seen.probabilities.append(segment.branch_probability)


def _observe_trees(seen: Observations, group: Group, rewards: Sequence[float | None], group_mean: float) -> None:
    """
    Squared distances of rewards, from the mean of their tree and of that mean from the group's. A tree is on one
    process.
    """
    roots: dict[int, int] = {}
    trees: dict[int, list[float]] = {}
    for trajectory, reward in zip(group.trajectories, rewards, strict=True):
        parent = trajectory.parent
        roots[trajectory.row] = trajectory.row if parent is None else roots.get(parent, parent)
        if reward is not None:
            trees.setdefault(roots[trajectory.row], []).append(reward)
    for tree in trees.values():
        mean = sum(tree) / len(tree)
        seen.sums["between_trees"] += len(tree) * (mean - group_mean) ** 2
        seen.sums["within_trees"] += sum((reward - mean) ** 2 for reward in tree)


def _observe_forks(seen: Observations, group: Group) -> None:
    by_row = {trajectory.row: trajectory for trajectory in group.trajectories}
    for trajectory, depth in zip(group.trajectories, fork_depths(group), strict=True):
        if trajectory.kind != "fork":
            continue
        # Every segment before the fork has been answered by one stretch of tool results
        result = sum(segment.start < (trajectory.fork_token or 0) for segment in trajectory.segments)
        seen.sums[f"forks_at_depth/{_place(depth)}"] += 1
        seen.sums[f"forks_at_result/{_place(result)}"] += 1
        parent = by_row.get(trajectory.parent) if trajectory.parent is not None else None
        if parent is not None:
            seen.sums["compared_forks"] += 1
            seen.sums["forks_like_parent"] += trajectory.completion_ids == parent.completion_ids
            seen.sums["forks_ending_like_parent"] += _last_words(trajectory) == _last_words(parent)


def _place(number: int) -> str:
    return PLACES[min(number, len(PLACES)) - 1]


def _last_words(trajectory: Trajectory) -> list[int]:
    """Tokens of the last segment: of a row that ended by itself, its answer."""
    if not trajectory.segments:
        return []
    return trajectory.completion_ids[trajectory.segments[-1].start : trajectory.segments[-1].end]


def add_observations(parts: Iterable[Observations]) -> Observations:
    """The observations of all processes as one."""
    total = Observations()
    for part in parts:
        for name, value in part.sums.items():
            total.sums[name] += value
        total.entropy_gaps += part.entropy_gaps
        total.probabilities += part.probabilities
        total.lengths += part.lengths
        total.rewards += part.rewards
    return total


def observation_metrics(seen: Observations) -> dict[str, float]:
    """Metrics by name, from the observations of all processes. A mean of nothing is left out."""
    sums = seen.sums
    means = {
        f"arpo/{name}/{kind}": (f"{name}/{kind}", f"rows/{kind}") for name in ("length", "truncated") for kind in KINDS
    }
    means |= {f"arpo/reward/{kind}": (f"reward/{kind}", f"scored/{kind}") for kind in KINDS}
    means |= {f"arpo/advantage/{kind}": (f"advantage/{kind}", f"advantages/{kind}") for kind in KINDS}
    means |= {f"arpo/{name}": (name, "compared_forks") for name in ("forks_like_parent", "forks_ending_like_parent")}
    metrics = {name: sums[above] / sums[below] for name, (above, below) in sorted(means.items()) if sums[below]}
    if any(sums[f"rows/{kind}"] for kind in KINDS[1:]):  # a run that does not branch has none of these
        for name in ("forks_at_depth", "forks_at_result"):
            metrics |= {f"arpo/{name}/{place}": sums[f"{name}/{place}"] / sums["groups"] for place in PLACES}
    if seen.rewards:
        metrics["arpo/reward_variance_between_trees"] = sums["between_trees"] / len(seen.rewards)
        metrics["arpo/reward_variance_within_trees"] = sums["within_trees"] / len(seen.rewards)
    if seen.probabilities:
        metrics["arpo/branch_probability"] = float(np.mean(seen.probabilities))
    for name, values in (("entropy_gap", seen.entropy_gaps), ("branch_probability", seen.probabilities)):
        if values:
            metrics[f"arpo/{name}_std"] = float(np.std(values))
            metrics |= {f"arpo/{name}_{part}": float(np.quantile(values, q)) for part, q in QUANTILES.items()}
    if seen.lengths:
        metrics["completions/mean_full_length"] = float(np.mean(seen.lengths))
        metrics["completions/max_full_length"] = float(max(seen.lengths))
        metrics["completions/cut_by_length"] = sums["cut_by_length"] / len(seen.lengths)
        metrics["completions/cut_by_turns"] = sums["cut_by_turns"] / len(seen.lengths)
    return metrics


def useless_signs(seen: Observations, tools: Sequence[str]) -> dict[str, str]:
    """
    What keeps a rollout from teaching anything, as sentences by a name; empty for a rollout that teaches.

    Args:
        seen ([`Observations`]): Of all processes.
        tools (`Sequence[str]`): Names of the tools that rows may call.
    """
    signs = {}
    if seen.lengths and not seen.rewards:
        signs["score"] = "No row had a score: every reward function returned None."
    elif seen.rewards and not seen.sums["mixed_groups"]:
        values = set(seen.rewards)
        same = (
            f"Every row had the reward {values.pop():g}" if len(values) == 1 else "All rows of a group had one reward"
        )
        signs["reward"] = (
            f"{same}, so that all advantages and the gradient of the reward are 0: look at the completions "
            "(`log_completions=True`) and at what the reward functions return for them."
        )
    if seen.lengths and seen.sums["cut_by_length"] + seen.sums["cut_by_turns"] == len(seen.lengths):
        signs["truncated"] = (
            "Every row was truncated: raise `max_completion_length`, which counts tool results too, or "
            "`max_tool_calling_iterations`."
        )
    if tools and seen.lengths and not seen.sums["calling_rows"]:
        signs["calls"] = (
            "No row called a tool, so that nothing can branch: see whether the prompt tells the model how, whether "
            "`tool_protocol` is the one it was trained with, and whether it needs a cold start."
        )
    return signs
