"""The training script as people start it: `accelerate launch`, a YAML file, LoRA, both of its protocols."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import yaml
from hub_standin import HubStandIn

from arpo_trl.viewer.records import read_file

EXAMPLES = Path(__file__).parents[1] / "examples"


def launch(script, *arguments, tmp_path, hub):
    """HF_HUB_OFFLINE refuses loopback too, so it is unset for the stand-in."""
    environment = {key: value for key, value in os.environ.items() if key not in ("HF_HUB_OFFLINE", "HF_TOKEN")}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home")}
    environment |= {"PYTHONPATH": str(Path(__file__).parent), "ACCELERATE_USE_CPU": "true"}
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "accelerate.commands.launch",
            "--cpu",
            "--num_processes",
            "1",
            EXAMPLES / script,
            *arguments,
        ],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "questions.jsonl"
    rows = [{"prompt": tiny.question(a, b), "answer": str(a + b)} for a in range(4) for b in range(4)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_arpo_from_a_yaml_file_with_lora_and_to_the_hub(agent_dirs, questions, tmp_path):
    config = {
        "model_name_or_path": agent_dirs["tags"],
        "dataset_name": str(questions),
        "tool_protocol": "tags",
        "tools": ["tiny.add"],
        "reward_funcs": ["exact_match_reward"],
        "num_generations": 4,
        "num_initial_generations": 2,
        "per_device_train_batch_size": 8,
        "max_completion_length": 100,
        "max_steps": 1,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "log_rollouts": True,
        "use_peft": True,
        "lora_r": 4,
        "hub_token": "good",
        "hub_model_id": "team/agent",
        "output_dir": str(tmp_path / "out"),
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(config))
    with HubStandIn({"good": math.inf}) as hub:
        launch("arpo.py", "--config", "recipe.yaml", "--push_to_hub", tmp_path=tmp_path, hub=hub)
    assert {"adapter_model.safetensors", "adapter_config.json", "README.md"} <= set(hub.repos["team/agent"].files)
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
    assert len(read_file(tmp_path / "out" / "rollouts" / "step-000000.jsonl.gz")[0]) == 8


def test_questions_from_parquet_and_an_unknown_column(agent_dirs, tmp_path):
    from datasets import Dataset

    sys.path.insert(0, str(EXAMPLES))
    from common import ToolArguments, build_rewards, build_tools, load_questions

    rows = Dataset.from_list([{"prompt": tiny.question(1, 2), "answer": "3"}])
    rows.to_parquet(tmp_path / "questions.parquet")
    assert load_questions(str(tmp_path / "questions.parquet"), "train")[0]["answer"] == "3"
    rows.rename_column("prompt", "question").to_parquet(tmp_path / "other.parquet")
    with pytest.raises(ValueError, match="no column `prompt` \\(it has question, answer\\)"):
        load_questions(str(tmp_path / "other.parquet"), "train")
    with pytest.raises(ValueError, match="`--tools search` needs `--search_corpus`"):
        build_tools(ToolArguments(tools=["search"]))
    with pytest.raises(ValueError, match="neither a known name nor a dotted path"):
        build_tools(ToolArguments(tools=["telephone"]))
    (tmp_path / "corpus.jsonl").write_text('{"contents": "The sky is blue."}\n')
    (search,) = build_tools(ToolArguments(tools=["search"], search_corpus=str(tmp_path / "corpus.jsonl")))
    assert "blue" in search("sky")
    assert [reward.__name__ for reward in build_rewards(["arpo_reward", "math.sqrt"])] == ["arpo_reward", "sqrt"]


def test_the_rl_script_reads_the_published_columns(tmp_path):
    data = Path(__file__).parents[2] / "shared" / "data" / "arpo_rl_valid.parquet"
    if not data.exists():
        pytest.skip(f"the published data is not at {data}")
    from common import load_questions

    rows = load_questions(str(data), "train", protocol="tags")
    assert len(rows) == 180 and {"prompt", "answer"} <= set(rows.column_names)


@pytest.mark.parametrize("accelerator", [False, True])
def test_training_scripts_choose_the_cpu_where_there_is_nothing_else(accelerator, monkeypatch, tmp_path):
    import torch

    sys.path.insert(0, str(EXAMPLES))
    from arpo import ARPOScriptArguments
    from common import make_parser
    from sft_cold_start import ColdStartArguments
    from trl import ModelConfig, SFTConfig

    from arpo_trl import ARPOConfig

    monkeypatch.setattr(torch.accelerator, "is_available", lambda: accelerator)
    for arguments in ((ARPOScriptArguments, ARPOConfig, ModelConfig), (ColdStartArguments, SFTConfig, ModelConfig)):
        flags = ["--output_dir", str(tmp_path), "--dataset_name", "questions.jsonl"]
        told = [make_parser(*arguments).get_default(name) for name in ("use_cpu", "bf16", "gradient_checkpointing")]
        if not accelerator:
            assert told == [True, False, False]
            training_args = make_parser(*arguments).parse_args_and_config(flags)[1]
            assert training_args.device.type == "cpu"
            chosen = make_parser(*arguments).parse_args_and_config([*flags, "--bf16", "true"])[1]
            assert chosen.bf16 and chosen.use_cpu, "what is said on the command line holds"
            (tmp_path / "recipe.yaml").write_text("gradient_checkpointing: true")
            recipe = make_parser(*arguments).parse_args_and_config([*flags, "--config", str(tmp_path / "recipe.yaml")])
            assert recipe[1].gradient_checkpointing, "and so does what a file says"
        else:
            assert told == [False, None, True]
