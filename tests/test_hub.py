"""Pushing to a stand-in for the Hub on loopback, with a token that is good, refused, or revoked in mid-run."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub_standin import HubStandIn
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer

SCRIPT = str(Path(__file__).with_name("hub_script.py"))


@pytest.fixture(scope="module")
def pushed(agent_dirs, tmp_path_factory):
    """The Hub and the folder of the runs after all scenarios. HF_HUB_OFFLINE refuses loopback too."""
    folder = tmp_path_factory.mktemp("hub")
    with HubStandIn({"good": math.inf, "brief": 1}) as hub:
        environment = {key: value for key, value in os.environ.items() if key not in ("HF_HUB_OFFLINE", "HF_TOKEN")}
        environment |= {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        environment |= {"HF_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        command = [sys.executable, SCRIPT, str(folder), agent_dirs["chat_template"]]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr[-6000:]
    return hub, folder


def test_a_push_creates_the_repository_and_uploads_what_loads_again(pushed, tmp_path):
    hub, folder = pushed
    assert not (folder / "accepted.error").exists(), (folder / "accepted.error").read_text()
    repo = hub.repos["team/agent"]
    assert repo.private and repo.messages == ["End of training"]
    assert "model.safetensors" in repo.large
    for path, content in repo.files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(content)
    assert not any(path.startswith("checkpoint-") for path in repo.files)
    left, right = (AutoModelForCausalLM.from_pretrained(path) for path in (tmp_path, folder / "accepted"))
    for name, parameter in left.named_parameters():
        assert torch.equal(parameter, right.get_parameter(name))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.chat_template and tokenizer.decode(tokenizer.encode("What is 1 plus 2?")) == "What is 1 plus 2?"


def test_rollouts_are_not_pushed_unless_the_gitignore_says_so(pushed):
    """They hold prompts and what tools returned."""
    hub, folder = pushed
    assert list((folder / "accepted" / "rollouts").glob("step-*.jsonl.gz"))
    assert not any(path.startswith("rollouts") for path in hub.repos["team/agent"].files)
    assert hub.repos["team/agent"].files[".gitignore"] == b"rollouts/\n"
    # A checkpoint that is pushed in mid-run neither
    assert list((folder / "revoked" / "rollouts").glob("step-*.jsonl.gz"))
    assert not any(path.startswith("rollouts") for path in hub.repos["tester/revoked"].files)
    # The user's own file stays
    assert (folder / "public" / ".gitignore").read_text() == "runs/\n"
    assert "rollouts/step-000000.jsonl.gz" in hub.repos["tester/public"].files


def test_the_card_cites_arpo_and_names_data_set_base_model_and_tags(pushed):
    hub, _ = pushed
    card = ModelCard(hub.repos["team/agent"].files["README.md"].decode())
    assert card.data.base_model == "team/base" and card.data.datasets == "team/questions"
    assert {"trl", "arpo", "sums", "generated_from_trainer"} <= set(card.data.tags)
    assert "This model was trained with ARPO" in card.text and "huggingface.co/papers/2507.19849" in card.text
    assert "@article{dong2025arpo," in card.text and "arXiv:2507.19849" in card.text
    assert "[team/questions](https://huggingface.co/datasets/team/questions)" in card.text


def test_a_token_that_is_refused_after_training_keeps_the_model(pushed):
    hub, folder = pushed
    error = (folder / "refused.error").read_text()
    assert "401 Unauthorized" in error and "Invalid credentials" in error
    assert f"The model is kept in {str(folder / 'refused')!r}" in error and "hf auth login" in error
    assert "tester/refused" not in hub.repos
    AutoModelForCausalLM.from_pretrained(folder / "refused")
    AutoTokenizer.from_pretrained(folder / "refused")


def test_a_token_that_is_refused_is_told_before_training_where_it_is_known(pushed):
    _, folder = pushed
    error = (folder / "refused-at-once.error").read_text()
    assert "401 Unauthorized" in error and "Invalid credentials" in error
    assert not (folder / "refused-at-once" / "rollouts").exists(), "nothing was generated"


def test_a_token_that_is_revoked_in_mid_run_costs_the_push_and_not_the_run(pushed):
    hub, folder = pushed
    assert len(hub.repos["tester/revoked"].messages) == 1, "the checkpoint before"
    error = (folder / "revoked.error").read_text()
    assert "401 Unauthorized" in error and f"The model is kept in {str(folder / 'revoked')!r}" in error
    assert {path.name for path in (folder / "revoked").glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-2"}
    AutoModelForCausalLM.from_pretrained(folder / "revoked")
