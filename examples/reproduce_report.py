"""
From the runs of `reproduce.py` to docs/results.md, its figures and its numbers. No number or verdict in the page is
typed by hand: each verdict is decided here, from the intervals, by rules that were written down before the runs.

What this does NOT do: train, or judge whether a difference matters. With five seeds an interval of the median is close
to the range of the seeds.
"""

import itertools
import json
import math
import random
import statistics
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

COMMAND = "make reproduce"
AXES = {
    "calls": ("calls_executed", "tool calls executed"),
    "tokens": ("tokens_sampled", "tokens sampled"),
    "seconds": ("cpu_seconds", "processor seconds of training"),
}
RESAMPLES = 2000
INFINITY = math.inf
Grid = Sequence[tuple[str, str, Sequence[int]]]  # world, arm, seeds


# Curves


def curve(run: dict, quantity: str | None = None) -> list[tuple[float, float]]:
    """(x, accuracy) of a run's evaluations; x is the sum of `quantity` so far, by default optimiser steps."""
    spent = [0, *itertools.accumulate(step[quantity] if quantity else 1 for step in run["steps"])]
    return [(spent[entry["step"]], entry["accuracy"]) for entry in run["evaluations"]]


def isotonic(values: Sequence[float]) -> list[float]:
    """The non-decreasing sequence nearest to `values` in squares (pool adjacent violators)."""
    blocks: list[list[float]] = []  # values that share a mean
    for value in values:
        blocks.append([value])
        while len(blocks) > 1 and statistics.fmean(blocks[-2]) > statistics.fmean(blocks[-1]):
            last = blocks.pop()
            blocks[-1] = blocks[-1] + last
    return [statistics.fmean(block) for block in blocks for _ in block]


def smooth(run: dict, quantity: str | None = None) -> tuple[list[float], list[float]]:
    """A run's curve made non-decreasing: x, accuracy."""
    xs, values = zip(*curve(run, quantity), strict=True)
    return list(xs), isotonic(values)


def first_reach(xs: Sequence[float], values: Sequence[float], target: float) -> float:
    """Where a non-decreasing curve, straight between its points, first reaches `target`; infinite if it never does."""
    for i, value in enumerate(values):
        if value >= target - 1e-9:
            if i == 0 or value == values[i - 1]:
                return xs[i]
            share = (target - values[i - 1]) / (value - values[i - 1])
            return xs[i - 1] + share * (xs[i] - xs[i - 1])
    return INFINITY


def cost_ratio(run: dict, base: dict, quantity: str, share_of_gain: float = 1.0) -> float:
    """What `run` spent, as a fraction of what `base` spent, until the accuracy that `base` has at the end.

    Args:
        run, base (`dict`): Two runs from one cold start. The end of `base` is where arms are compared; `run` may be
            longer.
        quantity (`str`): What is spent.
        share_of_gain (`float`): Below 1: until `base` had that share of its gain over the cold start.

    Returns:
        `float`: infinite if `run` never gets there.
    """
    base = base | {"evaluations": [e for e in base["evaluations"] if e["step"] <= base["compared_at"]]}
    base_xs, base_values = smooth(base, quantity)
    target = base_values[0] + share_of_gain * (base_values[-1] - base_values[0])
    needed = first_reach(base_xs, base_values, target)
    return first_reach(*smooth(run, quantity), target) / needed if needed else INFINITY


# Statistics


def bootstrap(values: Sequence[float], statistic: Callable, level: float = 0.95) -> tuple[float, float]:
    """Percentile interval of a statistic over seeds; the resampling is seeded, so that it repeats."""
    rng = random.Random(0)
    draws = sorted(statistic(rng.choices(values, k=len(values))) for _ in range(RESAMPLES))
    tail = (1 - level) / 2
    return draws[int(tail * RESAMPLES)], draws[min(int((1 - tail) * RESAMPLES), RESAMPLES - 1)]


def median(values: Sequence[float]) -> float:
    """The middle value; of an even number the upper of the two, so that an infinite one stays infinite."""
    return sorted(values)[len(values) // 2]


# 97.5 % quantiles of Student's t for 1, 2, … degrees of freedom
T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def t_interval(values: Sequence[float]) -> tuple[float, float]:
    """
    95 % interval of the mean of two to ten values; for so few a bootstrap would be too narrow. One value has none.
    """
    mean = statistics.fmean(values)
    if len(values) < 2:
        return -INFINITY, INFINITY
    half = T_QUANTILES[len(values) - 2] * statistics.stdev(values) / math.sqrt(len(values))
    return mean - half, mean + half


def estimate(values: Sequence[float], statistic: Callable = statistics.fmean) -> dict:
    """A statistic over seeds with its 95 % interval: Student's t for the mean, the bootstrap for the median."""
    low, high = t_interval(values) if statistic is statistics.fmean else bootstrap(values, statistic)
    return {"value": statistic(values), "low": low, "high": high, "seeds": len(values)}


class Runs(dict):
    """Runs by (world, arm): a dict from seed to run."""

    @classmethod
    def read(cls, directory: Path, grid: Grid) -> "Runs":
        """The runs of `grid` that are there, in its order; what else lies in the folder is left out."""
        runs = cls()
        for world, arm, seeds in grid:
            for seed in seeds:
                path = directory / f"{world}-{arm}-{seed}.json"
                if path.exists():
                    runs.setdefault((world, arm), {})[seed] = json.loads(path.read_text())
        return runs

    def pairs(self, world: str, arm: str, base: str) -> list[tuple[dict, dict]]:
        """Runs of two arms by seed, where both are there."""
        first, second = self.get((world, arm), {}), self.get((world, base), {})
        return [(first[seed], second[seed]) for seed in sorted(first) if seed in second]

    def arms(self, world: str) -> list[str]:
        return [arm for of_world, arm in self if of_world == world]


def final(run: dict, name: str = "accuracy") -> float:
    """What was evaluated after the step at which arms are compared; some train on to see when they get to GRPO's."""
    return next(entry[name] for entry in run["evaluations"] if entry["step"] == run["compared_at"])


def total(run: dict, quantity: str) -> float:
    """What was spent up to that step."""
    return sum(step[quantity] for step in run["steps"][: run["compared_at"]])


def compare(runs: Runs, world: str, arm: str, base: str) -> dict | None:
    """All that is said of two arms: final accuracy and what it cost, over the seeds that both have."""
    pairs = runs.pairs(world, arm, base)
    if not pairs:
        return None
    result = {"difference": estimate([final(run) - final(other) for run, other in pairs])}
    for axis, (quantity, _) in AXES.items():
        result[axis] = estimate([cost_ratio(run, other, quantity) for run, other in pairs], median)
        result[f"{axis}_90"] = estimate([cost_ratio(run, other, quantity, 0.9) for run, other in pairs], median)
        result[f"{axis}_total"] = estimate([total(run, quantity) / total(other, quantity) for run, other in pairs])
    return result


# Words


def percent(value: float, digits: int = 1) -> str:
    return f"{100 * value:.{digits}f} %"


def points(e: dict) -> str:
    return f"{100 * e['value']:+.1f} ({100 * e['low']:+.1f} to {100 * e['high']:+.1f})"


def ratio(e: dict) -> str:
    def one(value):
        return "not reached" if value == INFINITY else f"{value:.2f}"

    return f"{one(e['value'])} ({one(e['low'])} to {one(e['high'])})"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows])


# Figures

NAMES = {"easy": "the demo's world", "hard": "the harder world"}
COLORS = {"grpo": "0.35", "small": "0.65", "arpo": "C0", "random": "C1", "expansion": "C2", "expansion_random": "C4"}
MAIN = tuple(COLORS)


def draw_accuracy(runs: Runs, worlds: Sequence[str], plt) -> None:
    axes_of = [("steps", None, "optimiser steps"), ("calls", *AXES["calls"])]
    figure, grid = plt.subplots(len(worlds), 2, figsize=(11, 4 * len(worlds)), squeeze=False, layout="constrained")
    for world, row in zip(worlds, grid, strict=True):
        for (_, quantity, label), axis in zip(axes_of, row, strict=True):
            for arm in MAIN:
                own = [curve(run, quantity) for run in runs.get((world, arm), {}).values()]
                if not own:
                    continue
                columns = list(zip(*own, strict=True))  # one a step that was evaluated
                xs = [statistics.fmean(point[0] for point in column) for column in columns]
                means = [estimate([point[1] for point in column]) for column in columns]
                axis.plot(
                    xs,
                    [e["value"] for e in means],
                    marker="o",
                    ms=3,
                    color=COLORS[arm],
                    label=f"{arm} ({len(own)} seeds)",
                )
                axis.fill_between(
                    xs, [e["low"] for e in means], [e["high"] for e in means], color=COLORS[arm], alpha=0.15, lw=0
                )
            axis.set(xlabel=label, ylabel="held-out accuracy", title=NAMES[world])
            axis.legend(loc="lower right", fontsize=8)
    figure.savefig(_path("accuracy"), dpi=110)


def draw_cost(runs: Runs, worlds: Sequence[str], plt) -> None:
    counts = [sum(arm != "grpo" for arm in runs.arms(world)) for world in worlds]
    figure, grid = plt.subplots(
        len(worlds),
        3,
        figsize=(12, 2.2 * len(worlds) + 0.25 * sum(counts)),
        height_ratios=[6 + count for count in counts],
        squeeze=False,
        layout="constrained",
    )
    for world, row in zip(worlds, grid, strict=True):
        arms = [arm for arm in runs.arms(world) if arm != "grpo" and runs.pairs(world, arm, "grpo")]
        for (quantity, label), axis in zip(AXES.values(), row, strict=True):
            for y, arm in enumerate(arms):
                values = [cost_ratio(run, base, quantity) for run, base in runs.pairs(world, arm, "grpo")]
                shown = [min(value, 2.0) for value in values]  # at the edge: never reached, or more than twice
                axis.plot(
                    shown,
                    [y + 0.1 * (i % 3 - 1) for i in range(len(shown))],
                    "o",
                    ms=4,
                    color=COLORS.get(arm, "0.6"),
                    alpha=0.6,
                )
                axis.plot([min(median(values), 2.0)], [y], "|", ms=16, mew=2, color="black")
            axis.axvline(1, color="0.5", lw=1)
            axis.axvline(0.5, color="0.5", lw=1, ls=":")
            axis.set(yticks=range(len(arms)), yticklabels=arms, xlim=(0, 2.05), title=NAMES[world])
            axis.set_ylim(len(arms) - 0.4, -0.6)
            axis.set_xlabel(f"{label} to GRPO's end,\nGRPO = 1; right edge: not reached", fontsize=8)
    figure.savefig(_path("cost"), dpi=110)


def draw_entropy(runs: Runs, worlds: Sequence[str], plt) -> None:
    figure, grid = plt.subplots(1, len(worlds), figsize=(5.5 * len(worlds), 3.8), squeeze=False, layout="constrained")
    for world, axis in zip(worlds, grid[0], strict=True):
        lines = [("cold start (one checkpoint)", "grpo", "entropy_before", "C3")]
        for arm in ("grpo", "arpo"):
            seeds = len(runs.get((world, arm), {}))
            lines.append((f"after {arm} ({seeds} seeds)", arm, "entropy_after", COLORS[arm]))
        for label, arm, name, color in lines:
            own = [run[name] for run in runs.get((world, arm), {}).values()]
            if not own:
                continue
            # Few answers have a token far from a result; a mean of less than ten tokens is left out
            kept = [i for i in range(len(own[0]["mean"])) if min(each["tokens"][i] for each in own) >= 10]
            means = [estimate([each["mean"][i] for each in own]) for i in kept]
            xs = [i - own[0]["before"] for i in kept]
            axis.plot(xs, [e["value"] for e in means], marker="o", ms=3, color=color, label=label)
            axis.fill_between(xs, [e["low"] for e in means], [e["high"] for e in means], color=color, alpha=0.15, lw=0)
        axis.axvline(-0.5, color="0.6", ls="--", lw=1)
        axis.set(xlabel="model tokens from a tool result", ylabel="entropy (nats)", title=NAMES[world])
        axis.legend(fontsize=8)
    figure.savefig(_path("entropy"), dpi=110)


def fork_shares(run: dict) -> list[float]:
    """Share of a run's forks that leave after the first, second, … call of a row."""
    counts: dict[int, int] = {}
    for step in run["steps"][: run["compared_at"]]:
        for calls, forks in step["forks_after_call"].items():
            counts[int(calls)] = counts.get(int(calls), 0) + forks
    return [counts.get(calls, 0) / max(sum(counts.values()), 1) for calls in range(1, 5)]


def draw_forks(runs: Runs, worlds: Sequence[str], plt) -> None:
    figure, grid = plt.subplots(1, len(worlds), figsize=(5.5 * len(worlds), 3.6), squeeze=False, layout="constrained")
    for world, axis in zip(worlds, grid[0], strict=True):
        arms = [arm for arm in MAIN if arm not in ("grpo", "small") and (world, arm) in runs]
        width = 0.8 / max(len(arms), 1)
        for place, arm in enumerate(arms):
            shares = [
                estimate(list(values)) for values in zip(*map(fork_shares, runs[world, arm].values()), strict=True)
            ]
            xs = [calls + width * (place - (len(arms) - 1) / 2) for calls in range(1, 5)]
            axis.bar(
                xs, [e["value"] for e in shares], width, color=COLORS[arm], label=f"{arm} ({shares[0]['seeds']} seeds)"
            )
            spread = [[e["value"] - e["low"] for e in shares], [e["high"] - e["value"] for e in shares]]
            axis.errorbar(xs, [e["value"] for e in shares], yerr=spread, fmt="none", color="black", lw=1)
        axis.set(xlabel="tool calls before the fork", ylabel="share of forks", xticks=range(1, 5), title=NAMES[world])
        axis.set_ylim(0, 0.9)  # room for the legend
        axis.legend(fontsize=8)
    figure.savefig(_path("forks"), dpi=110)


def draw_pass(runs: Runs, worlds: Sequence[str], plt) -> None:
    figure, grid = plt.subplots(1, len(worlds), figsize=(5.5 * len(worlds), 3.6), squeeze=False, layout="constrained")
    for world, axis in zip(worlds, grid[0], strict=True):
        arms = [arm for arm in MAIN if (world, arm) in runs]
        for place, arm in enumerate(arms):
            own = [estimate([final(run, f"pass@{k}") for run in runs[world, arm].values()]) for k in (1, 3, 5)]
            xs = [i + 0.8 / len(arms) * (place - (len(arms) - 1) / 2) for i in range(3)]
            axis.bar(
                xs,
                [e["value"] for e in own],
                0.8 / len(arms),
                color=COLORS[arm],
                label=f"{arm} ({own[0]['seeds']} seeds)",
            )
            spread = [[e["value"] - e["low"] for e in own], [e["high"] - e["value"] for e in own]]
            axis.errorbar(xs, [e["value"] for e in own], yerr=spread, fmt="none", color="black", lw=1)
        axis.set(xticks=range(3), xticklabels=["pass@1", "pass@3", "pass@5"], ylim=(0, 1.25), title=NAMES[world])
        axis.legend(loc="upper left", ncols=3, fontsize=8)
    figure.savefig(_path("pass"), dpi=110)


_directory = Path("docs/results")


def _path(name: str) -> Path:
    return _directory / f"{name}.png"


# The page


def verdict(claim: str, holds: bool | None, why: str) -> str:
    mark = {True: "**Holds.**", False: "**Does not hold.**", None: "**Not run.**"}[holds]
    return f"{mark} {claim} {why}"


def calls_claim(runs: Runs, world: str, arm: str, base: str = "grpo") -> tuple[bool | None, str]:
    result = compare(runs, world, arm, base)
    if result is None:
        return None, ""
    e = result["calls"]
    holds = e["value"] <= 0.5 and e["high"] < 1
    reached = sum(cost_ratio(*pair, "calls_executed") < INFINITY for pair in runs.pairs(world, arm, base))
    return holds, (
        f"Calls to the final accuracy of `{base}`, `{base}` = 1: {ratio(e)}, reached by {reached} of {e['seeds']} "
        f"seeds; to 90 % of its gain: {ratio(result['calls_90'])}. The same number of steps executed "
        f"{ratio(result['calls_total'])} of the calls." + trained_on(runs, world, arm, base)
    )


def trained_on(runs: Runs, world: str, arm: str, base: str = "grpo") -> str:
    """Where the arm's last evaluation stands against the end of `base`, and for how many of its calls."""
    pairs = runs.pairs(world, arm, base)
    longer = [(run, other) for run, other in pairs if len(run["steps"]) > run["compared_at"]]
    if not longer:
        return ""
    steps = {len(run["steps"]) for run, _ in longer}
    above = estimate([run["evaluations"][-1]["accuracy"] - final(other) for run, other in longer])
    spent = [
        sum(step["calls_executed"] for step in run["steps"]) / total(other, "calls_executed") for run, other in longer
    ]
    return (
        f" Trained on to step {max(steps)} it has executed {statistics.fmean(spent):.2f} of them and is "
        f"{points(above)} points above the end of `{base}`."
    )


def end_claim(runs: Runs, world: str, arm: str, base: str, strictly: bool) -> tuple[bool | None, str]:
    result = compare(runs, world, arm, base)
    if result is None:
        return None, ""
    e = result["difference"]
    doubt = " The interval holds 0, so no difference is shown." if e["low"] <= 0 <= e["high"] else ""
    middle = statistics.median(final(run) - final(other) for run, other in runs.pairs(world, arm, base))
    return (e["low"] > 0 if strictly else e["value"] >= 0), (
        f"Difference in points: {points(e)}, median {100 * middle:+.1f}, {e['seeds']} seeds.{doubt}"
    )


def entropy_claim(runs: Runs, world: str, arm: str, control: str) -> tuple[bool | None, str]:
    result = compare(runs, world, arm, control)
    if result is None:
        return None, ""
    difference, calls = result["difference"], result["calls"]
    return difference["low"] > 0 or calls["high"] < 1, (
        f"Difference in points: {points(difference)}; calls to the control's final accuracy, the control's = 1: "
        f"{ratio(calls)}; {difference['seeds']} seeds."
    )


def spike_claim(runs: Runs, world: str) -> tuple[bool | None, str]:
    own = [run for arm in runs.arms(world) for run in runs[world, arm].values()]
    if not own:
        return None, ""
    entropy = own[0]["entropy_before"]  # of the cold start, which all runs of a world share

    def mean(places):
        tokens = sum(entropy["tokens"][i] for i in places)
        return sum(entropy["mean"][i] * entropy["tokens"][i] for i in places) / max(tokens, 1)

    start = entropy["before"]
    before, after = mean(range(start)), mean(range(start, min(start + 6, len(entropy["mean"]))))
    return after > before, f"{before:.3f} nats before a tool result, {after:.3f} after it, at the cold start."


def claims(runs: Runs, worlds: Sequence[str]) -> str:
    lines = []
    for world in worlds:
        own = [
            ("ARPO reaches GRPO's accuracy with at most half of the calls.", calls_claim(runs, world, "arpo")),
            ("ARPO ends at or above GRPO.", end_claim(runs, world, "arpo", "grpo", strictly=False)),
            ("Branching by entropy beats branching at random.", entropy_claim(runs, world, "arpo", "random")),
            ("Soft attribution beats hard.", end_claim(runs, world, "arpo", "hard_credit", strictly=True)),
            ("Entropy rises after a tool result.", spike_claim(runs, world)),
        ]
        lines += [f"### In {NAMES[world]}", ""]
        lines += [f"{place}. {verdict(claim, *decided)}" for place, (claim, decided) in enumerate(own, start=1)]
        lines += [""]
    return "\n".join(lines).rstrip()


IMPROVEMENTS = {
    "expansion": "N = 2, forks anywhere in the finished tree by entropy and cost "
    '(`branch_rule="expansion"`, [AT²PO](https://huggingface.co/papers/2601.04767)), hard attribution',
    "n4": "the paper's rule with N = 4 instead of 8, so that more is shared",
    "small": "no ARPO at all: GRPO with M = 8, which executes half of the calls since it has half of the rows",
}


def improvements(runs: Runs, worlds: Sequence[str]) -> str:
    lines = []
    for arm, what in IMPROVEMENTS.items():
        lines += [f"`{arm}`: {what}.", ""]
        for world in worlds:
            tried = [
                ("At most half of the calls.", calls_claim(runs, world, arm)),
                ("Ends at or above GRPO.", end_claim(runs, world, arm, "grpo", strictly=False)),
            ]
            lines += [
                f"- In {NAMES[world]}. {verdict(claim, *decided)}"
                for claim, decided in tried
                if decided[0] is not None
            ]
        lines += [""]
    lines += ["What the parts of `expansion` are worth:", ""]
    for world in worlds:
        for claim, decided in (
            (
                "Entropy beats random (`expansion_random`).",
                entropy_claim(runs, world, "expansion", "expansion_random"),
            ),
            ("It beats GRPO with half of the rows (`small`).", entropy_claim(runs, world, "expansion", "small")),
        ):
            if decided[0] is not None:
                lines += [f"- In {NAMES[world]}. {verdict(claim, *decided)}"]
    return "\n".join(lines)


def reasons(runs: Runs, worlds: Sequence[str], starts: dict[str, dict]) -> str:
    """What lies behind the verdicts, in this experiment's numbers."""
    lines = []
    for world in worlds:
        told = []
        for arm in ("arpo", "random", "expansion", "expansion_random"):
            result = compare(runs, world, arm, "grpo")
            if result is not None:
                early = statistics.fmean(fork_shares(run)[0] for run in runs[world, arm].values())
                told.append(f"`{arm}` {result['calls_total']['value']:.2f}, {percent(early, 0)}")
        if told:
            lines.append(
                f"- **Calls of a step in {NAMES[world]}**, GRPO = 1, and the share of forks that leave after the "
                f"first call: {'; '.join(told)}. An initial row shares nothing, so that with N = M / 2 the paper's "
                "rule cannot go below half even if every fork left after the last call."
            )
    for world in (world for world in worlds if world in starts):
        told = []
        for calls, gaps in starts[world]["gaps"].items():
            if len(gaps) >= 20:
                low, middle, high = (0.5 + 0.2 * gaps[int(share * (len(gaps) - 1))] for share in (0.25, 0.5, 0.75))
                told.append(f"{middle:.2f} ({low:.2f} to {high:.2f}) after call {calls}")
        lines.append(
            f"- **Probability of a fork in {NAMES[world]}**, α + β·ΔH with the defaults at the cold start, median and "
            f"quartiles: {', '.join(told)}. For `random` it is 0.50. A row that asks for a fork with such a "
            "probability at each result has mostly asked by its second, so that there is little left for entropy to "
            "choose."
        )
    lines.append(
        "- **Soft and hard** give a shared token the same sum of advantages, and differ in how rows of different "
        "length weigh in it, as long as no ratio is clipped; the more of a row is shared, the more that is."
    )
    return "\n".join(lines)


def arms_table(runs: Runs, world: str) -> str:
    rows = []
    for arm in runs.arms(world):
        own = list(runs[world, arm].values())
        compared = compare(runs, world, arm, "grpo") if arm != "grpo" else None
        accuracy = estimate([final(run) for run in own])
        rows.append(
            (
                f"`{arm}`",
                len(own),
                f"{percent(accuracy['value'])} ({percent(accuracy['low'])} to {percent(accuracy['high'])})",
                *(percent(statistics.fmean(final(run, f"pass@{k}") for run in own)) for k in (3, 5)),
                round(statistics.fmean(total(run, "calls_executed") for run in own)),
                round(statistics.fmean(total(run, "tokens_sampled") for run in own)),
                round(statistics.fmean(total(run, "cpu_seconds") for run in own)),
                *(
                    (points(compared["difference"]), *(ratio(compared[axis]) for axis in AXES))
                    if compared
                    else ("",) * 4
                ),
            )
        )
    header = ["arm", "seeds", "final accuracy", "pass@3", "pass@5", "calls", "tokens", "seconds"]
    return table([*header, "points above GRPO", "calls to GRPO's", "tokens to GRPO's", "seconds to GRPO's"], rows)


SWEEPS = {
    "N, initial rows of 16 (8)": ("n2", "n4", "n12"),
    "β, weight of the entropy gap (0.2)": ("beta0", "beta1"),
    "α = 0 and β = 1, entropy alone (0.5, 0.2)": ("selective",),
    "k, tokens read (20)": ("k5",),
    "rule (bernoulli)": ("threshold", "random"),
    "credit (soft)": ("hard_credit", "tree"),
}


def sweeps_table(runs: Runs, world: str) -> str:
    """Each arm against `arpo`, over the seeds that both have."""
    rows = []
    for name, arms in SWEEPS.items():
        for arm in arms:
            result = compare(runs, world, arm, "arpo")
            if result is not None:
                calls = f"{result['calls_total']['value']:.2f}"
                rows.append((name, f"`{arm}`", result["difference"]["seeds"], points(result["difference"]), calls))
    return table(["what (default)", "arm", "seeds", "points above `arpo`", "calls executed, `arpo` = 1"], rows)


def supplements(runs: Runs, world: str, arm: str) -> float:
    """Share of an arm's rows that were started from the prompt because too few forks were made."""
    rows = [step.get("rows", {}) for run in runs[world, arm].values() for step in run["steps"]]
    return sum(row.get("supplement", 0) for row in rows) / max(sum(sum(row.values()) for row in rows), 1)


def advice(runs: Runs, worlds: Sequence[str]) -> str:
    """
    What the sweeps say of the defaults, decided by intervals of paired differences to `arpo` over 3 seeds or more.
    """
    said = []
    for world in worlds:
        better, worse = [], []
        for arm in (arm for arms in SWEEPS.values() for arm in arms):
            result = compare(runs, world, arm, "arpo")
            if result is not None and result["difference"]["seeds"] >= 3:
                better += [f"`{arm}`"] if result["difference"]["low"] > 0 else []
                worse += [f"`{arm}`"] if result["difference"]["high"] < 0 else []
        sentence = (
            f"In {NAMES[world]}, of the arms with three seeds or more, above the defaults by the whole interval: "
            f"{', '.join(better) or 'none'}; below by the whole interval: {', '.join(worse) or 'none'}."
        )
        sizes = {arm: compare(runs, world, arm, "arpo") for arm in ("n2", "n4", "n12")}
        calls = {arm: result["calls_total"]["value"] for arm, result in sizes.items() if result is not None}
        if calls and min(calls.values()) < 0.9:
            arm = min(calls, key=calls.get)
            sentence += (
                f" Of the values of N, `{arm}` executes the fewest calls, {calls[arm]:.2f} of the default's, and ends "
                f"{points(sizes[arm]['difference'])} points away from it."
            )
        if "n2" in calls and "n4" in calls and calls["n2"] > calls["n4"]:
            sentence += (
                " N = 2 executes more than N = 4: two rows pass too few tool results to ask for 14 forks, so that "
                f"{percent(supplements(runs, world, 'n2'), 0)} of all rows are supplements from the prompt, against "
                f"{percent(supplements(runs, world, 'n4'), 0)}."
            )
        said.append(sentence)
    fewer = []
    for world in worlds:
        result = compare(runs, world, "expansion", "arpo")
        if result is not None:
            fewer.append(
                f"{result['calls_total']['value']:.2f} of the default's calls in {NAMES[world]} and ends "
                f"{points(result['difference'])} points away from it"
            )
    if fewer:
        said.append(
            'For fewer calls there is `branch_rule="expansion"` with N = 2 and hard attribution: it executes '
            + ", ".join(fewer)
            + "."
        )
    said.append(
        "The defaults stay the paper's: no arm was run outside of two small worlds, and an interval of two seeds says "
        "next to nothing."
    )
    return " ".join(said)


FIGURES = {
    "accuracy": (draw_accuracy, "Held-out accuracy against optimiser steps and against executed tool calls."),
    "cost": (
        draw_cost,
        "What each arm spent to reach GRPO's final accuracy. A dot is a seed, the black bar the median of the seeds.",
    ),
    "entropy": (draw_entropy, "Entropy of the model's tokens around tool results, all results of a row together."),
    "forks": (draw_forks, "Where forks leave: after how many tool calls of the row."),
    "pass": (draw_pass, "pass@1, 3 and 5 on held-out questions at the step at which arms are compared."),
}


def write(directory: Path, grid: Grid, docs: Path = Path("docs")) -> Path:
    """
    Write `<docs>/results.md` and `<docs>/results/` from the runs in `directory`.

    Args:
        directory (`Path`): Where `reproduce.py` wrote them.
        grid (`Sequence[tuple[str, str, Sequence[int]]]`): What was to be run, so that the page says what is missing.
        docs (`Path`): Where the page goes.
    """
    global _directory
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    runs = Runs.read(directory / "runs", grid)
    if not runs:
        raise SystemExit(f"There are no runs in {directory / 'runs'}; run `{COMMAND}` first.")
    worlds = [world for world in NAMES if any(of_world == world for of_world, _ in runs)]
    _directory = docs / "results"
    _directory.mkdir(parents=True, exist_ok=True)
    for draw, _ in FIGURES.values():
        draw(runs, worlds, plt)
        plt.close("all")
    numbers = {
        world: {arm: compare(runs, world, arm, "grpo") for arm in runs.arms(world) if arm != "grpo"}
        for world in worlds
    }
    (_directory / "numbers.json").write_text(json.dumps(_finite(numbers), indent=1) + "\n")
    (_directory / "runs.json").write_text(
        json.dumps([_compact(run) for own in runs.values() for run in own.values()]).replace('{"world"', '\n{"world"')
        + "\n"
    )
    page = docs / "results.md"
    starts = {}
    for world in worlds:
        told = directory / "cold_start" / world / "start.json"
        if told.exists():
            starts[world] = json.loads(told.read_text())
    page.write_text(_page(runs, worlds, grid, starts))
    return page


def _finite(value):
    """Numbers as JSON knows them; infinite becomes null."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    return None if value is None or math.isinf(value) else round(value, 5)


def measured(runs: Sequence[dict]) -> str:
    """How accuracy was read, and how that compares with plain sampling in these very runs."""
    read = [entry for run in runs for entry in run["evaluations"] if entry["step"] and "sampled" in entry]
    if not read:
        return ""
    apart = [entry["sampled"] - entry["accuracy"] for entry in read]
    return (
        "The faultless demonstration of an answer is scored exactly, as the product of its tokens' probabilities; "
        f"what is right in another way is sampled: {percent(statistics.median(entry['otherwise'] for entry in read))} "
        f"of the answers (median of {len(read)} evaluations), {percent(max(entry['otherwise'] for entry in read), 0)} "
        "in the one run where most are. The plain share of right answers among the same samples, mostly one a "
        f"question, is on average {100 * statistics.fmean(apart):+.1f} points away, with a standard deviation of "
        f"{100 * statistics.pstdev(apart):.1f}."
    )


def _compact(run: dict) -> dict:
    """What the page needs of a run: evaluations, and what was spent until each of them."""
    kept = {name: run[name] for name in ("world", "arm", "seed", "compared_at", "evaluations")}
    spent = {
        quantity: [round(x, 1) for x, _ in curve(run, quantity)]
        for quantity in ("calls_executed", "calls_shared", "tokens_sampled", "cpu_seconds")
    }
    return kept | {"spent": spent, "forks_after_call": [round(share, 4) for share in fork_shares(run)]}


def _page(runs: Runs, worlds: Sequence[str], grid: Grid, starts: dict[str, dict]) -> str:
    planned = dict.fromkeys((world, arm, seed) for world, arm, seeds in grid for seed in seeds)
    missing = [key for key in planned if key[2] not in runs.get(key[:2], {})]
    wanted: dict[str, list[int]] = {}
    for world, arm, seed in missing:
        wanted.setdefault(f"{world} {arm}", []).append(seed)
    left = (
        "All runs of the grid are in."
        if not missing
        else f"**{len(planned) - len(missing)} of the grid's {len(planned)} runs are in.** Missing: "
        + "; ".join(f"{name} (seeds {', '.join(map(str, seeds))})" for name, seeds in wanted.items())
        + ". The command runs what is missing and writes this page anew."
    )
    every_run = [run for own in runs.values() for run in own.values()]
    longest = max(every_run, key=lambda run: len(run["steps"]))
    steps, evaluations = longest["compared_at"], [entry["step"] for entry in longest["evaluations"]]
    shown = ", ".join(f"{package} {version(package)}" for package in ("torch", "transformers", "trl"))
    parts = [
        "# Results: ARPO against GRPO, DAPO, RLOO and a random control",
        "<!-- Written by examples/reproduce_report.py; do not edit. -->",
        f"""`{COMMAND}` trains the grid of `examples/reproduce.py`, in which the claims and the rules that decide them stand as they were
written before the runs, and writes this page and everything in `docs/results/`. {left}

Small models (half a million parameters) in two invented worlds, optimiser steps of 64 rows in groups of M = 16 (`small`: 32
rows, M = 8), all arms of a world from one cold start, in pairs by seed. "Final" is after {steps} steps, for all arms. All but `grpo` then train on to step
{len(longest["steps"])}, only so that an arm which needs a few steps more than GRPO for GRPO's final accuracy is told from one that never gets
there. A cost is the ratio of what an arm and GRPO spent until that accuracy, on curves that were made non-decreasing.
Intervals are over seeds, 95 %: Student's t for means, the bootstrap for medians of costs, which with five seeds is nearly
their range. Time is that of the processor, rollouts and update, one thread a run; runs share the machine, so it is rough.
Made with {shown}, on a CPU.

Held-out accuracy is that of answers sampled at temperature 1, at steps {", ".join(map(str, evaluations))}. {measured(every_run)}

This is the second grid. The first one read accuracy from 200 to 1000 sampled answers, whose noise was larger than the
differences, and counted an arm that was level with GRPO at the end as one that never gets there. This one has other seeds
and the same worlds and settings. The arms that expand are new: they were chosen among some seventeen variants on seeds that
are in neither grid, but on the same cold starts and held-out questions. `examples/reproduce.py` lists them, and what was
changed in the list of runs while it was run.

- **{NAMES["easy"]}** (`examples/demo_world.py`): two look-ups and a subtraction.
- **{NAMES["hard"]}** (`examples/hard_world.py`): three look-ups and a subtraction, namesakes and rumours among the search
  results, and no call to spare.

What this cannot show: what larger models on real text do, and what each arm does at its own best learning rate. One cold
start a world means that the intervals are over training runs, not over worlds.""",
        "## Claims",
        claims(runs, worlds),
        "## What was tried, and why",
        improvements(runs, worlds),
        "### Why",
        reasons(runs, worlds, starts),
        "Not tried: AEPO's penalty on consecutive forks, 5 % each, which changes little where a row makes three or "
        "four calls; its budget by the entropy of the prompt, which `expansion` has in its own way, since the prompt "
        "is one of its nodes; larger M.",
        "## Arms",
        """`grpo`, `dapo` and `rloo` are TRL's losses on rollouts that do not branch (`examples/reproduce.py` says what is and is not
theirs). `arpo` is the paper's method with its defaults, `random` the same with entropy ignored, `hard_credit` with hard
attribution. The others are named by what they change; `examples/reproduce.py` has them all. `expansion` and its control
`expansion_random` are options of the package that are not the paper's.""",
    ]
    for world in worlds:
        parts += [f"### In {NAMES[world]}", arms_table(runs, world)]
    parts += [
        "Each batch is used for one optimiser step, so no ratio is clipped, and DAPO differs from GRPO only in how "
        "rows of different length weigh.",
        "## Figures",
    ]
    for name, (_, caption) in FIGURES.items():
        parts.append(
            f"![{caption}](results/{name}.png)\n\n{caption}{'' if name == 'cost' else ' Band or bar: 95 % interval over seeds.'} "
            f"Made by `{COMMAND}`."
        )
    parts.append("## Sweeps")
    for world in worlds:
        parts += [f"### In {NAMES[world]}", sweeps_table(runs, world)]
    parts += ["### Advice", advice(runs, worlds)]
    return "\n\n".join(parts) + "\n"
