"""
The whole job on a small model built on the spot: cold start → ARPO → evaluation → report.

```bash
make demo                              # or, with the environment that it makes:
python examples/demo.py --seed 1 --output_dir outputs/demo
```

A world of invented people and towns exists only in a search corpus; questions need two look-ups and a computation. The
model first learns from demonstrations of which about half go wrong, then from the reward alone. Held-out questions ask
about pairs of entities that appear in neither stage. Writes `summary.json`, `report.png`, the rollout records and both
checkpoints.
"""

import argparse
import json
import shutil
import time
from pathlib import Path

import torch
from datasets import Dataset
from demo_world import World, build_model, build_tokenizer
from sft_cold_start import cold_start_trainer
from transformers import AutoModelForCausalLM, TrainerCallback, set_seed
from trl import SFTConfig

from arpo_trl import ARPOConfig, ARPOTrainer
from arpo_trl.evaluation import Agent, evaluate, summarize
from arpo_trl.rewards import exact_match_reward, tags_format_reward
from arpo_trl.tools.python import PythonSandbox
from arpo_trl.tools.search import BM25Search
from arpo_trl.viewer.records import read_file

CPU = {"bf16": False, "use_cpu": True, "gradient_checkpointing": False, "report_to": "none", "save_strategy": "no"}
SETTINGS = {
    "num_generations": 16,
    "num_initial_generations": 8,
    "per_device_train_batch_size": 32,
    "gradient_accumulation_steps": 4,
    "max_completion_length": 160,
    "max_tool_calling_iterations": 4,
    "learning_rate": 3e-4,
    "lr_scheduler_type": "constant_with_warmup",
    "warmup_steps": 2,
    "tool_protocol": "tags",
}


def main(seed: int, output_dir: Path, steps: int) -> dict:
    started = time.perf_counter()
    shutil.rmtree(output_dir, ignore_errors=True)
    set_seed(seed)
    world = World(seed)
    tokenizer = build_tokenizer(world)
    search = BM25Search(world.passages, top_k=1).search
    with python_sandbox() as sandbox:
        tools = [search, sandbox.python]

        say("1. Cold start: learn from demonstrations, mistakes included")
        cold = output_dir / "cold_start"
        cold_start(world, tokenizer, seed, cold)
        sft = ask(cold, tokenizer, tools, world)

        say("2. ARPO: learn from the reward alone, with real tools")
        final, log = train(cold, tokenizer, tools, world, seed, steps, output_dir)
        arpo = ask(final, tokenizer, tools, world)

    curves = {
        name: entropies_after_tool(path, tokenizer, output_dir)
        for name, path in (("cold start", cold), ("ARPO", final))
    }
    kinds = ("made", "executed", "merged", "shared")
    calls = {f"calls_{kind}": int(sum(entry[f"tools/calls_{kind}"] for entry in log)) for kind in kinds}
    summary = {
        "sft_accuracy": sft["accuracy"],
        "arpo_accuracy": arpo["accuracy"],
        **calls,
        "shared_token_fraction": sum(entry["arpo/shared_token_fraction"] for entry in log) / len(log),
        "seconds": round(time.perf_counter() - started, 1),
        "seed": seed,
    }
    (output_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    draw(log, sft, arpo, curves, output_dir / "report.png")
    report(sft, arpo, summary, output_dir)
    return summary


def python_sandbox() -> PythonSandbox:
    try:
        return PythonSandbox(timeout=5, preload=())
    except RuntimeError as error:
        print(f"{error}\nThe demo goes on with sandbox='rlimits'.")
        return PythonSandbox(sandbox="rlimits", timeout=5, preload=())


def cold_start(
    world: World, tokenizer, seed: int, output_dir: Path, steps: int = 1300, model=None, place: dict = CPU
) -> None:
    args = SFTConfig(
        str(output_dir),
        **place,
        per_device_train_batch_size=32,
        max_steps=steps,
        learning_rate=5e-3,
        lr_scheduler_type="cosine",
        warmup_steps=30,
        weight_decay=0.1,
        adam_beta2=0.98,
        max_length=None,
        logging_steps=100,
        seed=seed,
    )
    trainer = cold_start_trainer(
        model or build_model(tokenizer), tokenizer, args, Dataset.from_list(world.demonstrations())
    )
    trainer.train()
    trainer.save_model(str(output_dir))


def train(
    start: Path, tokenizer, tools, world: World, seed: int, steps: int, output_dir: Path, changes: dict = CPU
) -> tuple[Path, list[dict]]:
    kept = KeptLog()
    trainer = ARPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(start),
        args=ARPOConfig(
            str(output_dir),
            **SETTINGS | changes,
            max_steps=steps,
            log_rollouts=True,
            logging_steps=1,
            seed=seed,
        ),
        reward_funcs=exact_match_reward,
        train_dataset=Dataset.from_list(world.rows("rl")),
        processing_class=tokenizer,
        tools=tools,
        callbacks=[kept],
    )
    trainer.train()
    final = output_dir / "arpo"
    trainer.save_model(str(final))
    return final, kept.steps


class KeptLog(TrainerCallback):
    """The log of each step, in `steps`."""

    def __init__(self) -> None:
        self.steps: list[dict] = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "arpo/initial" in logs:
            self.steps.append(dict(logs))


def ask(path: Path, tokenizer, tools, world: World, questions: int | None = None, device="cpu") -> dict[str, float]:
    """Accuracy and more on the held-out questions, sampled as in training."""
    set_seed(0)
    agent = Agent(
        AutoModelForCausalLM.from_pretrained(path).eval().to(device),
        tokenizer,
        tools,
        tool_protocol="tags",
        max_completion_length=160,
        max_tool_calling_iterations=4,
        batch_size=300,
    )
    formats: list[float] = []

    def score(**columns):
        formats.extend(tags_format_reward(**columns))
        return exact_match_reward(**columns)

    records = evaluate(agent, world.rows("held_out")[:questions], score, num_generations=2)
    agent.close()
    return {**summarize(records), "format": sum(formats) / len(formats)}


def entropies_after_tool(path: Path, tokenizer, output_dir: Path, before: int = 6, after: int = 12) -> list[float]:
    """Mean entropy in nats of the tokens around the first tool result, over the rows of the last recorded step."""
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    sums, counts = torch.zeros(before + after), torch.zeros(before + after)
    last = sorted((output_dir / "rollouts").iterdir())[-1]
    for record in read_file(last)[0]:
        if len(record["segments"]) < 2:
            continue
        ids = torch.tensor([record["prompt_ids"] + record["completion_ids"]])
        with torch.no_grad():
            logprobs = model(ids).logits[0].log_softmax(-1)
        entropy = torch.special.entr(logprobs.exp()).sum(-1)[len(record["prompt_ids"]) - 1 :]
        end, start = record["segments"][0]["end"], record["segments"][1]["start"]
        for position in range(before):
            if end - before + position >= 0:
                sums[position] += entropy[end - before + position]
                counts[position] += 1
        for position in range(min(after, record["segments"][1]["end"] - start)):
            sums[before + position] += entropy[start + position]
            counts[before + position] += 1
    return (sums / counts.clamp(min=1)).tolist()


def draw(log: list[dict], sft: dict, arpo: dict, curves: dict[str, list[float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import matplotlib.ticker

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    draw_learning(left, log, sft, arpo)
    for name, curve in curves.items():
        right.plot(range(-6, len(curve) - 6), curve, marker="o", label=name)
    right.axvline(-0.5, color="0.6", linestyle="--", label="tool result")
    right.xaxis.set_major_locator(matplotlib.ticker.MultipleLocator(2))
    right.set(
        xlabel="model tokens from the first tool result", ylabel="entropy (nats)", title="Entropy around a tool result"
    )
    right.legend()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw_learning(axes, log: list[dict], sft: dict, arpo: dict) -> None:
    """The reward of each step, and the held-out accuracy before and after."""
    axes.plot(range(1, len(log) + 1), [entry["reward"] for entry in log], color="0.6", label="training reward")
    for x, result, label in ((0, sft, "held-out accuracy, 95 % interval"), (len(log), arpo, None)):
        spread = [[result["accuracy"] - result["accuracy_low"]], [result["accuracy_high"] - result["accuracy"]]]
        axes.errorbar([x], [result["accuracy"]], yerr=spread, fmt="o", color="C0", capsize=4, label=label)
    axes.set(xlabel="optimiser step", ylabel="fraction right", ylim=(0, 1), title="Learning")
    axes.legend(loc="lower right")


def with_interval(result: dict) -> str:
    """An accuracy with its interval."""
    return f"{result['accuracy']:.1%} ({result['accuracy_low']:.0%}–{result['accuracy_high']:.0%})"


def report(sft: dict, arpo: dict, summary: dict, output_dir: Path) -> None:
    say("Held-out questions, sampled at temperature 1")
    print(f"{'':>12}  {'accuracy':>20}  {'format':>6}  {'calls a question':>16}")
    for name, result in (("cold start", sft), ("ARPO", arpo)):
        accuracy = with_interval(result)
        print(f"{name:>12}  {accuracy:>20}  {result['format']:>6.1%}  {result['calls_per_completion']:>16.2f}")
    print(
        f"\nRows made {summary['calls_made']} tool calls in training, of which {summary['calls_executed']} were "
        f"executed: {summary['calls_merged']} were merged with an equal call, {summary['calls_shared']} shared by "
        f"forks. {summary['shared_token_fraction']:.0%} of the tokens were shared.\n"
        f"{summary['seconds']:.0f} s in all. In {output_dir}: summary.json, report.png, rollouts/, cold_start/, "
        f"arpo/.\nTo look into the rollouts: python -m arpo_trl.viewer {output_dir}"
    )


def say(text: str) -> None:
    print(f"\n=== {text}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/demo"))
    parser.add_argument("--steps", type=int, default=40, help="optimiser steps of ARPO")
    arguments = parser.parse_args()
    main(arguments.seed, arguments.output_dir, arguments.steps)
