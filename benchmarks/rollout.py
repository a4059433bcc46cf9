"""
Whole rollouts against TRL at equal group size, and the eager schedule against its critical path; both sides in one run.

    python benchmarks/rollout.py --json outputs/rollout.json
    python benchmarks/rollout.py --hidden 256 --repeats 1

Both sides are a trainer's own `_generate`, from prompts to token ids, with a real model of random weights that reads and
samples every token. Only what decides the shape of a rollout is written for it: where a segment ends (16 to 39 tokens),
that it ends in a call, and after three calls in an answer. TRL fills its group of 16 from the prompt; ARPO samples 8 and
forks the rest.

The second table has 16 rows whose tools take 0.1 to 5 s. The critical path is that of the slowest row: the seconds of its
tools, and what a row takes to generate that is alone.
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import tiny  # noqa: E402
import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from transformers import LogitsProcessor, LogitsProcessorList, Qwen3Config, Qwen3ForCausalLM  # noqa: E402
from trl import GRPOConfig, GRPOTrainer  # noqa: E402

from arpo_trl import ARPOConfig, ARPOTrainer  # noqa: E402

ROUNDS = 3
RESULT = "It is " + "what it is and " * 25
CALL = '<tool_call>\n{"name": "wait", "arguments": {"x": 7}}\n</tool_call>'


class Script(LogitsProcessor):
    """Leaves the first tokens of a segment to the model, and then writes a call, or after `ROUNDS` calls the end."""

    def __init__(self, tokenizer, start: int):
        self.start = start  # rows are padded on the left, so their segments begin in one column
        self.end = tokenizer.eos_token_id
        self.response = tokenizer.convert_tokens_to_ids("<tool_response>")
        self.call = [*tokenizer.encode(CALL, add_special_tokens=False), self.end]
        self.special = sorted({*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()})

    def __call__(self, input_ids, scores):
        place = input_ids.size(1) - self.start
        scores[:, self.special] = -torch.inf
        for row, ids in enumerate(input_ids):
            free = 16 + int(ids[self.start - 5 : self.start].sum()) % 24
            if place < free:
                continue
            results = int((ids == self.response).sum())
            script = self.call if results < ROUNDS else [self.end]
            scores[row] = -torch.inf
            scores[row, script[min(place - free, len(script) - 1)]] = 0.0
        return scores


class ScriptedModel(Qwen3ForCausalLM):
    tokenizer = None

    def generate(self, input_ids, logits_processor=(), **kwargs):
        processors = LogitsProcessorList([*logits_processor, Script(self.tokenizer, input_ids.size(1))])
        return super().generate(input_ids, logits_processor=processors, **kwargs)


def build_model(tokenizer, hidden: int) -> ScriptedModel:
    torch.manual_seed(0)
    ScriptedModel.tokenizer = tokenizer
    return ScriptedModel(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=hidden,
            intermediate_size=3 * hidden,
            num_hidden_layers=3,
            num_attention_heads=hidden // 64,
            num_key_value_heads=hidden // 128,
            head_dim=64,
            max_position_embeddings=4096,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


class Waiting:
    """A tool that takes as long as it is told, `seconds()` a call."""

    def __init__(self, seconds):
        self.seconds = seconds
        self.lock = threading.Lock()
        self.calls = 0

    def tool(self):
        def wait(x: int) -> str:
            """
            Wait, as a search engine does.

            Args:
                x: A number.
            """
            with self.lock:
                self.calls += 1
                seconds = self.seconds()
            time.sleep(seconds)
            return RESULT

        return wait


def roll_out(trainer_class, args_class, hidden: int, tool: Waiting, rows: int, folder: str, **settings):
    """Return the seconds of one rollout of a group, and the trainer."""
    tokenizer = tiny.build_tokenizer()
    function = tool.tool()
    question = tiny.question(3, 4)
    trainer = trainer_class(
        model=build_model(tokenizer, hidden),
        args=args_class(
            folder,
            num_generations=rows,
            per_device_train_batch_size=rows,
            max_completion_length=2000,
            max_tool_calling_iterations=ROUNDS,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            disable_tqdm=True,
            **settings,
        ),
        reward_funcs=lambda completions, **kwargs: [0.0] * len(completions),
        train_dataset=Dataset.from_list([{"prompt": question}]),
        processing_class=tokenizer,
        tools=[function],
    )
    # What `_generate_and_score_completions` sets up before it calls `_generate`
    trainer._sync_tool_dicts = [{"wait": function} for _ in range(rows)]
    trainer._async_tool_dicts = [{} for _ in range(rows)]
    torch.manual_seed(0)
    start = time.perf_counter()
    _, completion_ids, tool_mask, *_ = trainer._generate([question] * rows)
    seconds = time.perf_counter() - start
    turns = [sum(a < b for a, b in zip([0, *mask], mask, strict=False)) for mask in tool_mask]
    if len(completion_ids) != rows or set(turns) != {ROUNDS + 1}:
        raise RuntimeError(f"expected {rows} rows of {ROUNDS + 1} segments, got {turns}")
    return seconds, trainer


def against_trl(hidden: int, repeats: int) -> list[dict]:
    print(f"Group of 16, {ROUNDS} calls a row, hidden size {hidden}\n")
    print(f"{'tool, s':>8}{'TRL, s':>10}{'ARPO, s':>10}{'ratio':>9}{'TRL calls':>11}{'ARPO calls':>12}")
    table = []
    for seconds in (0.0, 0.2, 1.0):
        taken: dict[str, list[float]] = {"trl": [], "arpo": []}
        calls = {}
        for _ in range(repeats):
            for side, classes, settings in (
                ("trl", (GRPOTrainer, GRPOConfig), {}),
                ("arpo", (ARPOTrainer, ARPOConfig), {"num_initial_generations": 8}),
            ):
                tool = Waiting(lambda seconds=seconds: seconds)
                with tempfile.TemporaryDirectory() as folder:
                    taken[side].append(roll_out(*classes, hidden, tool, 16, folder, **settings)[0])
                calls[side] = tool.calls
        trl, arpo = statistics.median(taken["trl"]), statistics.median(taken["arpo"])
        table.append({"tool_s": seconds, "trl_s": trl, "arpo_s": arpo, "ratio": trl / arpo, "calls": calls})
        print(
            f"{seconds:>8g}{trl:>10.2f}{arpo:>10.2f}{trl / arpo:>8.1f}×{calls['trl']:>11}{calls['arpo']:>12}",
            flush=True,
        )
    return table


def against_critical_path(hidden: int, repeats: int) -> list[dict]:
    print(f"\n16 rows, tools of 0.1 to 5 s, hidden size {hidden}\n")
    print(f"{'schedule':>10}{'rollout, s':>12}{'critical path, s':>18}{'ratio':>8}")
    table = []
    with tempfile.TemporaryDirectory() as folder:
        settings = {"num_initial_generations": 1}
        alone = roll_out(
            ARPOTrainer,
            ARPOConfig,
            hidden,
            Waiting(lambda: 0.0),
            2,
            folder,
            **settings | {"num_initial_generations": 2},
        )[0]
        for schedule in ("waves", "eager"):
            ratios, seconds_of, paths = [], [], []
            for repeat in range(repeats):
                rng = random.Random(repeat)
                tool = Waiting(lambda rng=rng: rng.uniform(0.1, 5))
                seconds, trainer = roll_out(
                    ARPOTrainer,
                    ARPOConfig,
                    hidden,
                    tool,
                    16,
                    folder,
                    num_initial_generations=16,
                    rollout_schedule=schedule,
                )
                rows = trainer._groups[0].trajectories
                path = max(sum(own.call.seconds for own in row.calls) for row in rows) + alone
                ratios.append(seconds / path)
                seconds_of.append(seconds)
                paths.append(path)
            row = {"rollout_s": statistics.median(seconds_of), "critical_path_s": statistics.median(paths)}
            table.append({"schedule": schedule, **row, "ratio": statistics.median(ratios)})
            print(
                f"{schedule:>10}{row['rollout_s']:>12.2f}{row['critical_path_s']:>18.2f}{table[-1]['ratio']:>7.2f}×",
                flush=True,
            )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024, help="hidden size of the model, three layers")
    parser.add_argument("--repeats", type=int, default=3, help="rollouts of each side; medians are printed")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    args = parser.parse_args()
    results = {
        "hidden": args.hidden,
        "against_trl": against_trl(args.hidden, args.repeats),
        "against_critical_path": against_critical_path(args.hidden, args.repeats),
    }
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
