"""
From the runs of `reproduce.py` to docs/results.md, its figures and its numbers. No number or verdict of these runs is
typed by hand: each verdict is decided here, by the rules that were written down in `reproduce.py` before the runs.

What this does NOT do: train, or judge whether a difference matters. With five seeds an interval of the median is close
to the range of the seeds.
"""

import itertools
import json
import math
import random
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

COMMAND = "make reproduce"
AXES = {"calls": "calls_executed", "tokens": "tokens_sampled", "seconds": "cpu_seconds"}
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


def smooth(run: dict, quantity: str) -> tuple[list[float], list[float]]:
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


def cost_ratio(run: dict, base: dict, quantity: str) -> float:
    """What `run` spent, as a fraction of what `base` spent, until the accuracy that `base` has at the end.

    Args:
        run, base (`dict`): Two runs from one cold start. The end of `base` is where arms are compared; `run` may be
            longer.
        quantity (`str`): What is spent.

    Returns:
        `float`: infinite if `run` never gets there.
    """
    base = base | {"evaluations": [e for e in base["evaluations"] if e["step"] <= base["compared_at"]]}
    base_xs, base_values = smooth(base, quantity)
    target = base_values[-1]
    needed = first_reach(base_xs, base_values, target)
    return first_reach(*smooth(run, quantity), target) / needed if needed else INFINITY


# Statistics


def bootstrap(values: Sequence[float], statistic: Callable) -> tuple[float, float]:
    """95 % percentile interval of a statistic over seeds; the resampling is seeded, so that it repeats."""
    rng = random.Random(0)
    draws = sorted(statistic(rng.choices(values, k=len(values))) for _ in range(RESAMPLES))
    return draws[int(0.025 * RESAMPLES)], draws[int(0.975 * RESAMPLES)]


def median(values: Sequence[float]) -> float:
    """The middle value; of an even number the upper of the two, so that an infinite one stays infinite."""
    return sorted(values)[len(values) // 2]


# 97.5 % quantiles of Student's t for 1, 2, … degrees of freedom
T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def t_interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the mean of two to ten values (a bootstrap would be too narrow); infinite for one."""
    if len(values) < 2:
        return -INFINITY, INFINITY
    mean = statistics.fmean(values)
    half = T_QUANTILES[len(values) - 2] * statistics.stdev(values) / math.sqrt(len(values))
    return mean - half, mean + half


def estimate(values: Sequence[float], statistic: Callable = statistics.fmean) -> dict:
    """A statistic over seeds with its 95 % interval: Student's t for the mean, the bootstrap for the median."""
    low, high = t_interval(values) if statistic is statistics.fmean else bootstrap(values, statistic)
    return {"value": statistic(values), "low": low, "high": high, "seeds": len(values)}


# Runs


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

    def all(self) -> list[dict]:
        return [run for own in self.values() for run in own.values()]


def with_trl(runs: Runs) -> Runs:
    """
    `runs` and, before `grpo` of each world, `trl`: the same runs with every call executed that their rows made, as TRL
    does. Merging changes no token, so that all else is the same; the seconds are those with merging.
    """
    result = Runs()
    for (world, arm), own in runs.items():
        if arm == "grpo":
            for seed, run in own.items():
                steps = [step | {"calls_executed": step["calls_made"], "calls_merged": 0} for step in run["steps"]]
                result.setdefault((world, "trl"), {})[seed] = run | {"arm": "trl", "steps": steps}
        result[world, arm] = own
    return result


def final(run: dict) -> float:
    """Accuracy after the step at which arms are compared; some train on to see when they get to GRPO's."""
    return next(entry["accuracy"] for entry in run["evaluations"] if entry["step"] == run["compared_at"])


def total(run: dict, quantity: str) -> float:
    """What was spent up to that step."""
    return sum(step[quantity] for step in run["steps"][: run["compared_at"]])


def a_step(runs: Iterable[dict], quantity: str) -> float:
    """What a step spends on average."""
    return statistics.fmean(total(run, quantity) / run["compared_at"] for run in runs)


def compare(runs: Runs, world: str, arm: str, base: str) -> dict | None:
    """
    Two arms over the seeds that both have: the difference in final accuracy, and for each of `AXES` the cost to the
    final accuracy of `base` and what as many steps spent, as fractions of what `base` spent. One seed decides nothing,
    so that there is no result for it.
    """
    pairs = runs.pairs(world, arm, base)
    if len(pairs) < 2:
        return None
    result = {"difference": estimate([final(run) - final(other) for run, other in pairs])}
    for axis, quantity in AXES.items():
        result[axis] = estimate([cost_ratio(run, other, quantity) for run, other in pairs], median)
        result[f"{axis}_total"] = estimate([total(run, quantity) / total(other, quantity) for run, other in pairs])
    return result


def levers(runs: Runs, world: str, arm: str) -> dict | None:
    """
    Of the calls that `trl` executes in as many steps: those that the rows of an arm make, those that forks alone would
    leave, and those that are executed, after merging. As for [`compare`], one seed is too few.
    """
    pairs = [(run, total(base, "calls_executed")) for run, base in runs.pairs(world, arm, "trl")]
    if len(pairs) < 2:
        return None
    return {
        "made": estimate([total(run, "calls_made") / base for run, base in pairs]),
        "forked": estimate([(total(run, "calls_made") - total(run, "calls_shared")) / base for run, base in pairs]),
        "executed": estimate([total(run, "calls_executed") / base for run, base in pairs]),
    }


def fork_shares(run: dict) -> list[float]:
    """Share of a run's forks that leave after the first, second, … call of a row."""
    counts: dict[int, int] = {}
    for step in run["steps"][: run["compared_at"]]:
        for calls, forks in step["forks_after_call"].items():
            counts[int(calls)] = counts.get(int(calls), 0) + forks
    return [counts.get(calls, 0) / max(sum(counts.values()), 1) for calls in range(1, 5)]


# Words

NAMES = {"easy": "the demo's world", "hard": "the harder world", "wordy": "the wordy world"}
MARKS = {True: "**Holds**", False: "**Does not hold**", None: "**Not run**"}


def with_interval(e: dict, form: Callable[[float], str]) -> str:
    return form(e["value"]) + (f" ({form(e['low'])} to {form(e['high'])})" if e["seeds"] > 1 else " (one seed)")


def percent(value: float, digits: int = 1) -> str:
    return f"{100 * value:.{digits}f} %"


def points(e: dict) -> str:
    return with_interval(e, lambda value: f"{round(100 * value, 1) + 0.0:+.1f}")  # −0 is 0


def cost(value: float | None) -> str:
    """A fraction in two digits, or in three where two would hide that it is not 1."""
    if value is None or value == INFINITY:
        return "not reached"
    return f"{value:.{3 if value != 1 and 0.995 <= value < 1.005 else 2}f}"


def ratio(e: dict) -> str:
    return with_interval(e, cost)


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows])


# Claims, in the order of reproduce.py

LIMITS = {"distinct": 0.20, "grpo": 0.20, "arpo": 0.20, "distinct_reuse": 0.15, "reuse2": 0.15}
WORDY_LIMIT = 0.45


class Claim(NamedTuple):
    number: int
    text: str  # the same in all worlds
    holds: bool | None  # None: not run
    why: str  # what decides it


def judge(runs: Runs, world: str, claim: tuple[int, str], arm: str, base: str, rule: Callable[[dict], bool]) -> Claim:
    """A claim, its number and its text, about an arm against another, by a rule for what [`compare`] finds."""
    result = compare(runs, world, arm, base)
    if result is None:
        return Claim(*claim, None, "")
    calls, difference = result["calls"], result["difference"]
    return Claim(*claim, rule(result), f"calls {ratio(calls)}; points {points(difference)}; {calls['seeds']} seeds")


def few_calls(result: dict, limit: float) -> bool:
    calls = result["calls"]
    return calls["value"] <= limit and calls["high"] < 0.5 and result["difference"]["value"] >= 0


def cheaper(result: dict) -> bool:
    return result["calls"]["high"] < 1


def no_lower(result: dict) -> bool:
    return result["difference"]["low"] > -0.01


def better(result: dict) -> bool:
    return result["difference"]["low"] > 0 or cheaper(result)


def spike_claim(runs: Runs, world: str) -> Claim:
    text = "Entropy is higher after a tool result than before it, at the cold start"
    own = [run for arm in runs.arms(world) for run in runs[world, arm].values()]
    if not own:
        return Claim(6, text, None, "")
    entropy = own[0]["entropy_before"]  # of the cold start, which all runs of a world share

    def mean(places: range) -> float:
        tokens = sum(entropy["tokens"][i] for i in places)
        return sum(entropy["mean"][i] * entropy["tokens"][i] for i in places) / max(tokens, 1)

    start = entropy["before"]
    before = mean(range(max(start - 6, 0), start))
    after = mean(range(start, min(start + 6, len(entropy["mean"]))))
    return Claim(6, text, after > before, f"{before:.3f} nats before, {after:.3f} after")


def claims(runs: Runs, world: str) -> list[Claim]:
    own = []
    for arm, limit in LIMITS.items():
        text = f"`{arm}` needs at most {limit:.2f} of the calls of `trl` (wordy: {WORDY_LIMIT:.2f})"
        here = WORDY_LIMIT if world == "wordy" else limit
        own.append(judge(runs, world, (1, text), arm, "trl", partial(few_calls, limit=here)))
    text = "`distinct` ends no lower than `trl`: the interval of the difference lies above −1 point"
    own.append(judge(runs, world, (2, text), "distinct", "trl", no_lower))
    for arm in ("distinct", "arpo"):
        text = f"`{arm}` needs fewer executed calls than `grpo`, which merges too"
        own.append(judge(runs, world, (3, text), arm, "grpo", cheaper))
    for number, what, arm, control in (
        (4, "Entropy beats chance", "arpo", "random"),
        (4, "Entropy beats chance", "distinct", "distinct_random"),
        (5, "Forks that differ beat those that may repeat", "distinct", "expansion"),
    ):
        own.append(judge(runs, world, (number, f"{what}: `{arm}` against `{control}`"), arm, control, better))
    own.append(spike_claim(runs, world))
    for arm in ("distinct", "arpo"):
        for text, rule in (
            (f"At one learning rate `{arm}` ends no lower than `grpo_rate`, as in 2", no_lower),
            (f"At one learning rate `{arm}` needs fewer executed calls than `grpo_rate`, as in 3", cheaper),
        ):
            own.append(judge(runs, world, (7, text), arm, "grpo_rate", rule))
    return own


def claims_table(by_world: Mapping[str, Sequence[Claim]]) -> str:
    rows = []
    for own in zip(*by_world.values(), strict=True):  # one claim in all worlds
        cells = [MARKS[claim.holds] + (f": {claim.why}" if claim.why else "") for claim in own]
        rows.append((f"{own[0].number}. {own[0].text}", *cells))
    return table(["claim", *(NAMES[world] for world in by_world)], rows)


def expectations(by_world: Mapping[str, Sequence[Claim]]) -> str:
    """What `reproduce.py` expected of the claims, against what they say."""

    def holds(number: int, worlds: Sequence[str], wanted: bool) -> bool | None:
        found = [claim.holds for world in worlds for claim in by_world.get(world, []) if claim.number == number]
        if not found or (None in found and all(each in (None, wanted) for each in found)):
            return None
        return all(each is wanted for each in found)

    told = {True: "it is so", False: "it is not so", None: "not all of it was run"}
    small = ("easy", "hard")
    return (
        "Expected before the runs: claim 1 holds in the two small worlds for all arms that merge "
        f"(**{told[holds(1, small, True)]}**); claim 3 does not hold there, since forks and merging save the same "
        f"calls (**{told[holds(3, small, False)]}**); claim 3 holds in the wordy world "
        f"(**{told[holds(3, ('wordy',), True)]}**)."
    )


# Levers

LEVER_ARMS = {
    "grpo": "merging",
    "grpo_rate": "merging, at the learning rate of the forks",
    "small": "half of the rows, merging",
    "reuse2": "each batch twice, merging",
    "reuse4": "each batch four times, merging",
    "arpo": "the paper's forks, merging",
    "expansion": "forks by expansion, merging",
    "distinct": "forks by expansion that differ, merging",
    "distinct_reuse": "those, each batch twice, merging",
}
FORKING = ("arpo", "expansion", "distinct")


def levers_table(runs: Runs, world: str) -> str:
    rows = []
    for arm, what in LEVER_ARMS.items():
        left, against = levers(runs, world, arm), compare(runs, world, arm, "grpo")
        if left is None or against is None:
            continue
        calls, tokens, seconds = (ratio(against[f"{axis}_total"]) for axis in AXES)
        parts = (f"{left[name]['value']:.2f}" for name in ("made", "forked", "executed"))
        rows.append((f"`{arm}`", what, *parts, calls, points(against["difference"]), tokens, seconds))
    header = ["arm", "levers", "calls made", "forks alone", "forks and merging", "executed, `grpo` = 1"]
    return table([*header, "points above `grpo`", "tokens, `grpo` = 1", "seconds, `grpo` = 1"], rows)


def forks_in_short(runs: Runs, worlds: Sequence[str]) -> str:
    """
    Whether forks save executed calls once calls are merged, and what they cost: where, by the whole interval. Against
    GRPO at their own learning rate where that was run, so that no rate is taken for an effect of forks.
    """
    bases = {world: "grpo_rate" if len(runs.get((world, "grpo_rate"), {})) > 1 else "grpo" for world in worlds}
    results = {(world, arm): compare(runs, world, arm, bases[world]) for world in worlds for arm in FORKING}
    found = {key: result for key, result in results.items() if result is not None}

    def where(name: str, less: bool) -> str:
        level, named = 0 if name == "difference" else 1, []
        for world in worlds:
            own = [(arm, found[world, arm][name]) for arm in FORKING if (world, arm) in found]
            arms = [f"`{arm}`" for arm, e in own if (e["high"] < level if less else e["low"] > level)]
            named += [f"{', '.join(arms)} in {NAMES[world]}"] if arms else []
        return "; ".join(named) or "none"

    lines = [
        f"- Forks **{less}**: {where(name, True)}. They **{more}**: {where(name, False)}."
        for name, less, more in (
            ("calls_total", "save executed calls", "execute more"),
            ("difference", "cost accuracy", "add accuracy"),
            ("tokens_total", "save tokens", "sample more"),
            ("seconds_total", "save processor seconds", "take more"),
        )
    ]
    return (
        f"Once equal calls are merged, of {len(found)} pairs of a world and an arm that forks, after as many steps, by the "
        f"whole interval, against GRPO that merges too ({', '.join(f'`{bases[world]}` in {NAMES[world]}' for world in worlds)}):"
        "\n\n" + "\n".join(lines)
    )


# Tables


def arms_table(runs: Runs, world: str) -> str:
    rows = []
    for arm in runs.arms(world):
        own = list(runs[world, arm].values())
        compared = compare(runs, world, arm, "trl")
        rates = {run["arguments"]["learning_rate"] for run in own}
        told = [f"`{arm}`", len(own), ", ".join(f"{rate:g}" for rate in sorted(rates))]
        told += [with_interval(estimate([final(run) for run in own]), percent)]
        told += [f"{a_step(own, 'calls_executed'):.0f} / {a_step(own, 'calls_made'):.0f}"]
        if compared is not None:
            told += [points(compared["difference"]), ratio(compared["calls"])]
            told += [cost(compared[axis]["value"]) for axis in ("tokens", "seconds")]
        rows.append(told + [""] * (9 - len(told)))
    header = ["arm", "seeds", "learning rate", "final accuracy", "calls executed / made, a step", "points above `trl`"]
    return table([*header, "calls to the accuracy of `trl`", "tokens", "seconds"], rows)


def read_search(directory: Path) -> list[dict]:
    """The runs of the search for learning rates, which are named by their rate."""
    return [json.loads(path.read_text()) for path in sorted(directory.glob("*@*.json"))]


def search_table(search: Sequence[dict]) -> str:
    """
    Mean accuracy at each rate; the best, or the smallest of those that are level, in bold. Below, which of them are the
    smallest or the largest rate tried, so that a better one may lie beyond.
    """
    found: dict[tuple[str, str], dict[float, list[float]]] = {}
    for run in search:
        of_arm = found.setdefault((run["world"], run["arm"]), {})
        of_arm.setdefault(run["arguments"]["learning_rate"], []).append(run["evaluations"][-1]["accuracy"])
    rates = sorted({rate for of_arm in found.values() for rate in of_arm})
    rows, edges = [], []
    for (world, arm), of_arm in sorted(found.items()):
        means = {rate: statistics.fmean(of_arm[rate]) for rate in sorted(of_arm)}
        best = max(means, key=means.__getitem__)
        cells = [percent(means[rate]) if rate in means else "" for rate in rates]
        cells[rates.index(best)] = f"**{cells[rates.index(best)]}**"
        edges += [f"`{arm}` in {NAMES[world]}"] if best in (rates[0], rates[-1]) else []
        rows.append((NAMES[world], f"`{arm}`", max(map(len, of_arm.values())), *cells))
    shown = table(["world", "arm", "seeds", *(f"{rate:g}" for rate in rates)], rows)
    return f"{shown}\n\nAt the edge of what was tried, so that a better rate may lie beyond: {', '.join(edges) or 'none'}."


README_ARMS = {
    "GRPO as TRL runs it": "trl",
    "GRPO, equal calls merged": "grpo",
    "the same at the learning rate of the forks": "grpo_rate",
    "GRPO, merged, M = 8": "small",
    "ARPO, the paper's forks": "arpo",
    "ARPO, `distinct` forks": "distinct",
    "the same, each batch twice": "distinct_reuse",
    "GRPO, merged, each batch twice": "reuse2",
}


def readme_table(numbers: Mapping[str, Mapping[str, dict]]) -> str:
    """
    The main arms in three columns a world, for README.md, from what docs/results/numbers.json holds: final accuracy
    with half of its interval, executed calls of as many steps and calls to the accuracy of `trl`, `trl` = 1.
    """
    header, rows = [""], []
    for world in numbers:
        header += [f"{NAMES[world].removeprefix('the ')}: accuracy", "calls", "to TRL's"]
    for label, arm in README_ARMS.items():
        cells = []
        for world in numbers:
            of_arm = numbers[world].get(arm, {})
            if "calls" not in of_arm:
                cells += ["", "", ""]
                continue
            accuracy = of_arm["accuracy"]
            cells += [f"{100 * accuracy['value']:.1f} ± {100 * (accuracy['high'] - accuracy['value']):.1f} %"]
            cells += [cost(of_arm["calls_total"]["value"]), cost(of_arm["calls"]["value"])]
        rows.append((label, *cells))
    return table(header, rows)


# Figures

COLORS = dict(trl="black", grpo="0.45", grpo_rate="C5", small="0.75", arpo="C0", distinct="C2", distinct_reuse="C4")
COLORS |= dict(random="C1", expansion="C3", distinct_random="C6")


def panels(plt: Any, worlds: Sequence[str], height: float, rows: int = 1) -> tuple[Any, list[tuple[str, Any]]]:
    """A figure, and its panels from left to right and from top to bottom, each with its world, a column a world."""
    size = (4.4 * len(worlds) + 1, height * rows)
    figure, grid = plt.subplots(rows, len(worlds), figsize=size, squeeze=False, layout="constrained")
    axes = list(zip([*worlds] * rows, grid.flat, strict=True))
    for world, axis in axes:
        axis.set_title(NAMES[world])
    return figure, axes


def draw_levers(runs: Runs, worlds: Sequence[str], plt: Any) -> Any:
    figure, axes = panels(plt, worlds, 4)
    for world, axis in axes:
        found = {arm: left for arm in LEVER_ARMS if (left := levers(runs, world, arm)) is not None}
        for name, label, color in (
            ("made", "calls made", "0.85"),
            ("forked", "left by forks alone", "0.65"),
            ("executed", "executed: left by forks and merging", "C0"),
        ):
            axis.barh([*found], [left[name]["value"] for left in found.values()], 0.75, color=color, label=label)
        for y, left in enumerate(found.values()):
            axis.text(left["executed"]["value"] + 0.01, y, f"{left['executed']['value']:.2f}", va="center", fontsize=8)
        tokens = [result["tokens_total"]["value"] for arm in found if (result := compare(runs, world, arm, "trl"))]
        axis.plot(tokens, [*found], "D", ms=4, color="C1", label="tokens sampled")
        axis.set(xlim=(0, 1.1), xlabel="of what trl spends in as many steps")
        axis.invert_yaxis()
    figure.legend(*axes[0][1].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    return figure


def draw_accuracy(runs: Runs, worlds: Sequence[str], plt: Any) -> Any:
    figure, axes = panels(plt, worlds, 4, rows=2)
    for place, (world, axis) in enumerate(axes):
        quantity, label = (None, "optimiser steps") if place < len(worlds) else ("calls_executed", "calls executed")
        for arm in ("trl", "grpo", "grpo_rate", "small", "arpo", "distinct", "distinct_reuse"):
            own = [curve(run, quantity) for run in runs.get((world, arm), {}).values()]
            if not own or (arm == "trl" and quantity is None):  # the same points as grpo
                continue
            columns = list(zip(*own, strict=True))  # one a step that was evaluated
            xs = [statistics.fmean(point[0] for point in column) for column in columns]
            means = [estimate([point[1] for point in column]) for column in columns]
            _line(axis, xs, means, COLORS[arm], f"{arm} ({len(own)} seeds)")
        if quantity is not None:
            axis.set_xscale("log", nonpositive="mask")
            left, right = axis.get_xlim()
            ticks = [tick for tick in (10, 30, 100, 300, 1000, 3000, 10_000) if left <= tick <= right]
            axis.minorticks_off()
            axis.set_xticks(ticks, ticks)
        axis.set(xlabel=label, ylabel="held-out accuracy")
        axis.legend(loc="lower right", fontsize=8)
    return figure


def _line(axis: Any, xs: Sequence[float], means: Sequence[dict], color: str, label: str) -> None:
    """A curve of means with a band of their intervals, where there are any."""
    axis.plot(xs, [e["value"] for e in means], marker="o", ms=3, color=color, label=label)
    if all(e["seeds"] > 1 for e in means):
        axis.fill_between(xs, [e["low"] for e in means], [e["high"] for e in means], color=color, alpha=0.15, lw=0)


def draw_entropy(runs: Runs, worlds: Sequence[str], plt: Any) -> Any:
    figure, axes = panels(plt, worlds, 3.8)
    for world, axis in axes:
        lines = [("cold start (one checkpoint)", runs.arms(world)[0], "entropy_before", "C3")]
        for arm in ("grpo", "arpo", "distinct"):
            lines.append((f"after {arm} ({len(runs.get((world, arm), {}))} seeds)", arm, "entropy_after", COLORS[arm]))
        for label, arm, name, color in lines:
            own = [run[name] for run in runs.get((world, arm), {}).values()]
            if not own:
                continue
            # Few answers have a token far from a result; a mean of less than ten tokens is left out
            kept = [i for i in range(len(own[0]["mean"])) if min(each["tokens"][i] for each in own) >= 10]
            means = [estimate([each["mean"][i] for each in own]) for i in kept]
            _line(axis, [i - own[0]["before"] for i in kept], means, color, label)
        axis.axvline(-0.5, color="0.6", ls="--", lw=1)
        axis.set(xlabel="model tokens from a tool result", ylabel="entropy (nats)")
        axis.legend(fontsize=8)
    return figure


def draw_forks(runs: Runs, worlds: Sequence[str], plt: Any) -> Any:
    figure, axes = panels(plt, worlds, 3.6)
    for world, axis in axes:
        arms = [arm for arm in ("arpo", "random", "expansion", "distinct", "distinct_random") if (world, arm) in runs]
        width = 0.8 / max(len(arms), 1)
        for place, arm in enumerate(arms):
            shares = list(zip(*map(fork_shares, runs[world, arm].values()), strict=True))
            xs = [calls + width * (place - (len(arms) - 1) / 2) for calls in range(1, 5)]
            label = f"{arm} ({len(shares[0])} seeds)"
            axis.bar(xs, [statistics.fmean(values) for values in shares], width, color=COLORS[arm], label=label)
        axis.set(xlabel="tool calls before the fork", ylabel="share of forks", xticks=range(1, 5))
        if arms:
            axis.legend(fontsize=8)
    return figure


FIGURES = {
    "levers": (
        draw_levers,
        "Calls made, left by forks alone and executed, of TRL's in as many steps; means over seeds.",
    ),
    "accuracy": (draw_accuracy, "Held-out accuracy against steps and executed calls; bands: 95 % interval of seeds."),
    "entropy": (draw_entropy, "Entropy of the model's tokens around tool results; bands: 95 % interval of seeds."),
    "forks": (draw_forks, "Where forks leave: after how many tool calls of the row; means over seeds."),
}


# The page


def write(directory: Path, grid: Grid, docs: Path = Path("docs")) -> Path:
    """
    Write `<docs>/results.md` and `<docs>/results/` from the runs in `directory`.

    Args:
        directory (`Path`): Where `reproduce.py` wrote them.
        grid (`Sequence[tuple[str, str, Sequence[int]]]`): What was to be run, so that the page says what is missing.
        docs (`Path`): Where the page goes.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    made = Runs.read(directory / "runs", grid)
    if not made:
        raise SystemExit(f"There are no runs in {directory / 'runs'}; run `{COMMAND}` first.")
    runs = with_trl(made)
    worlds = [world for world in NAMES if any(of_world == world for of_world, _ in runs)]
    results = docs / "results"
    results.mkdir(parents=True, exist_ok=True)
    for name, (draw, _) in FIGURES.items():
        draw(runs, worlds, plt).savefig(results / f"{name}.png", dpi=110)
        plt.close("all")
    (results / "numbers.json").write_text(json.dumps(numbers(runs, worlds), indent=1) + "\n")
    compact = json.dumps([_compact(run) for run in made.all()]).replace('{"world"', '\n{"world"')
    (results / "runs.json").write_text(compact + "\n")
    page = docs / "results.md"
    page.write_text(_page(made, worlds, grid, read_search(directory / "runs")))
    return page


def numbers(runs: Runs, worlds: Sequence[str]) -> dict:
    """Of each arm in each world, against `trl`: accuracy, `compare` and `levers`. Infinite becomes null."""
    found: dict = {}
    for world in worlds:
        for arm in runs.arms(world):
            accuracy = estimate([final(run) for run in runs[world, arm].values()])
            compared, left = compare(runs, world, arm, "trl") or {}, levers(runs, world, arm)
            found.setdefault(world, {})[arm] = {"accuracy": accuracy, **compared, "levers": left}
    return _finite(found)


def _finite(value: Any) -> Any:
    """Numbers as JSON knows them; infinite becomes null."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    return None if value is None or math.isinf(value) else round(value, 5)


def _compact(run: dict) -> dict:
    """What the page needs of a run: evaluations, and what was spent until each of them."""
    kept = {name: run[name] for name in ("world", "arm", "seed", "compared_at")}
    kept["learning_rate"] = run["arguments"]["learning_rate"]
    names = ("step", "accuracy", "otherwise", "sampled")
    kept["evaluations"] = [{name: entry[name] for name in names if name in entry} for entry in run["evaluations"]]
    spent = {
        quantity: [round(x, 1) for x, _ in curve(run, quantity)]
        for quantity in ("calls_made", "calls_shared", "calls_executed", "tokens_sampled", "cpu_seconds")
    }
    return kept | {"spent": spent, "forks_after_call": [round(share, 4) for share in fork_shares(run)]}


def evaluated(runs: Sequence[dict]) -> str:
    """After which steps the accuracy of the longest of some runs was read."""
    return ", ".join(str(entry["step"]) for entry in max(runs, key=lambda run: len(run["steps"]))["evaluations"])


def measured(runs: Sequence[dict]) -> str:
    """How much of accuracy was sampled, and how that compares with plain sampling in these very runs."""
    read = [entry for run in runs for entry in run["evaluations"] if entry["step"] and "sampled" in entry]
    if not read:
        return ""
    otherwise = [entry["otherwise"] for entry in read]
    apart = [entry["sampled"] - entry["accuracy"] for entry in read]
    noise = " So accuracy is sampled here, five answers to a question, and has the noise of that."
    return (
        f"{percent(statistics.median(otherwise))} of the answers are right in another way (median of {len(read)} "
        f"evaluations; {percent(max(otherwise), 0)} in the one where most are); the plain share of right answers among "
        f"the same samples is on average {100 * statistics.fmean(apart):+.1f} points away, with a standard deviation "
        f"of {100 * statistics.pstdev(apart):.1f}.{noise if statistics.median(otherwise) > 0.1 else ''}"
    )


def refused(runs: Sequence[dict]) -> str:
    """How many of the calls that the rows of `grpo` make could not be understood, and how they are counted."""
    steps = [step for run in runs if run["arm"] == "grpo" for step in run["steps"]]
    share = sum(step.get("calls_refused", 0) for step in steps) / max(sum(step["calls_made"] for step in steps), 1)
    return (
        f"{percent(share)} of the calls that the rows of `grpo` make cannot be understood and run nothing, with TRL neither; "
        "they are counted among the calls of `trl`."
    )


def _missing(runs: Runs, grid: Grid) -> str:
    planned = dict.fromkeys((world, arm, seed) for world, arm, seeds in grid for seed in seeds)
    missing = [key for key in planned if key[2] not in runs.get(key[:2], {})]
    if not missing:
        return "All runs of the grid are in."
    arms = itertools.groupby(sorted(missing), key=lambda key: f"{key[0]} {key[1]}")
    named = "; ".join(f"{name} (seeds {', '.join(str(seed) for *_, seed in own)})" for name, own in arms)
    return (
        f"**{len(planned) - len(missing)} of the grid's {len(planned)} runs are in.** Missing: {named}. The command runs "
        "what is missing and writes this page anew."
    )


def _figure(name: str) -> str:
    caption = FIGURES[name][1]
    return f"![{caption}](results/{name}.png)\n\n*{caption} Made by `{COMMAND}`.*"


def _page(made: Runs, worlds: Sequence[str], grid: Grid, search: Sequence[dict]) -> str:
    runs = with_trl(made)
    by_world = {world: claims(runs, world) for world in worlds}
    longest = max(made.all(), key=lambda run: len(run["steps"]))
    steps = longest["compared_at"]
    packages = ", ".join(f"{package} {version(package)}" for package in ("torch", "transformers", "trl"))
    parts = [
        "# Results: what a step pays for, with merging, forks and reuse",
        "<!-- Written by examples/reproduce_report.py; do not edit. -->",
        f"""`{COMMAND}` trains the grid of `examples/reproduce.py`, in which the claims and the rules that decide them stand as they were
written before the runs, and writes this page and everything in `docs/results/`. {_missing(made, grid)}

`trl` is GRPO as TRL runs it, every call executed. It is read from the runs of `grpo`, which executes equal calls of a group
once; that changes no token (`tests/test_merging.py`). Costs are fractions of what `trl` spends; its tokens and seconds are
those of `grpo`.""",
        "## What holds",
        "In each cell: the executed calls to the final accuracy of what the arm is compared with, whose own are 1 (median over "
        "seeds); the difference in final accuracy from it (mean); 95 % intervals. Claim 7 and `grpo_rate` were added while the runs "
        "were made, when the search had found different learning rates for `grpo` and `distinct`.",
        claims_table(by_world),
        expectations(by_world),
        "## Each lever alone and together",
        "Merging executes equal calls of a group once. Forks share what was paid before they left. Reuse takes two or four "
        "steps on each batch. Merging changes no token, so what forks alone would leave is counted in the same runs. Arms that "
        "branch have the learning rate that was found for `distinct`, the others that for `grpo`.",
        _figure("levers"),
        forks_in_short(runs, worlds),
    ]
    for world in worlds:
        parts += [f"### Levers in {NAMES[world]}", levers_table(runs, world)]
    parts += [
        "All columns are of as many steps. The first three are fractions of the calls of `trl`. The tools answer at once, so that "
        "seconds hold no waiting for calls.",
        "## Arms",
        f"""`grpo`, `grpo_fast` (twice the learning rate), `grpo_rate` (that of `distinct`), `small` (half of the rows), `dapo`, `reinforce_pp` and `reuse2`, `reuse4` do not
branch. `arpo` is the paper's method with its defaults, `random` the same with entropy ignored, `arpo_distinct` with forks that
differ. `expansion`, `weighted`, `distinct`, `distinct_random`, `novelty`, `contrast` and `distinct_reuse` are not the paper's.
`examples/reproduce.py` has the settings. "Final" is after {steps} steps. The last three columns are what was spent until the
final accuracy of `trl`, medians over seeds; `docs/results/numbers.json` has all intervals.""",
    ]
    for world in worlds:
        parts += [f"### In {NAMES[world]}", arms_table(runs, world)]
    parts += [_figure("accuracy")]
    parts += ["## Learning rates"]
    if search:
        parts += [
            f"Mean accuracy after {steps} steps, on seeds of their own. Arms that branch take the best rate of `distinct` "
            "(bold), the others that of `grpo`.",
            search_table(search),
        ]
    else:
        parts += ["The runs of the search are not there."]
    parts += [
        "## How it was measured",
        f"""Small models (half a million parameters), optimiser steps of 64 rows in groups of M = 16 (`small`: 32 rows, M = 8), all arms of
a world from one cold start, in pairs by seed. All arms but `grpo` train on to step {len(longest["steps"])}, only so that an arm which needs
a few steps more for the accuracy of `trl` is told from one that never gets there. Costs are read on curves that were made
non-decreasing. Intervals are over seeds, 95 %: Student's t for means, the bootstrap for medians of costs, which with five
seeds is nearly their range. Time is that of the processor, rollouts and update, one thread a run; runs share the machine, so
it is rough. Made with {packages}, on a CPU.

- **{NAMES["easy"]}** (`examples/demo_world.py`): two look-ups and a subtraction.
- **{NAMES["hard"]}** (`examples/hard_world.py`): three look-ups and a subtraction, namesakes and rumours among the search
  results, and no call to spare.
- **{NAMES["wordy"]}** (`examples/wordy_world.py`): the demo's questions, plans and queries worded in many ways, so that fewer calls
  of a group are equal.

Held-out accuracy is that of answers sampled at temperature 1. The faultless demonstration of an answer is scored exactly, as the
product of its tokens' probabilities; what is right in another way is sampled.""",
    ]
    own = {world: [run for run in made.all() if run["world"] == world] for world in worlds}
    told = [(world, evaluated(runs), measured(runs)) for world, runs in own.items()]
    parts += ["\n".join(f"- In {NAMES[world]}, after steps {at}: {each}" for world, at, each in told if each)]
    parts += [
        refused(made.all()),
        "What this cannot show: what larger models on real text do, and what each arm does at its own best learning rate. One "
        "cold start a world means that the intervals are over training runs, not over worlds.",
        "## Entropy and forks",
        _figure("entropy"),
        _figure("forks"),
        "## Before",
        """The [second grid](results/second/README.md) executed every call of every row, and had other seeds. Its results stand, the
negative ones too: there the paper's rule did not halve the calls, and forks by entropy did no better than forks at random.

Others report what agrees with the latter: [APPO](https://huggingface.co/papers/2606.12384), that the entropy of tokens alone
does not reliably tell which decisions matter for the outcome, and that these are not gathered at tool calls;
[A²TGPO](https://huggingface.co/papers/2605.06200), that rollouts as trees redistribute the signal of the outcome and constrain
how much trajectories differ.""",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"
