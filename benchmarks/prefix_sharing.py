"""
The training step with shared prefixes against TRL's row by row: forward and backward of the same rows, both sides in
one run and interleaved, medians of several repeats.

    python benchmarks/prefix_sharing.py --json outputs/prefix_sharing.json
    python benchmarks/prefix_sharing.py --hidden 512 --layers 4 --cases forked-once
    python benchmarks/prefix_sharing.py --family qwen3_5
    python benchmarks/prefix_sharing.py --cases

Row by row is `GRPOTrainer`'s own method. Rows come shuffled, as TRL shuffles them; sorting siblings together and
finding the tree are part of the time of the sharing side. Micro-batch sizes are tried on both sides: a shared
micro-batch of 8 holds about the tokens of a row-by-row one of 4, so the headline compares the fastest shared
micro-batch that needs no more memory than row by row at 4. Memory is the peak of the resident set, each measurement in
a process of its own.

Families other than `qwen3` are of hidden size 256 and four layers unless told otherwise, in three cases: a gated delta
net runs transformers' own code for PyTorch, a loop over tokens in chunks, which takes a CPU far longer at 1024.

Last, and alone with `--cases` without a name, tokens are counted: those that the recipes of `examples/configs` compute
in a rollout batch, as TRL's shuffle of rows leaves them and with whole groups.

Not covered: the optimiser, generation, and anything but a CPU unless `--device cuda` is given.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import yaml
from accelerate import Accelerator
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GptOssConfig,
    Lfm2Config,
    NemotronHConfig,
    PreTrainedConfig,
    Qwen3_5TextConfig,
    Qwen3Config,
)
from trl import GRPOTrainer
from trl.trainer.utils import add_fused_lm_head

from arpo_trl.scoring.prefix_tree import Cost, group_order, pack, sibling_order, token_sizes
from arpo_trl.scoring.shared_prefix import shared_prefix_logps

VOCABULARY = 1030
REFERENCE = 4  # micro-batch of the row-by-row side that others are held against
SIDES = ("row by row", "shared")


def grow(rng: np.random.Generator, prompt: int, completion: int, roots: int, rounds: list[list[int]]) -> list:
    """
    One group: `roots` rows from a prompt, then forks. `rounds[d]` holds, for each fork that leaves at the end of tool
    round d of `len(rounds) + 1` segments of equal length, the index of the row that it leaves.
    """
    start = rng.integers(0, VOCABULARY, prompt)
    rows = [np.r_[start, rng.integers(0, VOCABULARY, completion)] for _ in range(roots)]
    for depth, parents in enumerate(rounds, start=1):
        cut = prompt + depth * completion // (len(rounds) + 1)
        rows += [
            np.r_[rows[parent][:cut], rng.integers(0, VOCABULARY, prompt + completion - cut)] for parent in parents
        ]
    return rows


def forked_once(rng: np.random.Generator) -> list:
    """8 roots, each forked once at token 220 of 400."""
    start = rng.integers(0, VOCABULARY, 300)
    roots = [np.r_[start, rng.integers(0, VOCABULARY, 400)] for _ in range(8)]
    return roots + [np.r_[root[:520], rng.integers(0, VOCABULARY, 180)] for root in roots]


def four_rounds(rng: np.random.Generator) -> list:
    """2 roots that branch after each of four tool rounds: 2, 4, 4 and 4 forks."""
    return grow(rng, 300, 400, roots=2, rounds=[[0, 1], [0, 1, 2, 3], [0, 1, 4, 5], [2, 3, 6, 7]])


def four_rounds_default(rng: np.random.Generator) -> list:
    """The default of 8 roots, with 2 forks after each of four tool rounds."""
    return grow(rng, 300, 400, roots=8, rounds=[[0, 1], [2, 8], [3, 10], [4, 12]])


def nothing_shared(rng: np.random.Generator) -> list:
    """8 rows with prompts of their own, all of one length: nothing shared and nothing padded."""
    return [rng.integers(0, VOCABULARY, 700) for _ in range(8)]


def ragged(rng: np.random.Generator) -> list:
    """8 rows with prompts of their own, completions of 40 to 400 tokens: nothing shared, but padding to leave out."""
    return [rng.integers(0, VOCABULARY, 300 + length) for length in rng.integers(40, 401, 8)]


# name: (rows, ratio to reach)
CASES: dict[str, tuple[Callable[[np.random.Generator], list], float]] = {
    "forked-once": (forked_once, 2.0),
    "four-rounds": (four_rounds, 2.5),
    "four-rounds-8-roots": (four_rounds_default, 1.0),
    "nothing-shared": (nothing_shared, 0.97),
    "ragged": (ragged, 0.97),
}
PROMPT = 300


WINDOW = 128  # tokens of a sliding window


def mixed(pattern: list[str], layers: int) -> list[str]:
    """Kinds of so many layers, in a pattern that repeats."""
    return [pattern[layer % len(pattern)] for layer in range(layers)]


def family_config(family: str, hidden: int, layers: int) -> PreTrainedConfig:
    """A family's shape: its mixture of layers, at another size."""
    linear, full, sliding = "linear_attention", "full_attention", "sliding_attention"
    shape = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "intermediate_size": 3 * hidden,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 128,
        "vocab_size": VOCABULARY,
    }
    heads = {**shape, "head_dim": 64, "pad_token_id": 0}
    linear_heads = {"linear_num_key_heads": hidden // 128, "linear_num_value_heads": hidden // 64}
    linear_sizes = {"linear_key_head_dim": 64, "linear_value_head_dim": 64}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": hidden}
    mamba = {"mamba_num_heads": hidden // 32, "mamba_head_dim": 64, "ssm_state_size": 64, "n_groups": 2}
    configs: dict[str, Callable[[], PreTrainedConfig]] = {
        "qwen3": lambda: Qwen3Config(**shape, head_dim=64),
        "gemma3": lambda: Gemma3TextConfig(
            **heads, sliding_window=WINDOW, layer_types=mixed([sliding] * 3 + [full], layers)
        ),
        "gpt_oss": lambda: GptOssConfig(
            **{**heads, **experts}, sliding_window=WINDOW, layer_types=mixed([sliding, full], layers)
        ),
        "qwen3_5": lambda: Qwen3_5TextConfig(
            **heads, **linear_heads, **linear_sizes, layer_types=mixed([linear] * 3 + [full], layers)
        ),
        "lfm2": lambda: Lfm2Config(
            **shape, block_auto_adjust_ff_dim=False, layer_types=mixed(["conv", "conv", full, "conv"], layers)
        ),
        "nemotron_h": lambda: NemotronHConfig(
            **{**heads, "num_hidden_layers": None},
            **mamba,
            layers_block_type=mixed([linear, "mlp", full, "mlp"], 2 * layers),
        ),
    }
    return configs[family]()


FAMILIES = ("qwen3", "gemma3", "gpt_oss", "qwen3_5", "lfm2", "nemotron_h")


# Hidden size, layers and cases, where none are given
LARGE = {"hidden": 1024, "layers": 3, "cases": list(CASES)}
SMALL = {"hidden": 256, "layers": 4, "cases": ["forked-once", "four-rounds", "ragged"]}


def build_model(args: argparse.Namespace) -> torch.nn.Module:
    torch.manual_seed(0)
    config = family_config(args.family, args.hidden, args.layers)
    # Its sinks have no other attention on a CPU
    attention = "eager" if args.family == "gpt_oss" else "sdpa"
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).to(args.device)
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    return model.train()


def shuffled_rows(case: str) -> list:
    rng = np.random.default_rng(0)
    rows = CASES[case][0](rng)
    return [rows[place] for place in rng.permutation(len(rows))]


def step(model: torch.nn.Module, rows: list, side: str, micro_batch: int, device: str, prompt: int = PROMPT) -> None:
    """Forward and backward of all rows, in micro-batches, gradients accumulated."""
    score = GRPOTrainer._get_per_token_logps_and_entropies.__wrapped__
    trainer = SimpleNamespace(accelerator=Accelerator(cpu=device == "cpu"))
    if side == "shared":
        rows = [rows[place] for place in sibling_order(rows, len(rows) // micro_batch, len(rows) // micro_batch)]
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for place, row in enumerate(rows):
        ids[place, : len(row)], mask[place, : len(row)] = torch.from_numpy(row), 1
    for part, kept in zip(ids.to(device).split(micro_batch), mask.to(device).split(micro_batch), strict=True):
        scores = shared_prefix_logps(model, part, kept, width - prompt, True) if side == "shared" else None
        if scores is None:
            scores = score(trainer, model, part, kept, width - prompt, compute_entropy=True)
        (scores[0].sum() + scores[1].sum()).backward()


def seconds(function: Callable[[], None], device: str) -> tuple[float, float]:
    """Wall-clock and CPU seconds of a call; the second is the steadier one on a machine with other work."""
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - wall, time.process_time() - cpu


def peak_resident_mib() -> float:
    """Peak resident set of this process. Linux's `ru_maxrss` is no use here: a child starts with its parent's."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().split("VmHWM:")[1].split()[0]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # in bytes on macOS


def peak_memory(case: str, side: str, micro_batch: int, args: argparse.Namespace) -> float:
    """Peak of one step in MiB, from a process that does nothing else."""
    options = ["--family", args.family, "--hidden", args.hidden, "--layers", args.layers, "--device", args.device]
    command = [sys.executable, __file__, "--peak-of", case, side, micro_batch, *options]
    answer = subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True)
    return float(answer.stdout.split()[-1])


def print_peak(case: str, side: str, micro_batch: int, args: argparse.Namespace) -> None:
    model, rows = build_model(args), shuffled_rows(case)
    step(model, rows, side, micro_batch, args.device)
    if args.device == "cuda":
        print(torch.cuda.max_memory_allocated() / 2**20)
    else:
        print(peak_resident_mib())


def measure(case: str, args: argparse.Namespace) -> dict:
    model, rows = build_model(args), shuffled_rows(case)
    sizes = [size for size in args.micro_batches if len(rows) % size == 0]
    runs = [(side, size) for size in sizes for side in SIDES]
    times: dict[tuple[str, int], list[tuple[float, float]]] = {run: [] for run in runs}
    for side in SIDES:  # warms up
        step(model, rows[: sizes[0]], side, sizes[0], args.device)
    for _ in range(args.repeats):
        for side, size in runs:
            model.zero_grad()
            taken = seconds(lambda side=side, size=size: step(model, rows, side, size, args.device), args.device)
            times[side, size].append(taken)
    lines = []
    for side, size in runs:
        wall, cpu = (statistics.median(column) for column in zip(*times[side, size], strict=True))
        peak = 0.0 if args.time_only else peak_memory(case, side, size, args)
        lines.append({"side": side, "micro_batch": size, "seconds": wall, "cpu_seconds": cpu, "peak_mib": peak})
    whole = pack(rows, [PROMPT] * len(rows), Cost(token=1, pair=0, call=0))
    return {
        "case": case,
        "what": " ".join((CASES[case][0].__doc__ or "").split()),
        "rows": len(rows),
        "distinct_token_fraction": len(whole.input_ids) / (len(rows) * (max(map(len, rows)) - 1)),
        "target": CASES[case][1],
        **headline(lines),
        "runs": lines,
    }


def headline(lines: list[dict]) -> dict:
    """Gain of the fastest sharing run that needs no more memory (5 % is noise) than row by row at `REFERENCE`."""
    baseline = {line["micro_batch"]: line for line in lines if line["side"] == "row by row"}
    reference = baseline[REFERENCE if REFERENCE in baseline else min(baseline)]
    fitting = [line for line in lines if line["side"] == "shared" and line["peak_mib"] <= 1.05 * reference["peak_mib"]]
    if not fitting:
        return {"ratio": None}
    best = min(fitting, key=lambda line: line["seconds"])
    return {
        "micro_batch": best["micro_batch"],
        "ratio": reference["seconds"] / best["seconds"],
        "cpu_ratio": reference["cpu_seconds"] / best["cpu_seconds"],
        "ratio_to_best_row_by_row": min(line["seconds"] for line in baseline.values()) / best["seconds"],
        "memory_ratio": best["peak_mib"] / (reference["peak_mib"] or float("nan")),
    }


def recipe_rows(rng: np.random.Generator, groups: int, rows: int, prompt: int, completion: int) -> list:
    """Groups of which half the rows are roots; each is forked once, after 500 to 3,000 tokens of its completion."""
    found = []
    for _ in range(groups):
        start = rng.integers(0, VOCABULARY, prompt)
        roots = [np.r_[start, rng.integers(0, VOCABULARY, completion)] for _ in range(rows // 2)]
        cuts = prompt + rng.integers(500, 3000, len(roots))
        forks = [
            np.r_[root[:cut], rng.integers(0, VOCABULARY, len(root) - cut)]
            for root, cut in zip(roots, cuts, strict=True)
        ]
        found += roots + forks
    return found


def computed_tokens(rows: list, prompt: int) -> int:
    """Tokens that a packed micro-batch computes."""
    return len(pack(rows, [prompt] * len(rows), Cost(token=1, pair=0, call=0)).input_ids)


def computed_fraction(rows: list, order: list[int], micro_batch: int, prompt: int) -> float:
    """Tokens that packed micro-batches compute, of those of their rows."""
    starts = range(0, len(order), micro_batch)
    computed = sum(computed_tokens([rows[row] for row in order[at : at + micro_batch]], prompt) for at in starts)
    return computed / sum(map(len, rows))


def count_recipe(path: Path, micro_batch: int | None = None, prompt: int = 1500, completion: int = 4000) -> dict:
    """
    Count the tokens of one process in a rollout batch of a recipe: rows as TRL shuffles them, brought together within
    each optimiser step (which the loss has to allow), and dealt as whole groups. Another micro-batch has as many rows
    a step.
    """
    recipe = yaml.safe_load(path.read_text())
    size = micro_batch or recipe["per_device_train_batch_size"]
    step = recipe["per_device_train_batch_size"] * recipe["gradient_accumulation_steps"]
    batch = recipe["per_device_train_batch_size"] * recipe["steps_per_generation"]
    group = recipe["num_generations"]
    rng = np.random.default_rng(0)
    rows = recipe_rows(rng, batch // group, group, prompt, completion)
    shuffle = [int(row) for row in rng.permutation(batch)]

    def within_steps(order: list[int]) -> list[int]:
        places = sibling_order([rows[row] for row in order], batch // size, step // size)
        return [order[place] for place in places]

    dealt = group_order([rows[row] for row in shuffle], [row // group for row in shuffle])
    orders = {
        "shuffled rows": shuffle,
        "together within a step": within_steps(shuffle),
        "whole groups": within_steps([shuffle[place] for place in dealt]),
    }
    counts = {name: computed_fraction(rows, order, size, prompt) for name, order in orders.items()}
    return {"recipe": path.stem, "micro_batch": size, "rows_a_step": step, **counts}


def count_largest(path: Path, prompt: int = 1500, completion: int = 4000, sigma: float = 0.7) -> dict:
    """
    Tokens that the largest micro-batch of an optimiser step of a recipe computes, of those of the mean one: with as
    many rows in each, and by tokens. Completions are of log-normal length, the median `completion`; half of the rows
    are forked at the half of the row that they leave.
    """
    recipe = yaml.safe_load(path.read_text())
    size, parts = recipe["per_device_train_batch_size"], recipe["gradient_accumulation_steps"]
    rng = np.random.default_rng(0)
    rows: list = []
    for _ in range(-(-size * parts // recipe["num_generations"])):
        start = rng.integers(0, VOCABULARY, prompt)
        for length in rng.lognormal(np.log(completion), sigma, recipe["num_generations"] // 2).astype(int):
            root = np.r_[start, rng.integers(0, VOCABULARY, length)]
            fork = np.r_[root[: prompt + length // 2], rng.integers(0, VOCABULARY, length - length // 2)]
            rows += [root, fork]
    rows = [rows[row] for row in sibling_order(rows[: size * parts])]

    def largest(sizes: list[int]) -> float:
        ends = np.cumsum(sizes)
        tokens = [computed_tokens(rows[end - n : end], prompt) for end, n in zip(ends, sizes, strict=True)]
        return max(tokens) / (sum(tokens) / parts)

    return {"by rows": largest([size] * parts), "by tokens": largest(token_sizes(rows, parts))}


def count_recipes() -> list[dict]:
    """Each recipe as it stands, and the first of deep search at other micro-batches."""
    folder = Path(__file__).parents[1] / "examples" / "configs"
    lines = [count_recipe(path) for path in sorted(folder.glob("*.yaml")) if "cold_start" not in path.stem]
    lines += [count_recipe(folder / "qwen3-8b_deep_search.yaml", size) for size in (4, 8, 16)]
    print(f"\n{'tokens computed, of all':<27}{'micro-batch':>11}{'shuffled':>10}{'in a step':>10}{'whole groups':>13}")
    for line in lines:
        print(
            f"{line['recipe']:<27}{line['micro_batch']:>11}{line['shuffled rows']:>10.0%}"
            f"{line['together within a step']:>10.0%}{line['whole groups']:>13.0%}"
        )
    print("\ntokens of the largest micro-batch of a step, of the mean one")
    for name in ("qwen2.5-7b_reasoning", "qwen3-8b_deep_search"):
        largest = count_largest(folder / f"{name}.yaml")
        print(f"{name:<27}" + ", ".join(f"{value:.2f} {how}" for how, value in largest.items()))
        lines.append({"recipe": name, "largest micro-batch": largest})
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", choices=CASES, help="by the family, if not given")
    parser.add_argument("--family", choices=FAMILIES, default="qwen3", help="mixture of layers of the model")
    parser.add_argument("--hidden", type=int, help="hidden size, a multiple of 128; by the family, if not given")
    parser.add_argument("--layers", type=int, help="by the family, if not given")
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--time-only", action="store_true", help="measure no memory and count no tokens of recipes")
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    parser.add_argument("--peak-of", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    for name, value in (LARGE if args.family == "qwen3" else SMALL).items():
        setattr(args, name, value if getattr(args, name) is None else getattr(args, name))
    if args.peak_of:
        case, side, micro_batch = args.peak_of
        return print_peak(case, side, int(micro_batch), args)

    if args.cases:
        head = f"{'case':<21}{'side':<12}{'micro-batch':>11}{'seconds':>9}{'CPU s':>8}{'peak MiB':>10}"
        print(f"{head}{'x':>7}{'x CPU':>7}")
    results = []
    for case in args.cases:
        result = measure(case, args)
        results.append(result)
        reference = {line["micro_batch"]: line for line in result["runs"] if line["side"] == "row by row"}
        for line in result["runs"]:
            same = reference[line["micro_batch"]]
            print(
                f"{case:<21}{line['side']:<12}{line['micro_batch']:>11}{line['seconds']:>9.2f}"
                f"{line['cpu_seconds']:>8.2f}{line['peak_mib']:>10.0f}{same['seconds'] / line['seconds']:>7.2f}"
                f"{same['cpu_seconds'] / line['cpu_seconds']:>7.2f}"
            )
        if result["ratio"] is None:
            print(f"  → no sharing run fits the memory of row by row at {REFERENCE}")
        else:
            memory = "an unmeasured part" if args.time_only else f"{result['memory_ratio']:.2f}"
            print(
                f"  → {result['ratio']:.2f}x ({result['cpu_ratio']:.2f}x CPU time; "
                f"{result['ratio_to_best_row_by_row']:.2f}x the fastest row by row) at {memory} of the memory; target "
                f"{result['target']:.2f}x; {result['distinct_token_fraction']:.0%} of the padded tokens are distinct",
                flush=True,
            )
    recipes = [] if args.time_only else count_recipes()
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        settings = {
            "family": args.family,
            "hidden": args.hidden,
            "layers": args.layers,
            "device": args.device,
            "repeats": args.repeats,
        }
        settings |= {"threads": torch.get_num_threads(), "torch": torch.__version__}
        args.json.write_text(json.dumps({"settings": settings, "cases": results, "recipes": recipes}, indent=2) + "\n")


if __name__ == "__main__":
    main()
