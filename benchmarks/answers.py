"""What it costs to compare answers in mathematics: our reading and comparison against math-verify's defaults.

    python benchmarks/answers.py [--data arpo_rl_reasoning_10k.parquet] [--truths 1000] [--runs 3] [--json PATH]

Every truth is compared with itself by both sides in turn, in this process, in CPU seconds; the ratio is that of the
medians. Then come random strings, of which the slowest reading is shown. Without `--data`, the truths are those of the
tests. What is not measured: the worker processes, whose pipes cost both sides the same.
"""

import argparse
import json
import logging
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from random_answers import random_answers  # noqa: E402

from arpo_trl.rewards import math_worker, normalize_answer  # noqa: E402
from arpo_trl.rewards.math_readings import readings  # noqa: E402
from arpo_trl.rewards.mathematics import MAX_LENGTH, clean_answer  # noqa: E402


def load_truths(path: str | None, count: int) -> list[str]:
    if path is None:
        kinds = json.loads((ROOT / "tests/answers/math_pairs.json").read_text()).values()
        return list(dict.fromkeys(truth for kind in kinds for truth, *_ in kind))[:count]
    from arpo_trl.data import load_rl

    rows = load_rl(path)
    return [row["answer"] for row in rows if row["ability"] == "math" and row["answer"]][:count]


def ours(truth: str) -> None:
    math_worker.compare(clean_answer(truth), clean_answer(truth))


def theirs(truth: str) -> None:
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    config = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]
    gold, target = (parse(f"\\boxed{{{truth}}}", config, parsing_timeout=None) for _ in range(2))
    verify(gold, target, timeout_seconds=None)


def cpu_seconds(compare, truths: list[str]) -> float:
    start = time.process_time()
    for truth in truths:
        compare(truth)
    return time.process_time() - start


def slowest_reading(texts: list[str]) -> tuple[float, str]:
    """
    CPU milliseconds and the text of what takes longest to normalise, to read beside a truth, or to normalise as words.
    """
    slowest = (0.0, "")
    for text in texts:
        cleaned = clean_answer(text)
        beside = "18" if len(cleaned) <= MAX_LENGTH else cleaned
        for read, arguments in (clean_answer, (text,)), (readings, (beside, cleaned)), (normalize_answer, (text,)):
            start = time.process_time()
            read(*arguments)
            slowest = max(slowest, (1000 * (time.process_time() - start), text))
    return slowest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data")
    parser.add_argument("--truths", type=int, default=1000)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--strings", type=int, default=10_000)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    math_worker.use_own_numbers()
    truths = load_truths(options.data, options.truths)
    taken: dict = {theirs: [], ours: []}
    for turn in range(options.runs + 1):
        for compare in taken:
            seconds = cpu_seconds(compare, truths if turn else truths[:20])
            taken[compare] += [seconds] if turn else []
    medians = [statistics.median(taken[compare]) for compare in (ours, theirs)]
    milliseconds, text = slowest_reading(random_answers(options.strings))
    result = {
        "truths": len(truths),
        "ours_ms": round(1000 * medians[0] / len(truths), 2),
        "math_verify_ms": round(1000 * medians[1] / len(truths), 2),
        "ratio": round(medians[0] / medians[1], 2),
        "slowest_reading_ms": round(milliseconds, 1),
        "slowest_text": ascii(text[:60]),
        "strings": options.strings,
    }
    print(json.dumps(result, indent=2))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
