"""One group's tree as a PNG: what `log_tree_steps` logs, and what fits a slide.

What it does not do: it shows no text and no tool calls, and its colours are scaled to the group. The page
([`arpo_trl.viewer.render`]) has both, with one scale for the run.
"""

import io
import math
from collections import Counter

import numpy as np

from .records import Row

LOW, HIGH, NEGATIVE, ZERO, POSITIVE, TOOL = "#d9d3f0", "#4c1d95", "#c2410c", "#d4d4d8", "#1d4ed8", "#8b8f9a"


def draw_tree(rows: list[Row]) -> bytes:
    """
    Draw a group: one lane a row from the token at which it left its parent, model tokens coloured by entropy, tool
    results dashed, a dot at the end coloured by advantage.

    Args:
        rows (`list[Row]`):
            Rollout records of one group, as [`~arpo_trl.viewer.records.group_rows`] returns them.

    Returns:
        `bytes`: A PNG.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize
    from matplotlib.figure import Figure

    rows = _in_lanes(rows)
    lanes = {row["row"]: -lane for lane, row in enumerate(rows)}
    segments = [segment for row in rows for segment in row["segments"]]
    highest = max((segment["entropy"] or 0.0 for segment in segments), default=0.0) or 1.0
    entropy_colours = ScalarMappable(
        Normalize(0.0, highest), LinearSegmentedColormap.from_list("entropy", [LOW, HIGH])
    )
    largest = max(abs(_advantage(row)) for row in rows) or 1.0
    advantage_colours = ScalarMappable(
        Normalize(-largest, largest), LinearSegmentedColormap.from_list("advantage", [NEGATIVE, ZERO, POSITIVE])
    )

    figure = Figure(figsize=(9.5, 1.2 + 0.3 * len(rows)), dpi=110, layout="constrained")
    axes = figure.subplots()
    longest = max(len(row["completion_ids"]) for row in rows)
    for row in rows:
        y, end = lanes[row["row"]], len(row["completion_ids"])
        start = row["fork_token"] or 0
        if row["parent"] in lanes:
            axes.plot([start, start], [lanes[row["parent"]], y], color=TOOL, linewidth=1, zorder=0)
        axes.plot([start, end], [y, y], color=TOOL, linewidth=2, linestyle=(0, (1.5, 1)))
        for segment in row["segments"]:
            if segment["start"] >= start:
                span = [segment["start"], segment["end"]]
                colour = entropy_colours.to_rgba(np.asarray(segment["entropy"] or 0.0))
                axes.plot(span, [y, y], color=colour, linewidth=7, solid_capstyle="butt")
        axes.plot(
            [end], [y], "o", color=advantage_colours.to_rgba(np.asarray(_advantage(row))), markeredgecolor="white"
        )
        rewards = [value for value in row["rewards"].values() if value is not None]
        earned = f"{sum(rewards):.2f}" if rewards else "–"
        axes.text(end + 0.012 * longest, y, f"{earned}  ({_advantage(row):+.2f})", va="center", fontsize=8)

    kinds = Counter(row["kind"] for row in rows)
    counts = f"initial {kinds['initial']}, forks {kinds['fork']}, supplements {kinds['supplement']}"
    axes.set_title(f"Step {rows[0]['step']}: {counts}", loc="left", fontsize=10)
    axes.set_yticks(list(lanes.values()), [_label(row) for row in rows], fontsize=8)
    axes.tick_params(axis="y", length=0)
    axes.set_xlim(0, 1.13 * longest)
    axes.set_ylim(-len(rows) + 0.4, 0.6)
    axes.set_xlabel("token of the completion; dashed: tool results; at the end: reward (advantage)", fontsize=9)
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.colorbar(entropy_colours, ax=axes, label="entropy, nats", pad=0.01, shrink=min(1.0, 4 / len(rows)))
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()


def _in_lanes(rows: list[Row]) -> list[Row]:
    """Each row followed by its forks, the latest nearest, so that no line to a fork crosses a row."""
    present = {row["row"] for row in rows}  # a killed run may have lost a parent
    children: dict[int | None, list[Row]] = {}
    for row in rows:
        children.setdefault(row["parent"] if row["parent"] in present else None, []).append(row)

    def below(row: Row) -> list[Row]:
        forks = sorted(children.get(row["row"], ()), key=lambda fork: -fork["fork_token"])
        return [row, *(later for fork in forks for later in below(fork))]

    return [later for root in children.get(None, ()) for later in below(root)]


def _advantage(row: Row) -> float:
    """The row's advantage; 0 where no reward function scored it."""
    value = row["advantage"]
    return 0.0 if value is None or math.isnan(value) else value


def _label(row: Row) -> str:
    origin = f"fork of {row['parent']}" if row["kind"] == "fork" else row["kind"]
    return f"{row['row']}  {origin}"
