"""The recipes of examples/configs: each parses as its script parses it, and trains on the rows that it names."""

import re
import runpy
import sys
from pathlib import Path

import pytest
import yaml
from trl import ModelConfig, SFTConfig, TrlParser

from arpo_trl import ARPOConfig

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

from arpo import ARPOScriptArguments  # noqa: E402
from sft_cold_start import ColdStartArguments  # noqa: E402

RECIPES = sorted((EXAMPLES / "configs").glob("*.yaml"))
COLD_STARTS = [path for path in RECIPES if path.stem.endswith("cold_start")]
TRAINING = [path for path in RECIPES if path not in COLD_STARTS]
GPUS = 8
# Rows of a rollout batch and of an optimiser step: TRAIN_BATCH_SIZE and PPO_MINI_BATCH_SIZE times ROLLOUT_N
ROWS = {"qwen3-14b_deep_search": (64 * 12, 8 * 12)}
QUESTIONS = {"reasoning": 10_000, "deep_search": 1_000}


def parse(path, *kinds):
    """As the script does, but on the machine of the tests: no GPU, so no bf16."""
    return TrlParser(kinds).parse_args_and_config(["--config", str(path), "--use_cpu", "true", "--bf16", "false"])


def model_of(path: Path) -> str:
    return path.stem.split("_")[0]


def test_there_is_a_cold_start_for_each_model():
    assert {model_of(path) for path in TRAINING} == {model_of(path) for path in COLD_STARTS}
    assert len(TRAINING) == len(COLD_STARTS) == 5


@pytest.mark.parametrize("path", TRAINING, ids=lambda path: path.stem)
def test_training(path):
    script, args, model = parse(path, ARPOScriptArguments, ARPOConfig, ModelConfig)
    rollout, step = ROWS.get(path.stem, (128 * 16, 16 * 16))
    assert args.per_device_train_batch_size * args.steps_per_generation * GPUS == rollout
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps * GPUS == step
    # a process holds whole groups, so that none has to be split
    assert args.per_device_train_batch_size * args.steps_per_generation % args.num_generations == 0
    assert args.num_initial_generations * 2 == args.num_generations
    assert args.vllm_max_model_length > args.max_completion_length
    assert (args.beta, args.learning_rate, args.loss_type) == (0.0, 1e-6, "bnpo")
    assert script.tools == ["search", "python"]
    cold_start = next(cold for cold in COLD_STARTS if model_of(cold) == model_of(path))
    assert model.model_name_or_path == yaml.safe_load(cold_start.read_text())["output_dir"]


def test_recipes_keep_groups_together_and_compute_fewer_tokens():
    path = EXAMPLES.parent / "benchmarks" / "prefix_sharing.py"
    count = runpy.run_path(str(path))["count_recipe"]
    recipe = EXAMPLES / "configs" / "qwen3-8b_deep_search.yaml"
    assert all(yaml.safe_load(path.read_text())["keep_groups_together"] for path in TRAINING)
    for micro_batch, target in ((2, 0.72), (8, 0.62)):
        counts = count(recipe, micro_batch)
        assert counts["whole groups"] <= target < counts["together within a step"] <= counts["shuffled rows"]


def test_by_tokens_the_largest_micro_batch_of_a_recipe_is_near_the_mean():
    path = EXAMPLES.parent / "benchmarks" / "prefix_sharing.py"
    largest = runpy.run_path(str(path))["count_largest"](EXAMPLES / "configs" / "qwen2.5-7b_reasoning.yaml")
    assert largest["by tokens"] < 1.3 and largest["by rows"] > 2


@pytest.mark.parametrize("path", COLD_STARTS, ids=lambda path: path.stem)
def test_cold_start(path):
    script, args, model = parse(path, ColdStartArguments, SFTConfig, ModelConfig)
    assert script.tool_protocol == "tags"
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps * GPUS == 16
    assert (args.learning_rate, args.num_train_epochs, args.max_length) == (7e-6, 3, 15000)
    assert "/" in model.model_name_or_path


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_value_is_said_once_and_most_with_their_source(path):
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    names = [line.split(":")[0] for line in lines]
    assert len(set(names)) == len(names)
    assert sum("#" in line for line in lines) / len(lines) > 0.7


@pytest.mark.parametrize("path", TRAINING, ids=lambda path: path.stem)
def test_the_table_of_what_a_run_needs_follows_from_the_recipe(path):
    recipe = yaml.safe_load(path.read_text())
    model, task = path.stem.split("_", 1)
    rows = QUESTIONS[task] * recipe["num_train_epochs"] * recipe["num_generations"]
    step = recipe["per_device_train_batch_size"] * recipe["gradient_accumulation_steps"] * GPUS
    line = next(
        line for line in (EXAMPLES / "configs" / "README.md").read_text().splitlines() if f"`{path.name}`" in line
    )
    numbers = [int(number.replace(",", "")) for number in re.findall(r"\d[\d,]*", line.split("|", 2)[2])]
    assert numbers[:4] == [GPUS, rows, rows // step, rows * recipe["max_tool_calling_iterations"]]
