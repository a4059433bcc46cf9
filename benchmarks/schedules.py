"""
The continuous schedule against waves and against what no schedule can beat; all sides in one run.

    python benchmarks/schedules.py --json outputs/schedules.json
    python benchmarks/schedules.py --only simulated --ranks 2

Needs vLLM for the first table (`make test-vllm` makes an environment with its CPU build); the second needs nothing.

First table: 64 rows on a real engine, a small model of random weights. Written for it are the shape of the rollout
alone: how many calls a row makes (0 to 6), how long each segment is (log-normal) and how long each tool takes (0.1 to
5 s, log-uniform); all sides have the same script, and sample the same number of tokens. The bounds: the slowest row
alone on the engine with its tools, and all rows with tools of 0 s.

Second table: 8 processes of 256 rows, groups of 16 with 8 initial rows, on a clock that is computed: a step of an
engine takes 10 ms and 0.05 ms a row, a token that is read 0.02 ms. The loops are the package's own; processes meet
in waves as in training. The bounds: the slowest row of all alone, and the busiest process with tools of 0 s.
"""

import argparse
import heapq
import json
import math
import os
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

from arpo_trl import ARPOConfig
from arpo_trl.execution.executor import ToolCall
from arpo_trl.protocols import Turn
from arpo_trl.rollout.continuous import run_continuous
from arpo_trl.rollout.engines import Sample, Stream
from arpo_trl.rollout.loop import run_waves
from arpo_trl.rollout.rules import BranchRule, branch_rule
from arpo_trl.rollout.steps import Branching, Limits, RolloutHooks
from arpo_trl.rollout.tree import group_parts

CALLS = 6
RESULT, CALL, END = 11, 12, 13
LIMITS = Limits(completion=10**6, context=10**6, tool_turns=CALLS)


def tool_seconds(rng: random.Random) -> float:
    return 0.1 * 50 ** rng.random()


class ScriptedProtocol:
    """`calls(ids, context)` says whether a segment ends in a call; a result is some tokens."""

    def __init__(self, calls, result: int):
        self.calls, self.result = calls, result

    def parse(self, ids, context, tools):
        return Turn(ids, [ToolCall("wait")] if self.calls(ids, context) else [])

    def result_ids(self, calls, written=()):
        return [RESULT] * self.result

    def results_turn(self, calls, written=()):
        return []


# A real engine


def build_engine(folder: str, device: str = "cpu", config=None):
    """A trainer's vLLM engine, on a CPU as the tests make it, and the engine's own counter of steps."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    if device == "cpu":
        os.environ |= {
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_HOST_IP": "127.0.0.1",
            "TORCHDYNAMO_DISABLE": "1",
        }
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    import tiny
    import torch
    from datasets import Dataset
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from arpo_trl import ARPOTrainer

    if device == "cpu":
        from trl.generation import vllm_generation
        from vllm import _custom_ops

        make = vllm_generation.LLM
        vllm_generation.LLM = lambda **settings: make(**settings, dtype="float32", enforce_eager=True)
        _custom_ops._supports_onednn = False
    tokenizer = tiny.build_tokenizer()
    torch.manual_seed(0)
    config = config or Qwen3Config(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=8192,
        vocab_size=0,
    )
    config.vocab_size = max(config.vocab_size, len(tokenizer))
    config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    dtype = "float32" if device == "cpu" else "bfloat16"
    Qwen3ForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    trainer = ARPOTrainer(
        model=folder,
        args=ARPOConfig(
            folder,
            use_vllm=True,
            vllm_max_model_length=8192,
            generation_kwargs={"ignore_eos": True},
            model_init_kwargs={"dtype": dtype},
            use_cpu=device == "cpu",
            bf16=device != "cpu",
            report_to="none",
        ),
        reward_funcs=lambda completions, **kwargs: [0.0] * len(completions),
        train_dataset=Dataset.from_list([{"prompt": tiny.question(1, 2)}]),
        processing_class=tokenizer,
        tools=[tiny.add],
    )
    trainer._engine.sample([[RESULT]], [4])  # sends the weights
    llm_engine = trainer.vllm_generation.llm.llm_engine
    steps, step = Counter(), llm_engine.step

    def counted():
        steps["steps"] += 1
        return step()

    llm_engine.step = counted
    return trainer._engine, steps


def script(rows: int, seed: int) -> list[list[tuple[int, float]]]:
    """For each row its segments: their lengths, and the seconds of the tool behind each but the last."""
    rng = random.Random(seed)
    return [
        [(min(max(round(rng.lognormvariate(math.log(40), 1.0)), 4), 800), tool_seconds(rng)) for _ in range(calls + 1)]
        for calls in (rng.randint(0, CALLS) for _ in range(rows))
    ]


class Limited(Stream):
    """A stream whose limits are the script's."""

    def __init__(self, stream: Stream, limit):
        self.stream, self.limit = stream, limit

    def start(self, context, limit, images=()):
        return self.stream.start(context, self.limit(context))

    def step(self, needed_later):
        return self.stream.step(needed_later)


def run_script(engine, plan: list, schedule: str, tools: bool) -> dict[str, float]:
    """Roll out the rows of a plan, in groups of one; their prompts of 100 tokens tell them apart."""
    prompts = [[20 + row // 200, 20 + row % 200] + [RESULT + 3] * 98 for row in range(len(plan))]
    row_of = {tuple(prompt[:2]): row for row, prompt in enumerate(prompts)}
    turns = Counter()  # segments that a row has had
    counts = Counter()

    def limit(context):
        return plan[row_of[tuple(context[:2])]][turns[tuple(context[:2])]][0]

    def calls(ids, context):
        key = tuple(context[:2])
        assert len(ids) == limit(context), "as long as written"
        turns[key] += 1
        counts["tokens"] += len(ids)
        return turns[key] < len(plan[row_of[key]])

    def wait(call, seconds):
        time.sleep(seconds)
        return call

    with ThreadPoolExecutor(len(plan)) as pool:

        def submit(trajectory, called):
            counts["calls"] += 1
            seconds = plan[trajectory.row][trajectory.tool_turns - 1][1] if tools else 0.0
            return [pool.submit(wait, called[0], seconds)]

        hooks = RolloutHooks(
            sample=lambda contexts, _: engine.sample(contexts, [limit(context) for context in contexts]),
            tools_of=lambda trajectory: {},
            submit=submit,
        )
        rollout = (
            group_parts(0, len(plan), 1, 1),
            prompts,
            ScriptedProtocol(calls, result=60),
            hooks,
            Branching(BranchRule(), 20, engine.vocab_size),
            LIMITS,
            random.Random(0),
            lambda token: True,
        )
        engine._llm_steps.clear()
        start = time.perf_counter()
        with engine.rollout():
            if schedule == "continuous":
                with engine.stream() as stream:
                    run_continuous(*rollout, Limited(stream, limit))
            else:
                run_waves(*rollout)
        return {"seconds": time.perf_counter() - start, **counts, **engine._llm_steps}


def on_an_engine(rows: int, seeds: int, device: str = "cpu", config=None) -> list[dict]:
    with tempfile.TemporaryDirectory() as folder:
        engine, engine._llm_steps = build_engine(folder, device, config)
    run_script(engine, script(rows, 99), "continuous", tools=False)  # warm
    print(f"{rows} rows on a vLLM engine, up to {CALLS} calls, tools of 0.1 to 5 s\n")
    print(
        f"{'seed':>4}{'waves, s':>10}{'continuous, s':>15}{'row alone, s':>14}{'no tools, s':>13}{'waves/cont.':>13}"
        f"{'cont./bound':>13}{'tokens':>8}{'calls':>7}{'steps':>14}"
    )
    table = []
    for seed in range(seeds):
        plan = script(rows, seed)
        slowest = max(plan, key=lambda row: sum(s for _, s in row[:-1]) + 0.005 * sum(n for n, _ in row))
        sides = {
            "waves": run_script(engine, plan, "waves", tools=True),
            "continuous": run_script(engine, plan, "continuous", tools=True),
            "slowest_row": run_script(engine, [slowest], "continuous", tools=True),
            "no_tools": run_script(engine, plan, "continuous", tools=False),
        }
        seconds = {side: found["seconds"] for side, found in sides.items()}
        assert sides["waves"]["tokens"] == sides["continuous"]["tokens"]
        faster = seconds["waves"] / seconds["continuous"]
        over = seconds["continuous"] / max(seconds["slowest_row"], seconds["no_tools"])
        table.append({"seed": seed, **sides, "faster": faster, "over_bound": over})
        steps = f"{sides['waves']['steps']}/{sides['continuous']['steps']}"
        print(
            f"{seed:>4}{seconds['waves']:>10.1f}{seconds['continuous']:>15.1f}{seconds['slowest_row']:>14.1f}"
            f"{seconds['no_tools']:>13.1f}{faster:>12.2f}×{over:>12.2f}×{sides['waves']['tokens']:>8}"
            f"{sides['waves']['calls']:>7}{steps:>14}",
            flush=True,
        )
    return table


# A computed clock


def step_seconds(rows: int) -> float:
    return 0.010 + 0.00005 * rows


READ_SECONDS = 0.00002
"""Of a token that is read; what a row has read before is cached."""


class Shape:
    """What rows do, drawn anew for each segment."""

    def __init__(self, seed: int, tools: bool):
        self.rng = random.Random(seed)
        self.tools = tools
        self.counts: Counter[str] = Counter()

    def segment(self, context: list[int]) -> Sample:
        calls = context.count(CALL)
        length = min(max(round(self.rng.lognormvariate(math.log(200), 1.0)), 4), 8000)
        last = CALL if self.rng.random() < (CALLS - calls) / (CALLS + 1 - calls) else END
        self.counts["tokens"] += length
        return Sample([RESULT] * (length - 1) + [last], [self.rng.random() for _ in range(20)])

    def seconds(self) -> float:
        self.counts["calls"] += 1
        seconds = tool_seconds(self.rng)
        return seconds if self.tools else 0.0


class ComputedStream(Stream):
    """An engine and tools whose time is computed."""

    def __init__(self, shape: Shape):
        self.shape, self.clock = shape, 0.0
        self.running: list[tuple[int, int, Future, Sample]] = []  # a heap by the step at which a segment ends
        self.tools: list[tuple[float, int, Future, ToolCall]] = []  # a heap by the second at which a tool ends
        self.steps = self.number = 0

    def start(self, context, limit, images=()):
        sample, future, self.number = self.shape.segment(context), Future(), self.number + 1
        self.clock += READ_SECONDS * new_tokens(context)
        heapq.heappush(self.running, (self.steps + len(sample.ids), self.number, future, sample))
        return future

    def submit(self, trajectory, calls):
        future, self.number = Future(), self.number + 1
        heapq.heappush(self.tools, (self.clock + self.shape.seconds(), self.number, future, calls[0]))
        return [future]

    def step(self, needed_later):
        if not self.running and not self.tools:
            return False
        next_tool = self.tools[0][0] if self.tools else math.inf
        if self.running:
            each = step_seconds(len(self.running))
            steps = max(min(self.running[0][0] - self.steps, math.ceil((next_tool - self.clock) / each)
                            if next_tool < math.inf else 10**9), 0)  # fmt: skip
            self.steps, self.clock = self.steps + steps, self.clock + steps * each
        else:
            self.clock = max(self.clock, next_tool)
        while self.running and self.running[0][0] <= self.steps:
            _, _, future, sample = heapq.heappop(self.running)
            future.set_result(sample)
        while self.tools and self.tools[0][0] <= self.clock:
            _, _, future, call = heapq.heappop(self.tools)
            future.set_result(call)
        return True


def new_tokens(context: list[int]) -> int:
    """Tokens of a context that were not read or sampled before: a result, or the prompt, which a group shares."""
    return 300 if CALL in context else 0


class Meeting:
    """Where processes wait for each other in waves: their clocks become that of the latest."""

    def __init__(self, ranks: int):
        self.barrier = threading.Barrier(ranks)
        self.told: list[bool] = [False] * ranks
        self.clocks: list[float] = [0.0] * ranks

    def anyone(self, rank: int, here: bool) -> bool:
        self.told[rank] = here
        self.barrier.wait()
        anyone, latest = any(self.told), max(self.clocks)
        self.barrier.wait()
        self.clocks[rank] = latest
        return anyone


def batch_seconds(lengths: list[int]) -> float:
    """Seconds of a batch whose rows leave it as they end."""
    seconds, before = 0.0, 0
    for index, length in enumerate(sorted(lengths)):
        seconds += (length - before) * step_seconds(len(lengths) - index)
        before = length
    return seconds


def computed_settings(rows: int):
    rule = branch_rule("bernoulli", SimpleNamespace(**vars(BRANCHING)))
    groups = group_parts(0, rows, 16, 8)
    prompts = [[20 + row // 16] * 300 for row in range(rows)]
    protocol = ScriptedProtocol(lambda ids, context: ids[-1] == CALL, result=300)
    return groups, prompts, protocol, Branching(rule, 20, 100)


BRANCHING = SimpleNamespace(branch_probability=0.5, entropy_weight=0.2, branch_factor=1)


def computed_waves(ranks: int, rows: int) -> tuple[float, Counter]:
    meeting, counts = Meeting(ranks), Counter()

    def rank_waves(rank: int) -> None:
        shape = Shape(rank, tools=True)
        longest = [0.0]  # tool of this wave

        def sample(contexts, limits):
            samples = [shape.segment(context) for context in contexts]
            meeting.clocks[rank] += READ_SECONDS * sum(map(new_tokens, contexts))
            meeting.clocks[rank] += batch_seconds([len(sample.ids) for sample in samples])
            longest[0] = 0.0
            return samples

        def submit(trajectory, calls):
            longest[0] = max(longest[0], shape.seconds())
            future = Future()
            future.set_result(calls[0])
            return [future]

        def on_wave(wave):
            meeting.clocks[rank] += longest[0]

        groups, prompts, protocol, branching = computed_settings(rows)
        hooks = RolloutHooks(
            sample=sample,
            tools_of=lambda trajectory: {},
            submit=submit,
            anyone=lambda here: meeting.anyone(rank, here),
            on_wave=on_wave,
        )
        run_waves(groups, prompts, protocol, hooks, branching, LIMITS, random.Random(rank), END.__eq__)
        counts.update(shape.counts)

    with ThreadPoolExecutor(ranks) as pool:
        list(pool.map(rank_waves, range(ranks)))
    return max(meeting.clocks), counts


def computed_continuous(ranks: int, rows: int, tools: bool) -> tuple[float, float, Counter]:
    """Seconds of the latest process; of the slowest row alone; counts."""
    latest = slowest = 0.0
    counts: Counter[str] = Counter()
    for rank in range(ranks):
        stream = ComputedStream(Shape(rank, tools))
        seconds_of: Counter[int] = Counter()  # of the tools of a row, calls before its fork left out

        def submit(trajectory, calls, stream=stream, seconds_of=seconds_of):
            before = stream.clock
            (future,) = stream.submit(trajectory, calls)
            end = next(end for end, _, found, _ in stream.tools if found is future)
            seconds_of[trajectory.row] += end - before
            return [future]

        groups, prompts, protocol, branching = computed_settings(rows)
        hooks = RolloutHooks(
            sample=lambda contexts, limits: [],
            tools_of=lambda trajectory: {},
            submit=submit,
            timed=lambda phase: nullcontext(),
        )
        found = run_continuous(
            groups, prompts, protocol, hooks, branching, LIMITS, random.Random(rank), END.__eq__, stream
        )
        latest = max(latest, stream.clock)
        counts.update(stream.shape.counts)
        for row in found:
            own = sum(row.tool_mask[row.fork_token or 0 :])
            slowest = max(slowest, own * step_seconds(1) + seconds_of[row.row])
    return latest, slowest, counts


def on_a_computed_clock(ranks: int, rows: int) -> dict:
    waves, waves_counts = computed_waves(ranks, rows)
    continuous, slowest, counts = computed_continuous(ranks, rows, tools=True)
    without, _, _ = computed_continuous(ranks, rows, tools=False)
    print(f"\n{ranks} processes × {rows} rows, computed clock\n")
    print(f"{'':<14}{'s':>9}{'tokens':>12}{'calls':>9}")
    print(f"{'waves':<14}{waves:>9.0f}{waves_counts['tokens']:>12}{waves_counts['calls']:>9}")
    print(f"{'continuous':<14}{continuous:>9.0f}{counts['tokens']:>12}{counts['calls']:>9}")
    print(f"{'slowest row':<14}{slowest:>9.0f}\n{'no tools':<14}{without:>9.0f}")
    print(
        f"waves / continuous {waves / continuous:.2f}×, continuous / bound {continuous / max(slowest, without):.2f}×"
    )
    return {
        "waves": {"seconds": waves, **waves_counts},
        "continuous": {"seconds": continuous, **counts},
        "slowest_row": slowest,
        "no_tools": without,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["engine", "simulated"], help="one of the tables")
    parser.add_argument("--rows", type=int, default=64, help="rows on the engine")
    parser.add_argument("--seeds", type=int, default=3, help="scripts on the engine")
    parser.add_argument("--ranks", type=int, default=8, help="processes of the second table")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    args = parser.parse_args()
    results = {}
    if args.only != "simulated":
        results["engine"] = on_an_engine(args.rows, args.seeds)
    if args.only != "engine":
        results["simulated"] = on_a_computed_clock(args.ranks, 256)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
