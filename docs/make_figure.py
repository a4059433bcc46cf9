"""Draw docs/rollout.svg: one group, from its initial trajectories to its full number of rows.

    python docs/make_figure.py

The entropies are made up; gap, probability and who gets the forks are computed from them by the code that training
runs.
"""

import math
import random
from pathlib import Path

from arpo_trl.rollout.entropy import entropy_gap
from arpo_trl.rollout.rules.base import allocate_forks
from arpo_trl.rollout.rules.probability import Threshold
from arpo_trl.rollout.tree import Segment

FIGURE = Path(__file__).parent / "rollout.svg"

ROWS, INITIAL = 7, 4  # M and N
WINDOW, VOCAB, ALPHA, BETA, TAU = 20, 151_936, 0.5, 0.2, 0.5
BASELINE = 0.60  # H_0 of every trajectory, in nats
AFTER_TOOL = [1.10, 0.35, 0.90]  # H_t of the three initial trajectories that call a tool

LEFT, LANE, TOP, END = 96, 46, 64, 640
TOOL, RESULT = 250, 330  # where the call ends, and where its result does

STYLE = """
text { font: 13px system-ui, sans-serif; fill: #222 }
.small { font-size: 11px; fill: #555 }
.model { stroke: #3b6fb5; stroke-width: 5 }
.unsure { stroke: #c2571a; stroke-width: 5 }
.tool { stroke: #999; stroke-width: 5; stroke-dasharray: 3 3 }
.shared { stroke: #999; stroke-width: 1.5; fill: none }
@media (prefers-color-scheme: dark) {
  text { fill: #ddd } .small { fill: #aaa } .model { stroke: #6aa0e8 } .unsure { stroke: #f08a4b }
}
"""


def figure() -> str:
    """The figure as it should be."""
    gaps = [entropy_gap(entropy, BASELINE, WINDOW, VOCAB) for entropy in AFTER_TOOL]
    rule = Threshold(branch_factor=1, branch_probability=ALPHA, entropy_weight=BETA, branch_threshold=TAU)
    probabilities = [rule.probability(Segment(0, 0, entropy_gap=gap)) for gap in gaps]
    rng = random.Random(0)  # this rule draws nothing
    asking = [row for row, p in enumerate(probabilities) if rule.forks(p, rng)]
    granted = allocate_forks([gaps[row] for row in asking], [1] * len(asking), ROWS - INITIAL, rng)
    forks = [row for row, count in zip(asking, granted, strict=True) for _ in range(count)]

    parts, lane = [], 0
    parts += _text(LEFT, 24, "each wave: sample a segment → read its entropy → fork → run the tools")
    for row in range(INITIAL):
        y = TOP + lane * LANE
        parts += _text(8, y + 4, f"row {row}") + _text(8, y + 18, "initial", "small")
        if row == INITIAL - 1:
            parts += _line(LEFT, y, 430, "model") + _text(440, y + 4, "answers without a tool", "small")
            lane += 1
            continue
        parts += _line(LEFT, y, TOOL, "model") + _line(TOOL, y, RESULT, "tool")
        parts += _line(RESULT, y, END, "unsure" if gaps[row] > 0 else "model")
        said = f"H = {AFTER_TOOL[row]:.2f}   ΔH = {_signed(gaps[row])}   P = {probabilities[row]:.2f}"
        said += "   → forks" if row in forks else "   → goes on alone"
        parts += _text(RESULT + 6, y - 8, said, "small")
        lane += 1
        for number, parent in enumerate(forks):
            if parent == row:
                below = TOP + lane * LANE
                parts += _text(8, below + 4, f"row {INITIAL + number}") + _text(
                    8, below + 18, f"fork of {row}", "small"
                )
                parts.append(
                    f'<path class="shared" d="M{RESULT} {y} C{RESULT} {below} {RESULT} {below} '
                    f'{RESULT + 14} {below}"/>'
                )
                parts += _line(RESULT + 14, below, END - 40, "model")
                parts += _text(LEFT, below + 4, "tokens and tool call shared with its parent", "small")
                lane += 1
    y = TOP + lane * LANE
    parts += _text(8, y + 4, f"row {ROWS - 1}") + _text(8, y + 18, "supplement", "small")
    parts += _line(LEFT, y, TOOL + 30, "model") + _text(
        TOOL + 40, y + 4, "sampled from the prompt when all others have ended", "small"
    )
    bottom = y + 44
    parts += _text(TOOL + 2, TOP - 8, "tool result", "small") + _text(
        LEFT, TOP - 8, f"H₀ = {BASELINE:.2f} nats", "small"
    )
    rules = [
        f"ΔH = k (H − H₀) / ln V,  P = clip(α + β ΔH, 0, 1);  here a row forks if P > {TAU}",
        f"k = {WINDOW}, V = {VOCAB:,}, α = {ALPHA}, β = {BETA}; at most {ROWS} rows, the largest ΔH first",
    ]
    for rule in rules:
        parts += _text(LEFT, bottom, rule, "small")
        bottom += 18
    body = "\n".join(parts)
    size = f'width="680" height="{bottom}" viewBox="0 0 680 {bottom}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">\n<title>One group of a rollout</title>\n'
        f"<style>{STYLE}</style>\n{body}\n</svg>\n"
    )


def _signed(value: float) -> str:
    return f"{'−' if value < 0 else '+'}{math.fabs(value):.2f}"


def _line(x: int, y: int, to: int, kind: str) -> list[str]:
    return [f'<line class="{kind}" x1="{x}" y1="{y}" x2="{to}" y2="{y}"/>']


def _text(x: int, y: int, text: str, kind: str = "") -> list[str]:
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return [f'<text x="{x}" y="{y}"' + (f' class="{kind}"' if kind else "") + f' xml:space="preserve">{text}</text>']


if __name__ == "__main__":
    FIGURE.write_text(figure(), encoding="utf-8")
