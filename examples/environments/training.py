"""
What the examples of this folder share: a model, a cold start on what a script plays, and ARPO.

The model is SmolLM2-135M-Instruct (`real_model.py` says where it comes from), with a chat template of TRL's that knows
tools. `--small` takes one of some thousand parameters in its place, built on the spot, which learns the format and
little else, within seconds on a CPU. Does NOT evaluate: `real.py` and `evaluate.py` show that.
"""

import argparse
import json
import sys
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from datasets import Dataset, Features, Json, Value
from transformers import AutoModelForCausalLM, PreTrainedModel, set_seed
from transformers.utils import get_json_schema
from trl import SFTConfig

from arpo_trl import ARPOConfig, ARPOTrainer

sys.path.append(str(Path(__file__).parents[1]))  # the other examples

from common import cpu_has_bfloat16, cpu_settings  # noqa: E402
from demo import python_sandbox, say  # noqa: E402, F401
from real_model import build_small, convert, load_tokenizer  # noqa: E402
from sft_cold_start import cold_start_trainer  # noqa: E402

# Of a group all rows (M) and those that start from the prompt (N), and groups of a step
FULL = {"cold_batch": 4, "cold_steps": 30, "cold_rate": 3e-4, "steps": 20, "rate": 2e-5}
FULL |= {"rows": 8, "initial": 4, "groups": 4}
SMALL = {"cold_batch": 2, "cold_steps": 120, "cold_rate": 6e-3, "steps": 2, "rate": 1e-3}
SMALL |= {"rows": 4, "initial": 2, "groups": 2}

COMMON = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no"}


Player: TypeAlias = "Generator[tuple[str, dict], str | None, str]"


def parse(description: str, **further: str) -> argparse.Namespace:
    """The arguments that all examples of this folder take, and `further` ones: the help of each by its name."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help=f"optimiser steps of ARPO (default: {FULL['steps']})")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/environments"))
    parser.add_argument("--model_dir", type=Path, default=Path("outputs/smollm2"), help="where the converted model is")
    parser.add_argument("--small", action="store_true", help="a model built on the spot, for seconds on a CPU")
    for name, told in further.items():
        parser.add_argument(f"--{name}", help=told)
    return parser.parse_args()


def place(small: bool) -> dict[str, bool]:
    """Settings for this machine; a small model gains nothing from bfloat16."""
    return cpu_settings() | ({"bf16": not small} if cpu_has_bfloat16() else {})


def ask(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def demonstrate(prompt: list[dict], tools: Sequence[Callable], player: Player) -> dict[str, Any]:
    """
    A row for the cold start, with columns `messages` and `tools`.

    Args:
        prompt (`list[dict]`): The messages before, with what `reset` returned at the end of the last.
        tools (`Sequence[Callable]`): What the player may call.
        player (`Player`): A generator: it yields the name and the arguments of a call, gets the answer, and returns
            what is said at the end.
    """
    by_name = {tool.__name__: tool for tool in tools}
    messages = list(prompt)
    answer = None
    while True:
        try:
            name, arguments = player.send(answer)
        except StopIteration as end:
            messages.append({"role": "assistant", "content": end.value})
            return {"messages": messages, "tools": json.dumps([get_json_schema(tool) for tool in tools])}
        answer = by_name[name](**arguments)
        call = {"type": "function", "function": {"name": name, "arguments": arguments}}
        messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
        messages.append({"role": "tool", "name": name, "content": answer})


def train(
    arguments: argparse.Namespace, rows: list[dict], demonstrations: list[dict], max_completion_length: int, **given
) -> ARPOTrainer:
    """
    Cold start and ARPO.

    Args:
        arguments (`argparse.Namespace`): What [`parse`] returned.
        rows (`list[dict]`): Rows for ARPO, with a column `prompt`; the others go to `reset` and the reward functions.
        demonstrations (`list[dict]`): What [`demonstrate`] returned.
        max_completion_length (`int`): Tokens of a completion, tool results included.
        **given: What [`~arpo_trl.ARPOTrainer`] takes for tools, environments and rewards, and settings of
            [`~arpo_trl.ARPOConfig`].

    Returns:
        [`~arpo_trl.ARPOTrainer`]: That has trained. Its rollout records are in `arguments.output_dir`.
    """
    size = SMALL if arguments.small else FULL
    model_dir = arguments.output_dir / "model" if arguments.small else arguments.model_dir
    set_seed(arguments.seed)
    if arguments.small:
        build_small(model_dir, [json.dumps(row) for row in demonstrations], layers=2)
    else:
        convert(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype="float32")
    tokenizer = load_tokenizer(model_dir, "chat_template")

    say("Cold start: learn the format from demonstrations")
    cold_start(model, tokenizer, demonstrations, size, arguments)

    say("ARPO: learn from the reward alone")
    roles = ("tools", "environment_factory", "reward_funcs")
    settings = {
        **COMMON,
        **place(arguments.small),
        "max_steps": arguments.steps or size["steps"],
        "learning_rate": size["rate"],
        "num_generations": size["rows"],
        "num_initial_generations": size["initial"],
        "per_device_train_batch_size": size["rows"],
        "gradient_accumulation_steps": size["groups"],
        "max_completion_length": max_completion_length,
        "max_tool_calling_iterations": 6,
        "rollout_dtype": "bfloat16" if cpu_has_bfloat16() and not arguments.small else None,
        "log_rollouts": True,
        "logging_steps": 1,
        "seed": arguments.seed,
        **{name: value for name, value in given.items() if name not in roles},
    }
    trainer = ARPOTrainer(
        model=model,
        args=ARPOConfig(str(arguments.output_dir), **settings),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        **{name: given[name] for name in roles if name in given},
    )
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "reward" in entry]
    told = ", ".join(f"{entry['reward']:.2f}" for entry in log)
    calls = sum(entry["tools/calls_executed"] for entry in log)
    print(f"Mean reward by step: {told}. {calls:.0f} calls were executed; the records are in {arguments.output_dir}.")
    return trainer


def cold_start(
    model: PreTrainedModel, tokenizer: Any, demonstrations: list[dict], size: dict, arguments: argparse.Namespace
) -> None:
    """Train `model` in place."""
    features = Features({"messages": [Json()], "tools": Value("string")})
    args = SFTConfig(
        str(arguments.output_dir / "cold_start"),
        **COMMON,
        **place(arguments.small),
        per_device_train_batch_size=size["cold_batch"],
        max_steps=size["cold_steps"],
        learning_rate=size["cold_rate"],
        lr_scheduler_type="cosine",
        warmup_steps=2,
        logging_steps=10,
        max_length=None,
        seed=arguments.seed,
    )
    traces = Dataset.from_list(demonstrations, features=features)
    cold_start_trainer(model, tokenizer, args, traces, protocol="chat_template").train()
