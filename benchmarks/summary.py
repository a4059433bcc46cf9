"""
One table of the ratios that the benchmarks have written.

    python benchmarks/summary.py outputs/benchmarks
"""

import argparse
import json
from pathlib import Path


def lines(folder: Path) -> list[tuple[str, float, float]]:
    """What was compared, and the seconds (or what it says) of both sides."""
    found = []
    for kind, row in read(folder / "tools.json").get("rollout", {}).items():
        found.append((f"wave of {kind} tools, TRL → ours", row["trl_s"], row["arpo_s"]))
    rollout = read(folder / "rollout.json")
    for row in rollout.get("against_trl", []):
        for side in ("waves", "eager"):
            found.append((f"rollout, tools of {row['tool_s']:g} s, TRL → {side}", row["trl_s"], row[f"{side}_s"]))
    ways = rollout.get("ways_to_generate", {})
    for way in list(ways)[1:]:
        found.append((f"segments, generate → {way}", ways["generate"], ways[way]))
    schedules = read(folder / "schedules.json")
    for row in schedules.get("engine", []):
        waves, continuous = row["waves"]["seconds"], row["continuous"]["seconds"]
        found.append((f"64 rows on vLLM, script {row['seed']}, waves → continuous", waves, continuous))
    if "simulated" in schedules:
        sides = (schedules["simulated"][side]["seconds"] for side in ("waves", "continuous"))
        found.append(("processes of 256 rows, computed clock, waves → continuous", *sides))
    for case in read(folder / "prefix_sharing.json").get("cases", []):
        times = {(run["side"], run["micro_batch"]): run["seconds"] for run in case["runs"]}
        for (side, size), seconds in times.items():
            if side == "shared":
                found.append(
                    (f"training, {case['case']}, {size} rows a micro-batch", times["row by row", size], seconds)
                )
    host = read(folder / "host.json")
    if host:
        ours = sum(host["parts_s"].values())
        saved = host["turns"] * (host["parsing"]["before_ms"] - host["parsing"]["now_ms"]) / 1e3
        what = f"host, {host['rows']} rows, turns parsed with their context → alone, CPU time"
        found.append((what, ours + saved, ours))
        for name, row in host["records"].items():
            sizes = row["before_bytes"] / 1e6, row["now_bytes"] / 1e6
            found.append((f"records, {name}, whole lines → ours, MB", *sizes))
    return found


def read(path: Path) -> dict:
    return json.loads(path.read_text()) if path.exists() else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where `make bench` has put its JSON")
    found = lines(parser.parse_args().folder)
    width = max((len(what) for what, *_ in found), default=0)
    print(f"\n{'':<{width}}{'before, s':>12}{'ours, s':>10}{'ratio':>9}")
    for what, before, ours in found:
        print(f"{what:<{width}}{before:>12.2f}{ours:>10.2f}{before / ours:>8.2f}×")


if __name__ == "__main__":
    main()
