"""
How things grow: the prefix tree up to 64 groups of 16 rows of 8k tokens, a training step as the group (M), the nesting
of forks, the tool rounds and the length of a segment double, one at a time, and the generation of a rollout likewise.

    python benchmarks/scaling.py --json outputs/scaling.json
    python benchmarks/scaling.py --only tree

A column is followed by its growth at each doubling as an exponent: 1 is linear, 2 is quadratic. Times are CPU seconds,
which other work on the machine disturbs least; memory is the peak of the resident set beyond that of the loaded model.

Not covered: tools, and what vLLM does.
"""

import argparse
import json
import math
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from prefix_sharing import PROMPT, VOCABULARY, build_model, grow, peak_resident_mib, step
from transformers import GenerationConfig

from arpo_trl.rollout.engines.prefix_cache import PrefixCache
from arpo_trl.scoring.prefix_tree import Cost, pack, shared_prefixes

DISTINCT = Cost(token=1, pair=0, call=0)
BASE = {"rows": 16, "chain": 2, "rounds": 2, "segment": 64}
DOUBLED = {
    "rows": "M: rows of a group",
    "chain": "nesting: a root and its forks of forks, in rows",
    "rounds": "tool rounds, each a segment longer",
    "segment": "tokens of a segment",
}


def chained(rows: int, chain: int, rounds: int, segment: int) -> list:
    """A group of roots, each followed by `chain - 1` forks, every one leaving the fork before it a round later."""
    rng = np.random.default_rng(0)
    roots = rows // chain
    leaves: list[list[int]] = [[] for _ in range(rounds)]
    for fork in range(1, chain):
        leaves[(fork * rounds - 1) // (chain - 1)] += range((fork - 1) * roots, fork * roots)
    return grow(rng, PROMPT, (rounds + 1) * segment, roots, leaves)


def tree_table() -> list[dict]:
    """The prefix tree of 64 groups as rows get longer, then of more groups of rows of 8k tokens."""
    lines = []
    for groups, length in [(64, 1024), (64, 2048), (64, 4096), (64, 8192), (16, 8192), (32, 8192), (64, 8192)]:
        rng, rows = np.random.default_rng(0), []
        for _ in range(groups):
            rows += grow(rng, length // 8, length - length // 8, 8, [[0, 1], [2, 8], [3, 10], [4, 12]])
        start, clock = time.process_time(), time.perf_counter()
        shared_prefixes(rows)
        found = time.process_time() - start
        tree = pack(rows, [length // 8] * len(rows), DISTINCT)
        lines.append(
            {
                "groups": groups,
                "length": length,
                "tokens": sum(map(len, rows)),
                "packed_tokens": len(tree.input_ids),
                "cpu_seconds_to_sort": found,
                "cpu_seconds": time.process_time() - start,  # sorting twice: by itself, and as a part of packing
                "seconds": time.perf_counter() - clock,
            }
        )
    return lines


def measured(shape: dict, side: str, args: argparse.Namespace) -> dict:
    """A step in a process of its own: CPU seconds, and MiB beyond those of the model and its gradients."""
    options = [str(value) for value in shape.values()]
    command = [sys.executable, __file__, "--step-of", side, *options, "--micro-batch", str(args.micro_batch)]
    answer = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(answer.stdout.splitlines()[-1])


def print_step(side: str, shape: list[int], micro_batch: int) -> None:
    model = build_model(argparse.Namespace(hidden=256, layers=2, device="cpu"))
    step(
        model, chained(8, 2, 1, 4), side, 4, "cpu"
    )  # gradients, threads and kernels are there before the clock starts
    before, start = peak_resident_mib(), time.process_time()
    step(model, chained(*shape), side, micro_batch or shape[0], "cpu")
    seconds, peak = time.process_time() - start, peak_resident_mib() - before
    print(json.dumps({"cpu_seconds": seconds, "peak_mib": peak}))


def step_table(name: str, args: argparse.Namespace) -> list[dict]:
    lines = []
    for factor in (1, 2, 4):
        shape = BASE | {name: BASE[name] * factor}
        if name == "chain":
            shape["rounds"] = 8  # deep enough for all three, so that rows stay as long
        rows = chained(**shape)
        tree = pack(rows, [PROMPT] * len(rows), DISTINCT)
        new = np.diff([segment.start for segment in tree.segments] + [len(tree.input_ids)])
        pairs = sum(int(n) * len(tree.slots[segment.row]) for n, segment in zip(new, tree.segments, strict=True))
        line = shape | {"row_tokens": sum(map(len, rows)), "packed_tokens": len(tree.input_ids), "pairs": pairs}
        for side in ("row by row", "shared"):
            line |= {f"{side}: {key}": value for key, value in measured(shape, side, args).items()}
        lines.append(line)
    return lines


def print_rollout(side: str, rows: int, rounds: int, segment: int) -> None:
    """Sample `rounds + 1` segments for each row of a group, with a result of 64 tokens after each."""
    model = build_model(argparse.Namespace(hidden=256, layers=2, device="cpu")).eval()
    cache = PrefixCache()

    def sample(contexts: list[list[int]], tokens: int) -> list[list[int]]:
        width = max(map(len, contexts))
        inputs = {
            "input_ids": torch.tensor([[0] * (width - len(ids)) + ids for ids in contexts]),
            "attention_mask": torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in contexts]),
            "generation_config": GenerationConfig(do_sample=True, max_new_tokens=tokens, pad_token_id=0),
        }
        output = model.generate(**inputs) if side == "plain" else cache.generate(model, model.generate, **inputs)
        return output[:, width:].tolist()

    rng = np.random.default_rng(0)
    contexts = [rng.integers(VOCABULARY, size=PROMPT).tolist()] * rows
    with torch.no_grad():
        model.generate(torch.zeros(1, 4, dtype=torch.long), max_new_tokens=2, pad_token_id=0)  # warms up
        before, start = peak_resident_mib(), time.process_time()
        for _ in range(rounds + 1):
            results = rng.integers(VOCABULARY, size=(rows, 64)).tolist()
            sampled = sample(contexts, segment)
            contexts = [ids + new + result for ids, new, result in zip(contexts, sampled, results, strict=True)]
        seconds, peak = time.process_time() - start, peak_resident_mib() - before
    print(json.dumps({"cpu_seconds": seconds, "peak_mib": peak}))


def rollout_table(name: str) -> list[dict]:
    lines = []
    for factor in (1, 2, 4):
        shape = {"rows": 8, "rounds": 2, "segment": 32}
        shape[name] *= factor
        line = shape | {"sampled_tokens": shape["rows"] * (shape["rounds"] + 1) * shape["segment"]}
        for side in ("plain", "cached"):
            options = [str(value) for value in shape.values()]
            command = [sys.executable, __file__, "--rollout-of", side, *options]
            answer = subprocess.run(command, check=True, capture_output=True, text=True)
            taken = json.loads(answer.stdout.splitlines()[-1])
            line |= {f"{side}: {key}": value for key, value in taken.items()}
        lines.append(line)
    return lines


def print_table(title: str, lines: list[dict], columns: list[str], compare: str | None = None) -> None:
    print(f"\n{title}\n" + "".join(f"{column:>25}" for column in columns))
    before = None
    for line in lines:
        cells = []
        for column in columns:
            value, growth = line[column], ""
            if before and column != compare and value > 0 and before[column] > 0:
                growth = f" ^{math.log2(value / before[column]):.1f}"
            cells.append(f"{value:.2f}{growth}" if isinstance(value, float) else f"{value}{growth}")
        print("".join(f"{cell:>25}" for cell in cells), flush=True)
        before = line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["tree", "step", "rollout"])
    parser.add_argument("--micro-batch", type=int, default=0, help="rows of a micro-batch; 0 is the whole group")
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    parser.add_argument("--step-of", nargs=5, help=argparse.SUPPRESS)
    parser.add_argument("--rollout-of", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rollout_of:
        side, *numbers = args.rollout_of
        return print_rollout(side, *map(int, numbers))
    if args.step_of:
        side, *shape = args.step_of
        return print_step(side, [int(value) for value in shape], args.micro_batch)
    tables = {}
    if args.only in (None, "tree"):
        tables["tree"] = tree_table()
        columns = ["groups", "length", "tokens", "packed_tokens", "cpu_seconds_to_sort", "cpu_seconds"]
        print_table("Prefix tree: length doubles", tables["tree"][:4], columns, "groups")
        print_table("Prefix tree: groups double", tables["tree"][4:], columns, "length")
    if args.only in (None, "rollout"):
        for name in ("rows", "rounds", "segment"):
            tables[f"rollout: {name}"] = rollout_table(name)
            columns = [name, "sampled_tokens"]
            columns += [f"{side}: {key}" for side in ("plain", "cached") for key in ("cpu_seconds", "peak_mib")]
            print_table(f"Rollout: {DOUBLED[name]} doubles", tables[f"rollout: {name}"], columns, name)
    if args.only in (None, "step"):
        for name, title in DOUBLED.items():
            tables[name] = step_table(name, args)
            columns = [name, "row_tokens", "packed_tokens", "pairs"]
            columns += [f"{side}: {key}" for side in ("row by row", "shared") for key in ("cpu_seconds", "peak_mib")]
            print_table(f"Step: {title} doubles", tables[name], columns, name)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"vocabulary": VOCABULARY, "base": BASE, "tables": tables}, indent=2) + "\n")


if __name__ == "__main__":
    main()
