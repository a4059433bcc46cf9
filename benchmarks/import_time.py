"""How long `import arpo_trl` takes against `import trl`, and its trainer against TRL's, each in a fresh interpreter.

    python benchmarks/import_time.py [--runs 9] [--json outputs/benchmarks/import_time.json]

Both sides take turns; the times are medians of the import statement alone. What is not measured: a first import, with
cold disk caches and no byte code.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

PAIRS = [
    ("import arpo_trl", "import trl"),
    ("from arpo_trl import ARPOTrainer", "from trl import GRPOTrainer"),
]
TIMED = "import time; start = time.perf_counter(); {}; print(time.perf_counter() - start)"


def seconds(statement: str) -> float:
    """Seconds that the statement takes in an interpreter of its own."""
    answer = subprocess.run(
        [sys.executable, "-c", TIMED.format(statement)], check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    return float(answer.stdout.split()[-1])


def compare(ours: str, theirs: str, runs: int) -> dict[str, str | float]:
    """Medians over `runs` turns, after one that warms the disk cache."""
    taken: dict[str, list[float]] = {ours: [], theirs: []}
    for _ in range(runs + 1):
        for statement in taken:
            taken[statement].append(seconds(statement))
    ours_median, theirs_median = (statistics.median(taken[statement][1:]) for statement in (ours, theirs))
    return {
        "ours": ours,
        "theirs": theirs,
        "ours_seconds": ours_median,
        "theirs_seconds": theirs_median,
        "ratio": ours_median / theirs_median,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    results = []
    for pair in PAIRS:
        result = compare(*pair, args.runs)
        results.append(result)
        line = "{ours} {ours_seconds:.3f} s, {theirs} {theirs_seconds:.3f} s: {ratio:.2f} times as long"
        print(line.format(**result), flush=True)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
