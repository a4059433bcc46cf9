"""
Whole rollouts against TRL at equal group size, ways to generate their segments, and the eager schedule against its
critical path; all sides in one run.

    python benchmarks/rollout.py --json outputs/rollout.json
    python benchmarks/rollout.py --prompts 1 --hidden 512 --repeats 1

First table: both sides are a trainer's own `_generate`, from prompts to token ids, with a real model of random weights
that reads and samples every token. Only what decides the shape of a rollout is written for it: where a segment ends
(16 to 39 tokens), that it ends in a call, and after three calls in an answer. TRL fills its groups of 16 from the
prompt; ARPO samples 8 and forks the rest. With tools of 0 s what differs is how much is read and sampled; TRL runs
tools one after another.

Second table: four segments of 32 tokens for 16 rows of one prompt of 750 tokens, with a result of 110 tokens between
them, by `generate` as TRL calls it, by `generate` with our prefix cache, and by transformers' continuous batching with
its own prefix cache kept from one call to the next. Third table: the same with results of 90 to 130 tokens, `generate`
and our prefix cache, for models whose caches hold windows of 128 tokens, states, or both.

Fourth table: 16 rows whose tools take 0.1 to 5 s. The critical path is that of the slowest row: the seconds of its
tools, and what the rollout takes without any.
"""

import argparse
import functools
import json
import logging
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import hybrid_models  # noqa: E402
import tiny  # noqa: E402
import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from transformers import (  # noqa: E402
    ContinuousBatchingConfig,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from trl import GRPOConfig, GRPOTrainer  # noqa: E402

from arpo_trl import ARPOConfig, ARPOTrainer  # noqa: E402
from arpo_trl.rollout.engines.prefix_cache import PrefixCache  # noqa: E402

ROUNDS = 3
TABLES = ("against_trl", "ways_to_generate", "by_kind_of_layer", "against_critical_path")
FAMILIES = ("qwen3_5", "gemma4", "gpt_oss", "lfm2", "nemotron_h")
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


def three_layers(hidden: int) -> Qwen3Config:
    return Qwen3Config(
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=3,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 128,
        head_dim=64,
        max_position_embeddings=4096,
        vocab_size=0,
    )


def build_model(tokenizer, config: Qwen3Config) -> ScriptedModel:
    """A scripted model of that shape with the tokenizer's vocabulary."""
    torch.manual_seed(0)
    ScriptedModel.tokenizer = tokenizer
    config.vocab_size = max(config.vocab_size, len(tokenizer))
    config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    return ScriptedModel(config)


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


def roll_out(trainer_class, args_class, config: Qwen3Config, tool: Waiting, prompts: int, **settings):
    """Return the seconds of one rollout of groups of 16, and the trainer."""
    tokenizer = tiny.build_tokenizer()
    function = tool.tool()
    questions = [tiny.question(3, 4 + prompt) for prompt in range(prompts)]
    rows = 16 * prompts
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_class(
            model=build_model(tokenizer, config),
            args=args_class(
                folder,
                num_generations=16,
                per_device_train_batch_size=rows,
                max_completion_length=2000,
                max_tool_calling_iterations=ROUNDS,
                **{"use_cpu": True, "bf16": False} | settings,
                gradient_checkpointing=False,
                report_to="none",
                disable_tqdm=True,
            ),
            reward_funcs=lambda completions, **kwargs: [0.0] * len(completions),
            train_dataset=Dataset.from_list([{"prompt": question} for question in questions]),
            processing_class=tokenizer,
            tools=[function],
        )
    # What `_generate_and_score_completions` sets up before it calls `_generate`
    trainer._sync_tool_dicts = [{"wait": function} for _ in range(rows)]
    trainer._async_tool_dicts = [{} for _ in range(rows)]
    torch.manual_seed(0)
    start = time.perf_counter()
    _, completion_ids, tool_mask, *_ = trainer._generate([question for question in questions for _ in range(16)])
    seconds = time.perf_counter() - start
    turns = [sum(a < b for a, b in zip([0, *mask], mask, strict=False)) for mask in tool_mask]
    if len(completion_ids) != rows or set(turns) != {ROUNDS + 1}:
        raise RuntimeError(f"expected {rows} rows of {ROUNDS + 1} segments, got {turns}")
    return seconds, trainer


SIDES = {
    "TRL": (GRPOTrainer, GRPOConfig, {}),
    "waves": (ARPOTrainer, ARPOConfig, {"num_initial_generations": 8}),
    "eager": (ARPOTrainer, ARPOConfig, {"num_initial_generations": 8, "rollout_schedule": "eager"}),
}


def against_trl(hidden: int, prompts: int, repeats: int, tools: Sequence[float] = (0.0, 0.2, 1.0)) -> list[dict]:
    print(f"{prompts} groups of 16, {ROUNDS} calls a row, hidden size {hidden}\n")
    print(
        f"{'tool, s':>8}{'TRL, s':>10}{'waves, s':>10}{'eager, s':>10}{'TRL/waves':>11}{'TRL/eager':>11}{'calls':>12}"
    )
    table = []
    for seconds in tools:
        taken: dict[str, list[float]] = {side: [] for side in SIDES}
        calls = {}
        for _ in range(repeats):
            for side, (trainer_class, args_class, settings) in SIDES.items():
                tool = Waiting(lambda seconds=seconds: seconds)
                taken[side].append(
                    roll_out(trainer_class, args_class, three_layers(hidden), tool, prompts, **settings)[0]
                )
                calls[side] = tool.calls
        trl, waves, eager = (statistics.median(taken[side]) for side in SIDES)
        table.append({"tool_s": seconds, "trl_s": trl, "waves_s": waves, "eager_s": eager, "calls": calls})
        print(
            f"{seconds:>8g}{trl:>10.2f}{waves:>10.2f}{eager:>10.2f}{trl / waves:>10.1f}×{trl / eager:>10.1f}×"
            f"{calls['TRL']:>6} /{calls['waves']:>4}",
            flush=True,
        )
    return table


def padded(contexts):
    width = max(map(len, contexts))
    ids = torch.tensor([[0] * (width - len(context)) + context for context in contexts])
    mask = torch.tensor([[0] * (width - len(context)) + [1] * len(context) for context in contexts])
    return {"input_ids": ids, "attention_mask": mask}


def generated(generate, config: GenerationConfig):
    """Continues contexts with `generate`."""

    def continued(contexts):
        inputs = padded(contexts)
        output = generate(**inputs, generation_config=config)
        return output[:, inputs["input_ids"].size(1) :].tolist()

    return continued


def seconds_of_segments(generate, results: range) -> tuple[float, float]:
    """
    Seconds and CPU seconds of four segments of 16 rows, with a result of one of the lengths `results` between them.
    """
    rng = random.Random(0)
    contexts = [[rng.randrange(3, 200) for _ in range(750)]] * 16
    start, cpu = time.perf_counter(), time.process_time()
    with torch.no_grad():
        for _ in range(4):
            outputs = generate(contexts)
            contexts = [
                context + output + [rng.randrange(3, 200) for _ in range(rng.choice(results))]
                for context, output in zip(contexts, outputs, strict=True)
            ]
    return time.perf_counter() - start, time.process_time() - cpu


def ways_to_generate(hidden: int, repeats: int) -> dict[str, float]:
    tokenizer = tiny.build_tokenizer()
    model = build_model(tokenizer, three_layers(hidden)).eval()
    config = GenerationConfig(do_sample=True, max_new_tokens=32, pad_token_id=0, top_k=0)
    stock = functools.partial(Qwen3ForCausalLM.generate, model)

    def continuous(contexts):
        settings = ContinuousBatchingConfig(page_size=32, num_blocks=2000, max_batch_tokens=2048)
        outputs = model.generate_batch(
            contexts, generation_config=config, continuous_batching_config=settings, persistent_manager=True
        )
        return [output.generated_tokens for output in outputs.values()]

    print(f"\nFour segments of 16 rows, hidden size {hidden}\n")
    print(f"{'':<24}{'s':>8}{'ratio':>9}")
    medians: dict[str, float] = {}
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)
    taken = [
        [
            seconds_of_segments(generate, range(110, 111))[0]
            for generate in (
                generated(stock, config),
                generated(functools.partial(PrefixCache().generate, model, stock), config),
                continuous,
            )
        ]
        for _ in range(repeats)
    ]
    for name, seconds in zip(
        ("generate", "with our prefix cache", "continuous batching"), zip(*taken, strict=True), strict=True
    ):
        medians[name] = statistics.median(seconds)
        print(f"{name:<24}{medians[name]:>8.2f}{medians['generate'] / medians[name]:>8.2f}×", flush=True)
    return medians


def by_kind_of_layer(hidden: int, repeats: int, families: Sequence[str] = FAMILIES) -> dict[str, dict[str, float]]:
    print(f"\nFour segments of 16 rows, windows and states, hidden size {hidden}, medians of {repeats}\n")
    print(f"{'':<14}{'generate, s':>13}{'our cache, s':>14}{'ratio':>8}{'CPU time':>10}{'least':>8}")
    config = GenerationConfig(do_sample=True, max_new_tokens=32, pad_token_id=0, top_k=0, eos_token_id=None)
    table = {}
    for family in families:
        model = hybrid_models.build(family, hidden=hidden, vocab=1000, window=128)
        model.generation_config.eos_token_id = None
        runs = []
        for _ in range(repeats):
            cached = functools.partial(PrefixCache().generate, model, model.generate)
            (plain, plain_cpu), (own, own_cpu) = (
                seconds_of_segments(generated(generate, config), range(90, 131))
                for generate in (model.generate, cached)
            )
            runs.append((plain / own, plain, own, plain_cpu / own_cpu))
        ratio, plain, own, _ = statistics.median_low(runs)
        cpu, least = statistics.median(run[-1] for run in runs), min(run[0] for run in runs)
        table[family] = {"generate_s": plain, "cache_s": own, "ratio": ratio, "cpu_ratio": cpu, "least_ratio": least}
        print(f"{family:<14}{plain:>13.2f}{own:>14.2f}{ratio:>7.2f}×{cpu:>9.2f}×{least:>7.2f}×", flush=True)
    return table


def against_critical_path(hidden: int, repeats: int) -> list[dict]:
    print(f"\n16 rows, tools of 0.1 to 5 s, hidden size {hidden}\n")
    print(f"{'schedule':>10}{'rollout, s':>12}{'critical path, s':>18}{'ratio':>8}")
    table = []
    alike = {"num_initial_generations": 16}  # nothing forks: a fork waits for the row that it leaves
    without_tools = roll_out(ARPOTrainer, ARPOConfig, three_layers(hidden), Waiting(lambda: 0.0), 1, **alike)[0]
    for schedule in ("waves", "eager"):
        runs = []
        for repeat in range(repeats):
            rng = random.Random(repeat)
            tool = Waiting(lambda rng=rng: rng.uniform(0.1, 5))
            seconds, trainer = roll_out(
                ARPOTrainer, ARPOConfig, three_layers(hidden), tool, 1, rollout_schedule=schedule, **alike
            )
            rows = trainer._groups[0].trajectories
            path = without_tools + max(sum(own.call.seconds for own in row.calls) for row in rows)
            runs.append((seconds / path, seconds, path))
        ratio, seconds, path = statistics.median_low(runs)
        table.append({"schedule": schedule, "rollout_s": seconds, "critical_path_s": path, "ratio": ratio})
        print(f"{schedule:>10}{seconds:>12.2f}{path:>18.2f}{ratio:>7.2f}×", flush=True)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=4, help="groups of a rollout, first table")
    parser.add_argument("--hidden", type=int, default=256, help="hidden size of the model, three layers")
    parser.add_argument("--repeats", type=int, default=3, help="rollouts of each side; medians are printed")
    parser.add_argument("--tools", type=float, nargs="+", default=[0, 0.2, 1], help="seconds of a call, first table")
    parser.add_argument("--only", nargs="+", choices=TABLES, default=TABLES, help="tables to make, all by default")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=FAMILIES, help="shapes of the third table")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    args = parser.parse_args()
    tables = {
        "against_trl": lambda: against_trl(args.hidden, args.prompts, args.repeats, args.tools),
        "ways_to_generate": lambda: ways_to_generate(args.hidden, args.repeats),
        "by_kind_of_layer": lambda: by_kind_of_layer(args.hidden, args.repeats, args.families),
        "against_critical_path": lambda: against_critical_path(args.hidden, args.repeats),
    }
    results = {"hidden": args.hidden, "prompts": args.prompts, **{name: tables[name]() for name in args.only}}
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
