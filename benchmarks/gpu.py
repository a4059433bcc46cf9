"""
What only a GPU shows, from what the repository holds: nothing is downloaded.

    python benchmarks/gpu.py                       # make bench-gpu: a part begins nothing new after eight minutes
    python benchmarks/gpu.py scoring --json outputs/benchmarks/gpu.json
    python benchmarks/gpu.py --toy                 # the same code on a CPU, in about a minute; its figures say nothing

`scoring`: forward and backward of one group of eight rows, four of them forked off the others at half of their length,
at the shapes of Qwen3-0.6B and Qwen3-1.7B with random weights, in bfloat16 autocast with gradient checkpointing, rows
of 8k and 32k tokens. Row by row is `GRPOTrainer`'s own method. Tokens a second are those of the rows, whether computed
once or often; MFU counts what a side computes: 2 operations a weight and token, 4 a pair of tokens, head and layer,
three times that with the backward pass, and nothing for checkpoints that are computed again.

`rollout`: whole rollouts at the shape of Qwen3-0.6B, TRL's loop against our schedules (see rollout.py, whose script
decides where segments end).

`vllm`, where it is installed: schedules.py's 64 rows with tools of 0.1 to 5 s on a colocated engine, waves against the
continuous schedule and its bounds.

`training`: 50 steps of the demo's world with a model of hidden size 512 and eight layers, GRPO as TRL computes it and
ARPO, from the same cold start.

What it does not do: several GPUs, and a vLLM server.
"""

import argparse
import functools
import importlib.util
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, Qwen3Config, set_seed
from trl.trainer.utils import add_fused_lm_head

sys.path.append(str(Path(__file__).parents[1] / "examples"))
import prefix_sharing  # noqa: E402
import rollout  # noqa: E402
import schedules  # noqa: E402

from arpo_trl.scoring.prefix_tree import Cost, pack  # noqa: E402

# Dense bfloat16 operations a second, from the makers' data sheets
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12}

# name: (hidden, layers, intermediate, heads, key-value heads, size of a head, vocabulary)
SHAPES = {
    "0.6B": (1024, 28, 3072, 16, 8, 128, 151_936),
    "1.7B": (2048, 28, 6144, 16, 8, 128, 151_936),
    "toy": (64, 2, 128, 4, 2, 16, 1030),
}


def config_of(shape: str) -> Qwen3Config:
    hidden, layers, intermediate, heads, kv_heads, head_dim, vocabulary = SHAPES[shape]
    return Qwen3Config(
        hidden_size=hidden,
        num_hidden_layers=layers,
        intermediate_size=intermediate,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=vocabulary,
        max_position_embeddings=40_960,
        tie_word_embeddings=True,
    )


def card(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "CPU"


def peak_flops(device: str) -> float | None:
    return next((flops for name, flops in PEAK_FLOPS.items() if name in card(device)), None)


# Scoring

SIZES = {"row by row": (1, 2, 4, 8), "shared": (2, 4, 8)}
SIZES_OF_LONG_ROWS = {"row by row": (1, 4), "shared": (4, 8)}
"""Side → rows of a micro-batch."""


def forked_group(length: int, prompt: int) -> list[np.ndarray]:
    """Four rows from one prompt and a fork of each at half of its length, shuffled."""
    rng = np.random.default_rng(0)
    start = rng.integers(0, 1000, prompt)
    roots = [np.r_[start, rng.integers(0, 1000, length - prompt)] for _ in range(4)]
    rows = roots + [np.r_[root[: length // 2], rng.integers(0, 1000, length - length // 2)] for root in roots]
    return [rows[place] for place in rng.permutation(len(rows))]


def operations(config: Qwen3Config, weights: int, tokens: int, pairs: int) -> float:
    """Floating-point operations of forward and backward over `tokens` tokens that attend to `pairs` others in all."""
    attention = 4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * pairs
    return 3 * (2 * weights * tokens + attention)


def computed(rows: list[np.ndarray], side: str, micro_batch: int, prompt: int) -> tuple[int, int]:
    """Tokens that a side reads, and pairs of a token and one that it attends to."""
    if side == "row by row":
        return sum(map(len, rows)), sum(len(row) * (len(row) + 1) // 2 for row in rows)
    steps = len(rows) // micro_batch
    order = prefix_sharing.sibling_order(rows, steps, steps)
    tokens = pairs = 0
    for first in range(0, len(rows), micro_batch):
        own = [rows[place] for place in order[first : first + micro_batch]]
        packed = pack(own, [prompt] * len(own), Cost(token=1, pair=0, call=0))
        tokens += len(packed.input_ids)
        pairs += int((np.asarray(packed.position_ids) + 1).sum())
    return tokens, pairs


def scoring(device: str, toy: bool, repeats: int) -> Iterator[dict[str, Any]]:
    for shape in ("toy",) if toy else ("0.6B", "1.7B"):
        torch.manual_seed(0)
        config = config_of(shape)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").to(device).train()
        model.gradient_checkpointing_enable()
        add_fused_lm_head(model, outputs=("log_probs", "entropy"))
        weights = sum(parameter.numel() for parameter in model.parameters())
        for length in (48, 96) if toy else (8192, 32_768):
            prompt = length // 8
            rows = forked_group(length, prompt)
            for micro_batch in (1, 2, 4, 8):
                for side in prefix_sharing.SIDES:
                    # A row of 32k tokens fills the card, so that row by row more of them at once change little
                    if micro_batch not in (SIZES_OF_LONG_ROWS if length > 8192 else SIZES)[side]:
                        continue
                    line: dict[str, Any] = {"shape": shape, "length": length, "side": side, "micro_batch": micro_batch}
                    try:
                        seconds, peak = score(model, rows, side, micro_batch, prompt, device, repeats)
                    except torch.cuda.OutOfMemoryError:
                        yield line | {"seconds": None}
                        continue
                    done = operations(config, weights, *computed(rows, side, micro_batch, prompt)) / seconds
                    line |= {"seconds": seconds, "tokens_per_second": sum(map(len, rows)) / seconds, "peak_gib": peak}
                    yield line | {"mfu": done / flops if (flops := peak_flops(device)) else None}


def score(
    model: torch.nn.Module, rows: list, side: str, micro_batch: int, prompt: int, device: str, repeats: int
) -> tuple[float, float | None]:
    """Median seconds of a step, and the peak of the card's memory in GiB."""
    taken = []
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    for _ in range(repeats + 1):  # the first warms up
        model.zero_grad()
        with torch.autocast(device, torch.bfloat16):
            step = prefix_sharing.step
            taken.append(
                prefix_sharing.seconds(
                    functools.partial(step, model, rows, side, micro_batch, device, prompt), device
                )[0]
            )
    peak = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None
    return statistics.median(taken[1:]), peak


# Rollouts


def rollouts(device: str, toy: bool, repeats: int) -> Iterator[dict[str, Any]]:
    settings = {} if device == "cpu" else {"use_cpu": False, "bf16": True}
    for tool_seconds in (0.0,) if toy else (0.0, 1.0):
        taken: dict[str, list[float]] = {side: [] for side in rollout.SIDES}
        for _ in range(repeats):
            for side, (trainer_class, args_class, options) in rollout.SIDES.items():
                tool = rollout.Waiting(lambda seconds=tool_seconds: seconds)
                seconds, _ = rollout.roll_out(
                    trainer_class,
                    args_class,
                    config_of("toy" if toy else "0.6B"),
                    tool,
                    1 if toy else 4,
                    **{**options, **settings},
                )
                taken[side].append(seconds)
        yield {"tool_s": tool_seconds} | {side: statistics.median(times) for side, times in taken.items()}


def vllm_rollouts(device: str, toy: bool, repeats: int) -> Iterator[dict[str, Any]]:
    if importlib.util.find_spec("vllm") is None:
        print("vLLM is not installed")
        return
    rows, config = (4, None) if toy else (64, config_of("0.6B"))
    for line in schedules.on_an_engine(rows, 1 if toy else repeats, device, config):
        sides = ("waves", "continuous", "slowest_row", "no_tools")
        yield {
            "script": line["seed"],
            **{side: line[side]["seconds"] for side in sides},
            "tokens": line["waves"]["tokens"],
        }


# Training

SIDES = {
    # GRPO as the special case of ARPO, which is TRL's own to the bit; TRL's loop does not know the tags of the demo
    "GRPO": {"num_initial_generations": 16, "prefix_sharing": False, "rollout_schedule": "waves"},
    "ARPO": {"num_initial_generations": 8},
}


def training(device: str, toy: bool, repeats: int) -> Iterator[dict[str, Any]]:
    # Here, since the search brings Numba with it, at whose library vLLM's CPU engine stumbles if it is there first
    import demo
    from demo_world import World, build_model, build_tokenizer

    from arpo_trl.tools.search import BM25Search

    place = demo.CPU | {"bf16": device == "cuda", "use_cpu": device == "cpu"}
    world = World(0, 400, 20) if toy else World()
    steps, questions = (1, 4) if toy else (50, 300)
    tokenizer = build_tokenizer(world)
    with tempfile.TemporaryDirectory() as folder, demo.python_sandbox() as sandbox:
        tools = [BM25Search(world.passages, top_k=1).search, sandbox.python]

        def accuracy(path: Path) -> float:
            return demo.ask(path, tokenizer, tools, world, questions, device)["accuracy"]

        set_seed(0)
        model = build_model(tokenizer, *((64, 1) if toy else (512, 8)))
        cold = Path(folder) / "cold_start"
        demo.cold_start(world, tokenizer, 0, cold, 2 if toy else 1300, model, place)
        yield {"side": "cold start", "steps": 0, "seconds": 0.0, "accuracy": accuracy(cold)}
        for side, options in SIDES.items():
            started = time.perf_counter()
            options = place | options
            if toy:
                options |= {"num_generations": 4, "num_initial_generations": options["num_initial_generations"] // 4}
                options |= {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
            path, _ = demo.train(cold, tokenizer, tools, world, 0, steps, Path(folder) / side, options)
            yield {
                "side": side,
                "steps": steps,
                "seconds": time.perf_counter() - started,
                "accuracy": accuracy(path),
            }


MINUTES = 8.0
PARTS = {"scoring": scoring, "rollout": rollouts, "vllm": vllm_rollouts, "training": training}


def shown(value: object) -> str:
    return "-" if value is None else f"{value:,.3g}" if isinstance(value, float) else str(value)


def main(
    parts: list[str], toy: bool, repeats: int, path: Path | None, minutes: float = MINUTES
) -> dict[str, list[dict[str, Any]]]:
    device = "cpu" if toy else "cuda"
    if not toy and not torch.cuda.is_available():
        raise SystemExit("There is no GPU here: `--toy` runs the same code at toy size on the CPU.")
    results: dict[str, Any] = {"card": card(device), "torch": torch.__version__}
    print(f"{results['card']}, torch {results['torch']}", flush=True)
    for part in parts or PARTS:
        started = time.perf_counter()
        results[part] = []
        print(f"\n{part}")
        for line in PARTS[part](device, toy, repeats):
            if not results[part]:
                print("".join(f"{name:>18}" for name in line))
            print("".join(f"{shown(value):>18}" for value in line.values()), flush=True)
            results[part].append(line)
            if path:  # what is measured is kept, whatever comes after
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(results, indent=2) + "\n")
            if time.perf_counter() - started > 60 * minutes:
                print("the time is over, so what would follow is left out")
                break
        print(f"{time.perf_counter() - started:.0f} s")
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"some of {', '.join(PARTS)}; without a name, all")
    parser.add_argument("--toy", action="store_true", help="the same code at toy size, on the CPU")
    parser.add_argument("--repeats", type=int, default=2, help="repeats of each side; medians are printed")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="after which a part begins nothing new")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    arguments = parser.parse_args()
    unknown = [part for part in arguments.parts if part not in PARTS]
    if unknown:
        parser.error(f"there is no part {unknown[0]!r}: choose from {', '.join(PARTS)}")
    main(arguments.parts, arguments.toy, arguments.repeats, arguments.json, arguments.minutes)
