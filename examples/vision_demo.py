"""
ARPO with images, whole, on a small vision-language model built on the spot.

```bash
make vision-demo                       # or, with the environment that `make setup` makes:
python examples/vision_demo.py --seed 1 --output_dir outputs/vision_demo
```

Pictures are too coarse for the model's eyes to read; a tool returns a part of one, enlarged. The model first learns
to see, then to use the tool, from demonstrations of which half zoom at a wrong place, and then, from the reward
alone, where to look. Held-out questions are about pictures that appear nowhere else. Writes `summary.json`,
`report.png`, the rollout records with their images, a page of their trees (`report.html`) and both checkpoints.
"""

import argparse
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

from datasets import Dataset, IterableDataset
from sft_cold_start import cold_start_trainer
from transformers import LlavaForConditionalGeneration, TrainerCallback, set_seed
from trl import SFTConfig
from vision_world import SPLITS, Magnifier, World, build_model, build_processor, system_message

from arpo_trl import ARPOConfig, ARPOTrainer
from arpo_trl.evaluation import bootstrap_interval
from arpo_trl.viewer import render

CPU = {"bf16": False, "use_cpu": True, "gradient_checkpointing": False, "report_to": "none", "save_strategy": "no"}


def main(
    seed: int,
    output_dir: Path,
    lesson_steps: int,
    cold_start_steps: int,
    steps: int,
    sizes: Mapping[str, int] = SPLITS,
    **settings,
) -> dict:
    """`settings` go to [`ARPOConfig`], in place of those of the demo."""
    started = time.perf_counter()
    shutil.rmtree(output_dir, ignore_errors=True)
    set_seed(seed)
    world = World(seed, sizes)
    processor = build_processor()

    say("1. Learn to see: where the tiles of a picture are, and what is on one")
    # TRL renders no tools for data with images: the system message tells of the tool, in the template's own words
    system = system_message(processor)
    model = build_model(processor)
    cold = output_dir / "cold_start"
    fine_tune(model, processor, partial(world.lessons, system), seed, cold, lesson_steps)

    say("2. Cold start: learn from demonstrations, mistakes included, and from more lessons")
    fine_tune(model, processor, partial(lessons_and_demonstrations, world, system), seed, cold, cold_start_steps)
    cold_seconds = time.perf_counter() - started

    trainer, answers = arpo_trainer(cold, processor, world, seed, steps, output_dir, settings)
    sft = ask(trainer, answers)

    say("3. ARPO: learn from the reward alone, with a tool that returns images")
    log = train(trainer, output_dir)
    arpo = ask(trainer, answers)

    summary = {
        "sft_accuracy": sft["accuracy"],
        "arpo_accuracy": arpo["accuracy"],
        "cold_start": sft,
        "arpo": arpo,
        "calls_executed": int(sum(entry["tools/calls_executed"] for entry in log)),
        "forks_per_group": mean([entry["arpo/forks"] for entry in log]),
        "shared_token_fraction": mean([entry["arpo/shared_token_fraction"] for entry in log]),
        "cold_start_seconds": round(cold_seconds, 1),
        "seconds": round(time.perf_counter() - started, 1),
        "seed": seed,
    }
    (output_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    draw(log, sft, arpo, output_dir / "report.png")
    (output_dir / "report.html").write_text(render(output_dir, processor.tokenizer))
    report(sft, arpo, summary, output_dir)
    return summary


def lessons_and_demonstrations(world: World, system: str) -> Iterator[dict]:
    for lesson, demonstration in zip(world.lessons(system), world.demonstrations(system), strict=True):
        yield lesson
        yield {"messages": demonstration["messages"], "images": []}


def fine_tune(model, processor, traces: Callable, seed: int, output_dir: Path, steps: int) -> None:
    args = SFTConfig(
        str(output_dir),
        **CPU,
        per_device_train_batch_size=32,
        max_steps=steps,
        learning_rate=3e-3,
        lr_scheduler_type="cosine",
        warmup_steps=30,
        weight_decay=0.1,
        adam_beta2=0.98,
        max_length=None,
        logging_steps=100,
        accelerator_config={"dispatch_batches": False},  # which would cut images as if there were one a row
        seed=seed,
    )
    stream = IterableDataset.from_generator(traces)
    trainer = cold_start_trainer(model, processor, args, stream, protocol="chat_template")
    trainer.train()
    trainer.save_model(str(output_dir))


def arpo_trainer(
    start: Path, processor, world: World, seed: int, steps: int, output_dir: Path, settings: dict
) -> tuple[ARPOTrainer, list[float]]:
    """The trainer, and the list that holds the rewards of all answers, in training and evaluation."""
    answers: list[float] = []

    def right_digit(completions, answer, place, tool_calls, log_metric, **kwargs):
        said = [text_of(turns[-1]).split()[-1:] for turns in completions]  # the digit, after the tile's colour
        rewards = [float(last == [right]) for last, right in zip(said, answer, strict=True)]
        looked = [[call["arguments"].get("tile") for call in calls] for calls in tool_calls]
        right_first = [at[:1] == [where] for at, where in zip(looked, place, strict=True)]
        log_metric("zoom/right_first", mean(right_first))
        wrong_first = [at for at, right in zip(looked, right_first, strict=True) if at and not right]
        if wrong_first:
            log_metric("zoom/looked_again", mean([len(at) > 1 for at in wrong_first]))
        answers.extend(rewards)
        return rewards

    args = {
        **CPU,
        "num_generations": 16,
        "num_initial_generations": 8,
        "per_device_train_batch_size": 32,
        "gradient_accumulation_steps": 4,
        "num_generations_eval": 1,
        "per_device_eval_batch_size": 200,
        "max_completion_length": 160,
        "max_tool_calling_iterations": 3,
        "max_steps": steps,
        "learning_rate": 5e-4,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": 2,
        "log_rollouts": True,
        "logging_steps": 1,
        "seed": seed,
    }
    trainer = ARPOTrainer(
        model=LlavaForConditionalGeneration.from_pretrained(start),
        args=ARPOConfig(str(output_dir), **{**args, **settings}),
        reward_funcs=right_digit,
        train_dataset=Dataset.from_list(world.rows("rl")),
        eval_dataset=Dataset.from_list(world.rows("held_out")),
        processing_class=processor,
        environment_factory=Magnifier,
    )
    return trainer, answers


def text_of(message: dict) -> str:
    """What the model wrote in a turn."""
    content = message.get("content") or ""
    return content if isinstance(content, str) else "".join(block.get("text", "") for block in content)


def train(trainer: ARPOTrainer, output_dir: Path) -> list[dict]:
    """The log of each step."""
    log: list[dict] = []

    class Keep(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            if "arpo/initial" in logs:
                log.append(dict(logs))

    trainer.add_callback(Keep())
    trainer.train()
    trainer.save_model(str(output_dir / "arpo"))
    return log


def ask(trainer: ARPOTrainer, answers: list[float]) -> dict[str, float | None]:
    """Accuracy and more on the held-out questions, one answer each, sampled as in training."""
    set_seed(0)
    answers.clear()
    metrics = trainer.evaluate()
    low, high = bootstrap_interval(answers)
    return {
        "accuracy": mean(answers),
        "accuracy_low": low,
        "accuracy_high": high,
        "calls": metrics["eval_tools/call_frequency"],
        "right_first": metrics["eval_zoom/right_first"],
        "looked_again": metrics.get("eval_zoom/looked_again"),  # `None` where no first look was wrong
    }


def mean(values) -> float:
    return sum(values) / len(values)


def draw(log: list[dict], sft: dict, arpo: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    steps = range(1, len(log) + 1)
    left.plot(steps, [entry["reward"] for entry in log], color="0.6", label="training reward")
    for x, result, label in ((0, sft, "held-out accuracy, 95 % interval"), (len(log), arpo, None)):
        spread = [[result["accuracy"] - result["accuracy_low"]], [result["accuracy_high"] - result["accuracy"]]]
        left.errorbar([x], [result["accuracy"]], yerr=spread, fmt="o", color="C0", capsize=4, label=label)
    left.set(xlabel="optimiser step", ylabel="fraction right", ylim=(0, 1), title="Learning")
    left.legend(loc="lower right")
    for name, label in (("right_first", "first look at the right place"), ("looked_again", "else looked again")):
        right.plot(steps, [entry.get(f"zoom/{name}", float("nan")) for entry in log], label=label)
    right.set(xlabel="optimiser step", ylabel="fraction of rows", ylim=(0, 1), title="Where the model looks")
    right.legend(loc="lower right")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def report(sft: dict, arpo: dict, summary: dict, output_dir: Path) -> None:
    say("Held-out questions, sampled at temperature 1")
    print(f"{'':>12}  {'accuracy':>20}  {'looks right first':>17}  {'else looks again':>16}  {'calls an answer':>15}")
    for name, result in (("cold start", sft), ("ARPO", arpo)):
        interval = f"{result['accuracy']:.1%} ({result['accuracy_low']:.0%}–{result['accuracy_high']:.0%})"
        again = "–" if result["looked_again"] is None else f"{result['looked_again']:.1%}"
        print(f"{name:>12}  {interval:>20}  {result['right_first']:>17.1%}  {again:>16}  {result['calls']:>15.2f}")
    print(
        f"\nIn training {summary['forks_per_group']:.1f} of the 16 rows of a group were forks, and "
        f"{summary['shared_token_fraction']:.0%} of the tokens were shared.\n{summary['seconds']:.0f} s in all. "
        f"In {output_dir}: summary.json, report.png, report.html, rollouts/, cold_start/, arpo/."
    )


def say(text: str) -> None:
    print(f"\n=== {text}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/vision_demo"))
    parser.add_argument("--lesson_steps", type=int, default=400, help="optimiser steps of learning to see")
    parser.add_argument("--cold_start_steps", type=int, default=300, help="optimiser steps of the cold start")
    parser.add_argument("--steps", type=int, default=40, help="optimiser steps of ARPO")
    main(**vars(parser.parse_args()))
