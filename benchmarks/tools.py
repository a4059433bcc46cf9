"""
One wave of tool calls against TRL: 64 rows that each call a tool which waits a second, both sides in one run.

    python benchmarks/tools.py --json outputs/tools.json
    python benchmarks/tools.py --rows 16 --seconds 0.2

Both sides are a trainer's own `_generate`, from prompts to token ids and mask: `GRPOTrainer` with its own tool loop
and `ARPOTrainer` without forks, on the same prompts, tools and tokenizer. Only the model is not run: where each
trainer asks for tokens it is handed the same tool call, then the same answer. Both must return the same tokens.

A second table says what a call costs beyond the tool itself, with a tool that does nothing.
"""

import argparse
import asyncio
import json
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import tiny  # noqa: E402
import tool_samples  # noqa: E402
from datasets import Dataset  # noqa: E402
from trl import GRPOConfig, GRPOTrainer  # noqa: E402

from arpo_trl import ARPOConfig, ARPOTrainer  # noqa: E402
from arpo_trl.rollout.engines.base import Sample  # noqa: E402
from arpo_trl.tools import ToolCall, ToolExecutor, tool  # noqa: E402


def waiting_tools(seconds: float) -> dict:
    def wait(x: int) -> str:
        """
        Wait, as a search engine does.

        Args:
            x: A number to give back.
        """
        time.sleep(seconds)
        return str(x)

    async def wait_async(x: int) -> str:
        await asyncio.sleep(seconds)
        return str(x)

    wait_async.__name__, wait_async.__doc__ = wait.__name__, wait.__doc__
    return {"sync": wait, "async": wait_async}


class Script:
    """Hands out a tool call for a row's first turn and an answer for its second."""

    def __init__(self, tokenizer):
        self.end = tokenizer.eos_token_id
        call = '<tool_call>\n{"name": "wait", "arguments": {"x": 7}}\n</tool_call>'
        self.call, self.answer = (
            [*tokenizer.encode(text, add_special_tokens=False), self.end] for text in (call, "It is 7.")
        )
        self.turns = 0

    def next_turn(self, rows: int) -> list[list[int]]:
        self.turns += 1
        return [list(self.call if self.turns == 1 else self.answer) for _ in range(rows)]


def roll_out(side: str, function, rows: int, folder: str) -> tuple[float, list]:
    """Return the seconds of one rollout, and its token ids and tool mask."""
    tokenizer = tiny.build_tokenizer()
    options = {
        "num_generations": rows,
        "per_device_train_batch_size": rows,
        "max_completion_length": 200,
        "max_tool_calling_iterations": 3,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "disable_tqdm": True,
    }
    trainer_class, args = GRPOTrainer, GRPOConfig(folder, **options) if side == "TRL" else None
    if side == "ARPO":
        trainer_class = ARPOTrainer
        args = ARPOConfig(folder, num_initial_generations=rows, max_tool_concurrency=rows, **options)
    prompts = [tiny.question(3, 4) for _ in range(rows)]
    trainer = trainer_class(
        model=tiny.build_model(tokenizer),
        args=args,
        reward_funcs=lambda completions, **kwargs: [0.0] * len(completions),
        train_dataset=Dataset.from_list([{"prompt": tiny.question(3, 4)}]),
        processing_class=tokenizer,
        tools=[function],
    )
    script = Script(trainer.processing_class)
    if side == "TRL":
        trainer._generate_single_turn = lambda prompt_ids, *args, **kwargs: (script.next_turn(len(prompt_ids)), None)
    else:
        trainer._engine.sample = lambda contexts, limits: [
            Sample(ids, [0.0] * len(ids)) for ids in script.next_turn(len(contexts))
        ]
    # What `_generate_and_score_completions` sets up before it calls `_generate`
    is_async = asyncio.iscoroutinefunction(function)
    trainer._sync_tool_dicts = [{} if is_async else {"wait": function} for _ in range(rows)]
    trainer._async_tool_dicts = [{"wait": function} if is_async else {} for _ in range(rows)]

    start = time.perf_counter()
    _, completion_ids, tool_mask, *_ = trainer._generate(prompts)
    seconds = time.perf_counter() - start
    if script.turns != 2:
        raise RuntimeError(f"{side}: {script.turns} turns instead of 2, so the tools were not called as intended")
    return seconds, [completion_ids, tool_mask]


def milliseconds_per_call(calls: int = 300) -> dict[str, float]:
    """What a call of a tool that does nothing takes, from `submit` to its result, one call after another."""

    def in_thread(a: int) -> int:
        return a

    async def on_event_loop(a: int) -> int:
        return a

    with tempfile.TemporaryDirectory() as folder, ToolExecutor() as executor:
        tools = {
            "thread": in_thread,
            "event loop": on_event_loop,
            "worker process": tool(tool_samples.add, process=True),
            "cache hit": tool(in_thread, cache=Path(folder) / "tools.sqlite"),
        }
        taken = {}
        for name, function in tools.items():
            executor.run([(ToolCall(name, {"a": 1}), function)])  # starts what it needs
            start = time.perf_counter()
            for _ in range(calls):
                executor.run([(ToolCall(name, {"a": 1}), function)])
            taken[name] = 1000 * (time.perf_counter() - start) / calls
        return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=64, help="rows that call the tool at the same time")
    parser.add_argument("--seconds", type=float, default=1.0, help="how long the tool waits")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    args = parser.parse_args()

    results: dict = {"rows": args.rows, "tool_seconds": args.seconds, "rollout": {}}
    print(f"{args.rows} rows, a tool that waits {args.seconds:g} s\n")
    print(f"{'tool':<16}{'TRL, s':>10}{'ARPO, s':>10}{'ratio':>9}")
    with tempfile.TemporaryDirectory() as folder:
        for kind, function in waiting_tools(args.seconds).items():
            ours, our_tokens = roll_out("ARPO", function, args.rows, folder)
            theirs, their_tokens = roll_out("TRL", function, args.rows, folder)
            if our_tokens != their_tokens:
                raise RuntimeError("the two sides returned different tokens, so their times cannot be compared")
            results["rollout"][kind] = {"trl_s": theirs, "arpo_s": ours, "ratio": theirs / ours}
            print(f"{kind:<16}{theirs:>10.2f}{ours:>10.2f}{theirs / ours:>8.1f}×", flush=True)

    results["overhead_ms"] = milliseconds_per_call()
    print(f"\n{'a tool that does nothing':<26}{'ms a call':>10}")
    for name, taken in results["overhead_ms"].items():
        print(f"{name:<26}{taken:>10.2f}")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
