"""
What a rollout costs beside the model and the tools: 64 groups of 16 rows of 4k tokens, as a profile.

    python benchmarks/bookkeeping.py --json outputs/bookkeeping.json
    python benchmarks/bookkeeping.py --prompts 4

A real trainer fills and scores one generation batch, from prompts to the buffered inputs of its micro-batches, with
everything on: branching, records, metrics, the order of siblings. Only sampling is not done: segments are drawn at
random, and so are their entropies, and the tool returns at once. Turning tokens into text and back is no bookkeeping:
TRL does as much. The parts are those of a profile, so they are slowed down by being watched. The last line says how
long a step has to take for the bookkeeping to be 2 % of it, and how long one takes here, measured on one row and
scaled up.
"""

import argparse
import cProfile
import json
import pstats
import random
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import tiny  # noqa: E402
import torch  # noqa: E402
from datasets import Dataset  # noqa: E402

from arpo_trl import ARPOConfig, ARPOTrainer  # noqa: E402
from arpo_trl.rollout.engines.base import Sample  # noqa: E402

ROWS, SEGMENT, ROUNDS = 16, 700, 4
PROMPT = "Read this first. " * 12
RESULT = "found " * 80
# Functions of the profile, and what stands for them in the table
TEXT = {("tags.py", "parse"): "decode and parse calls", ("tags.py", "result_ids"): "encode results"}
OURS = {
    ("rollout/loop.py", "run_waves"): "waves, without that",
    ("rollout/metrics.py", "rollout_sums"): "metrics",
    ("trainer.py", "_record"): "records",
    ("prefix_tree.py", "sibling_order"): "order of siblings",
    ("trainer.py", "_reorder"): "rows into that order",
}


def look_up(query: str) -> str:
    """
    Look something up.

    Args:
        query: What.
    """
    return RESULT


class RandomSampler:
    """Segments of about `SEGMENT` random tokens that end in a call; after `ROUNDS` of them, in the end of the turn."""

    def __init__(self, tokenizer):
        self.rng = random.Random(0)
        self.call = tokenizer.encode("<look_up>what</look_up>", add_special_tokens=False)
        self.result = tokenizer.encode("<result>", add_special_tokens=False)
        self.end = tokenizer.eos_token_id
        letters = [tokenizer.encode(letter, add_special_tokens=False)[0] for letter in "abcdefghijklmnop"]
        self.filler = [self.rng.choice(letters) for _ in range(100_000)]
        self.rounds: dict[int, int] = {}

    def __call__(self, contexts, limits) -> list[Sample]:
        samples = []
        for context in contexts:
            start = self.rng.randrange(len(self.filler) - 2 * SEGMENT)
            ids = self.filler[start : start + self.rng.randint(SEGMENT - 100, SEGMENT + 100)]
            # By the length of what is there, so that a fork goes on where its parent was
            ids = ids + (self.call if len(context) < ROUNDS * (SEGMENT + 60) else [self.end])
            samples.append(Sample(ids, [self.rng.random() for _ in range(20)]))
        return samples


def build_trainer(folder: str, prompts: int) -> ARPOTrainer:
    tokenizer = tiny.build_tokenizer()
    trainer = ARPOTrainer(
        model=tiny.build_model(tokenizer),
        args=ARPOConfig(
            folder,
            num_generations=ROWS,
            num_initial_generations=8,
            per_device_train_batch_size=ROWS,
            gradient_accumulation_steps=prompts,
            max_completion_length=8000,
            tool_protocol="tags",
            log_rollouts=True,
            use_cpu=True,
            bf16=False,
            report_to="none",
            disable_tqdm=True,
        ),
        reward_funcs=lambda completions, **kwargs: [float(len(str(text)) % 7) for text in completions],
        train_dataset=Dataset.from_list(
            [{"prompt": [{"role": "user", "content": PROMPT + str(i)}]} for i in range(prompts)]
        ),
        processing_class=tokenizer,
        tools=[look_up],
    )
    trainer._engine.context_length = 100_000
    trainer._engine.sample = RandomSampler(tokenizer)
    return trainer


def seconds_of(profile: cProfile.Profile) -> dict[str, float]:
    """Seconds in each part, by the profile."""
    parts = TEXT | OURS
    seconds = dict.fromkeys(parts.values(), 0.0)
    for (path, _, function), (*_, cumulative, _) in pstats.Stats(profile).stats.items():
        for (end, name), part in parts.items():
            if function == name and path.endswith(f"arpo_trl/{end}"):
                seconds[part] += cumulative
    seconds["waves, without that"] -= sum(seconds[part] for part in TEXT.values())
    return seconds


def seconds_of_step(tokenizer, hidden: int, length: int, rows: int) -> float:
    """Forward and backward of one row of `length` tokens, times `rows`."""
    model = tiny.build_model(tokenizer, hidden, layers=3)
    ids = torch.randint(100, (1, length))
    taken = []
    for _ in range(2):
        start = time.perf_counter()
        model(input_ids=ids, labels=ids).loss.backward()
        taken.append(time.perf_counter() - start)
    return min(taken) * rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--json", type=Path, help="file for the numbers")
    args = parser.parse_args()
    profile = cProfile.Profile()
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(folder, args.prompts)
        batch = [row for row in trainer.train_dataset for _ in range(ROWS)]
        trainer.model.train()
        taken = {}
        for watched in (False, True):
            trainer._step, trainer._buffered_inputs = 0, None
            start = time.perf_counter()
            if watched:
                profile.runcall(trainer._prepare_inputs, batch)
            else:
                trainer._prepare_inputs(batch)
            taken[watched] = time.perf_counter() - start
        rows = [trajectory for group in trainer._groups for trajectory in group.trajectories]
    tokens = sum(len(row.prompt_ids) + len(row.completion_ids) for row in rows)
    parts = seconds_of(profile)
    ours = sum(parts[part] for part in OURS.values())
    step = seconds_of_step(trainer._tokenizer, 512, tokens // len(rows), len(rows))
    print(
        f"{args.prompts} groups of {ROWS} rows, {tokens / len(rows):.0f} tokens a row, "
        f"{sum(len(row.calls) for row in rows)} calls read\n"
    )
    for part, seconds in parts.items():
        print(f"{part:<30}{seconds:>8.2f} s")
    print(f"{'bookkeeping (the last five)':<30}{ours:>8.2f} s")
    print(f"{'whole batch, TRL included':<30}{taken[True]:>8.2f} s ({taken[False]:.2f} s unwatched)\n")
    print(
        f"2 % of a step of {ours / 0.02:.0f} s. Forward and backward here, hidden size 512: {step:.0f} s, so "
        f"{ours / step:.2%}"
    )
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        results = {
            "prompts": args.prompts,
            "tokens": tokens,
            "parts_s": parts,
            "ours_s": ours,
            "batch_s": taken[False],
            "step_s": step,
        }
        args.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
