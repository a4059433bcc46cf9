"""Rollout records from a run dir or an evaluation: read them, put groups together, and compute what is followed over
the steps.

What it does not do: it does not write records, and it does not judge them. A line that a killed run left half-written
is skipped and reported; a file that holds something else is an error.
"""

import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean
from typing import Any

from ..execution.executor import ToolCall
from ..rollout.metrics import rollout_metrics, rollout_sums, slowest_calls
from ..rollout.observations import Observations, add_observations, observation_metrics, observe
from ..rollout.record_files import lines_of, whole
from ..rollout.tree import CallOfRow, Group, Segment, Trajectory
from .checks import find_fault

Row = dict[str, Any]

_FILE = re.compile(r"step-(\d+)(?:-rank(\d+))?\.jsonl(?:\.gz)?")
_SEGMENT = ("start", "end", "entropy", "entropy_gap", "branch_probability", "forks")
_CALL = ("name", "arguments", "result", "error", "seconds", "merged", "cached", "refused")


def find_steps(run_dir: Path) -> dict[int, list[Path]]:
    """
    Files of each step, in the order of the steps and, within one, of the ranks.

    Args:
        run_dir (`Path`): A run's `output_dir`, or the folder of records itself.

    Returns:
        `dict[int, list[Path]]`: Global step to its files, one for each process that wrote records.

    Raises:
        FileNotFoundError: If there are no records.
    """
    if not run_dir.is_dir():
        raise FileNotFoundError(f"run_dir={str(run_dir)!r} is not a directory. Give the output_dir of a training run.")
    folder = run_dir / "rollouts" if (run_dir / "rollouts").is_dir() else run_dir
    found = [
        (int(match[1]), int(match[2] or 0), path) for path in folder.iterdir() if (match := _FILE.fullmatch(path.name))
    ]
    if not found:
        raise FileNotFoundError(
            f"run_dir={str(run_dir)!r} has no rollout records (rollouts/step-*.jsonl.gz). Train with "
            "log_rollouts=True."
        )
    steps: dict[int, list[Path]] = {}
    for step, _, path in sorted(found):
        steps.setdefault(step, []).append(path)
    return steps


def find_benchmarks(run_dir: Path) -> list[Path]:
    """
    The files of an evaluation, one for each benchmark, in `run_dir/records` or in `run_dir` itself where that is its
    name; none where there are rollouts of a training, whose trees say more.
    """
    if (run_dir / "rollouts").is_dir():
        return []
    return sorted((run_dir if run_dir.name == "records" else run_dir / "records").glob("*.jsonl"))


def read_file(path: Path) -> tuple[list[Row], int]:
    """
    Whole rows of one file, whatever its lines leave out.

    Args:
        path (`Path`): A file of rollout records (`.jsonl.gz`, or `.jsonl` of earlier versions) or of an evaluation.

    Returns:
        `tuple[list[Row], int]`: The rows, and the number of lines that were skipped because they are not whole: the
        last line of a run that was killed, also where a resumed run has since appended to it.

    Raises:
        ValueError: If a line is whole but is no rollout record.
    """
    rows, skipped = [], 0
    groups: dict[int, dict[int, Row]] = {}
    for number, line in enumerate(lines_of(path), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, parse_constant=lambda name: None, parse_float=_finite)
            group = groups.setdefault(row["prompt_index"], {}) if _is_numbered(row) else {}
            row = whole(row, group) if isinstance(row, dict) else row
            fault = find_fault(row)
        except (json.JSONDecodeError, UnicodeDecodeError):
            skipped += 1
            continue
        except (ValueError, RecursionError) as error:  # numbers of thousands of digits, thousands of brackets
            fault = f"it cannot be read ({error})"
        if fault is not None:
            raise ValueError(f"{path} line {number} is no rollout record: {fault}.")
        group[row["row"]] = row
        rows.append(row)
    return rows, skipped


def _is_numbered(row: Any) -> bool:
    return isinstance(row, dict) and isinstance(row.get("prompt_index"), int)


def _finite(text: str) -> float | None:
    """A number of JSON. A browser's JSON has no NaN and no infinity, which 1e999 is."""
    number = float(text)
    return number if math.isfinite(number) else None


def group_rows(files: Iterable[list[Row]]) -> list[list[Row]]:
    """
    Put the rows of one step's files together into groups.

    Args:
        files (`Iterable[list[Row]]`): Rows of each process, in the order of the ranks.

    Returns:
        `list[list[Row]]`: The groups, each sorted by row. A group that spans processes is joined: a later part has the
        same prompt and goes on where the earlier one ended.
    """
    groups: list[dict[int, Row]] = []
    unfinished: dict[tuple, list[dict[int, Row]]] = {}  # by prompt and next row
    for rows in files:
        parts: dict[int, dict[int, Row]] = {}
        done: list[dict[int, Row]] = []
        for row in rows:
            part = parts.setdefault(row["prompt_index"], {})
            if row["row"] in part:  # the step's next generation batch: it counts its groups from 0 again
                done += parts.values()
                parts = {row["prompt_index"]: (part := {})}
            part[row["row"]] = row
        for part in (*done, *parts.values()):
            prompt = tuple(part[min(part)]["prompt_ids"])
            waiting = unfinished.get((prompt, min(part)))
            if waiting:
                group = waiting.pop(0)
                group.update(part)
            else:
                groups.append(group := part)
            unfinished.setdefault((prompt, max(group) + 1), []).append(group)
    return [[group[row] for row in sorted(group)] for group in groups]


def question_groups(rows: Iterable[Row]) -> list[list[Row]]:
    """The completions of each question of a benchmark, in the order of the questions."""
    groups: dict[int, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["prompt_index"], []).append(row)
    return [groups[index] for index in sorted(groups)]


def step_metrics(groups: list[list[Row]]) -> dict[str, float]:
    """
    What one step contributes to the curves: the rollout metrics that training logs, computed once more from the
    records (so they cover all processes and every step, not each `logging_steps`), rewards and lengths.

    Args:
        groups (`list[list[Row]]`): Groups of the step.

    Returns:
        `dict[str, float]`: Value by name; a name is absent where there is nothing to average. Calls are totals.
    """
    rows = [row for group in groups for row in group]
    metrics: dict[str, float | None] = {}
    for name in ("score", "correct"):  # of an evaluation: the same for all benchmarks, whatever the reward function
        metrics[name] = _mean(row.get(name) for row in rows)
    for name in dict.fromkeys(name for row in rows for name in row["rewards"]):
        metrics[f"rewards/{name}/mean"] = _mean(row["rewards"].get(name) for row in rows)
    rolled_out = [_rolled_out(group) for group in groups]
    tools = sorted({call["name"] for row in rows for call in row["tool_calls"]})
    metrics |= rollout_metrics(rollout_sums(rolled_out), slowest_calls(rolled_out, tools), tools)
    if not any("question" in row for row in rows):  # an evaluation makes no trees, and has scores instead of rewards
        observed = [_observed(group, rolled) for group, rolled in zip(groups, rolled_out, strict=True)]
        told = observation_metrics(add_observations(observed))
        if not all("out_of_turns" in row for row in rows):  # older records do not say which limit it was
            told = {name: value for name, value in told.items() if not name.startswith("completions/cut_by_")}
        metrics |= told
        scored = [{reward for row in group if (reward := _reward(row)) is not None} for group in groups]
        metrics["frac_reward_zero_std"] = _mean(len(rewards) == 1 for rewards in scored if rewards)
    metrics["completions/mean_length"] = _mean(sum(row["tool_mask"]) for row in rows)  # model tokens, as TRL counts
    metrics["completions/truncated"] = _mean(row["truncated"] for row in rows)
    return {name: value for name, value in metrics.items() if value is not None}


def _reward(row: Row) -> float | None:
    """The plain sum of a row's rewards, as the page shows it; `None` if no function scored it."""
    present = [value for value in row["rewards"].values() if value is not None]
    return sum(present) if present else None


def _observed(rows: list[Row], group: Group) -> Observations:
    """A whole group's observations. A killed run may have lost rows, so that they are found by their numbers."""
    numbers = range(rows[-1]["row"] + 1)
    by_number = {row["row"]: row for row in rows}
    rewards = [_reward(by_number[number]) if number in by_number else None for number in numbers]
    advantages = [by_number[number]["advantage"] if number in by_number else None for number in numbers]
    return observe([group], [rewards], advantages)


def _rolled_out(rows: list[Row]) -> Group:
    """The group as the rollout held it, with what metrics read of it."""
    trajectories = [
        Trajectory(
            row=row["row"],
            prompt_ids=row["prompt_ids"],
            kind=row["kind"],
            parent=row["parent"],
            fork_token=row["fork_token"],
            completion_ids=row["completion_ids"],
            truncated=row["truncated"],
            out_of_turns=row.get("out_of_turns", False),
            segments=[Segment(**{key: segment[key] for key in _SEGMENT}) for segment in row["segments"]],
            calls=[
                CallOfRow(ToolCall(**{key: call[key] for key in _CALL if key in call}), shared=call["shared"])
                for call in row["tool_calls"]
            ],
        )
        for row in rows
    ]
    return Group(range(len(rows)), num_initial=0, size=len(rows), trajectories=trajectories)


def _mean(values: Iterable[float | None]) -> float | None:
    """Mean of the values that are there."""
    present = [float(value) for value in values if value is not None]
    return fmean(present) if present else None
