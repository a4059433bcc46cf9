"""A run goes on from the newest checkpoint that is whole, wherever a kill or a full disk has cut off the others."""

import json
import os
import random
import shutil
import signal
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from test_trainer_options import build
from transformers import AutoModelForCausalLM, TrainerCallback, trainer_jit_checkpoint

from arpo_trl.checkpoints import find_fault, newest_whole_checkpoint

SETTINGS = {"max_completion_length": 60, "save_strategy": "steps", "save_steps": 1, "seed": 3, "max_steps": 3}


@pytest.fixture(scope="module")
def saved(agent_dirs, tokenizer, tmp_path_factory):
    """The folder of a run of three steps with a checkpoint after each, and the weights at its end."""
    folder = tmp_path_factory.mktemp("saved")
    trainer = build(agent_dirs, tokenizer, folder, **SETTINGS)
    trainer.train()
    return folder, weights(trainer)


@pytest.fixture
def run(saved, tmp_path):
    """A copy of that folder."""
    shutil.copytree(saved[0], tmp_path / "run")
    return tmp_path / "run"


def weights(trainer):
    return [parameter.detach().clone() for parameter in trainer.model.parameters()]


def shard(checkpoint):
    """The same checkpoint with its model in two files and an index."""
    (checkpoint / "model.safetensors").unlink()
    model = AutoModelForCausalLM.from_pretrained(checkpoint.parent / "checkpoint-1")
    model.save_pretrained(checkpoint, max_shard_size="150KB")
    assert len(list(checkpoint.glob("model-*.safetensors"))) > 1


def adapt(checkpoint):
    """The same checkpoint with an adapter in the model's place."""
    (checkpoint / "model.safetensors").unlink()
    save_file({"lora_A": torch.ones(4, 4)}, checkpoint / "adapter_model.safetensors")
    (checkpoint / "adapter_config.json").write_text('{"r": 4}')


@pytest.mark.parametrize("layout", [lambda checkpoint: None, shard, adapt], ids=["one file", "shards", "adapter"])
def test_a_checkpoint_cut_at_any_file_is_passed_over(run, layout, caplog):
    newest = run / "checkpoint-3"
    layout(newest)
    generator = random.Random(0)
    assert newest_whole_checkpoint(run) == newest and not caplog.messages
    cut = 0
    for path in sorted(path for path in newest.rglob("*") if path.is_file()):
        whole = path.read_bytes()
        read = path.suffix in (".json", ".safetensors", ".pt", ".pth", ".bin")
        end = len(whole.rstrip())  # white space at the end of JSON says nothing
        for length in {0, 1, end // 2, end - 1, *(generator.randrange(end) for _ in range(20))} if read else {0}:
            path.write_bytes(whole[:length])
            caplog.clear()
            assert newest_whole_checkpoint(run) == (run / "checkpoint-2" if read else newest), (path.name, length)
            if read:
                (message,) = caplog.messages
                assert f"checkpoint-3: {path.name} is cut off" in message and "Resuming from" in message
                cut += 1
        path.write_bytes(whole)
    assert cut > 100 and newest_whole_checkpoint(run) == newest


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"]
)
def test_a_checkpoint_that_lacks_a_file_is_passed_over(run, name):
    """Without its optimizer a run would go on with a new one, and nothing would say so."""
    (run / "checkpoint-3" / name).unlink()
    assert newest_whole_checkpoint(run) == run / "checkpoint-2"
    left_out = name in ("optimizer.pt", "scheduler.pt", "rng_state.pth")
    assert newest_whole_checkpoint(run, save_only_model=True) == run / f"checkpoint-{3 if left_out else 2}"


def test_a_missing_shard_is_named(run):
    shard(run / "checkpoint-3")
    (lost, *_) = sorted((run / "checkpoint-3").glob("model-*.safetensors"))
    lost.unlink()
    assert find_fault(run / "checkpoint-3") == f"{lost.name} is missing"


@pytest.mark.parametrize(
    "files, missing",
    [
        ({"latest": b"global_step3", "global_step3/mp_rank_00_model_states.pt": None, "scheduler.pt": None}, None),
        ({"latest": b"global_step3", "scheduler.pt": None}, "the folder that `latest` names is missing"),
        (
            {"latest": b"global_step3", "global_step3/mp_rank_00_model_states.pt": b"PK half"},
            "global_step3/mp_rank_00_model_states.pt is cut off or cannot be read",
        ),
        (
            {
                f"{name}_0/{file}": b"x"
                for name in ("optimizer", "pytorch_model_fsdp")
                for file in (".metadata", "0.distcp")
            }
            | {"scheduler.pt": None, "rng_state_0.pth": None},
            None,
        ),
        (
            {
                "pytorch_model_fsdp_0/0.distcp": b"x",
                "pytorch_model_fsdp_0/.metadata": b"x",
                "optimizer_0/0.distcp": b"x",
            },
            "optimizer_0/.metadata is missing",
        ),
        (
            {"pytorch_model_fsdp.bin": None, "optimizer.bin": None, "scheduler.pt": None, "rng_state_1.pth": None},
            None,
        ),
    ],
    ids=["DeepSpeed", "DeepSpeed without states", "DeepSpeed cut", "FSDP", "FSDP cut", "FSDP in one file"],
)
def test_layouts_of_sharded_training(tmp_path, files, missing):
    for name, content in {**files, "trainer_state.json": b"{}"}.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        if content is None:
            torch.save({"state": torch.ones(3)}, path)
        else:
            path.write_bytes(content)
    assert find_fault(tmp_path) == missing


def test_the_newest_whole_checkpoint_resumes_and_ends_with_the_same_weights(saved, run, agent_dirs, tokenizer, caplog):
    cut = run / "checkpoint-3" / "optimizer.pt"
    cut.write_bytes(cut.read_bytes()[:1000])
    (run / "checkpoint-2" / "model.safetensors").write_bytes(b"")
    (run / "checkpoint-x").mkdir()
    trainer = build(agent_dirs, tokenizer, run, **SETTINGS)
    begun = []

    class Begin(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            begun.append(state.global_step)

    trainer.add_callback(Begin())
    trainer.train(resume_from_checkpoint=True)
    assert begun == [1]
    (message,) = [message for message in caplog.messages if "Resuming from" in message]
    assert "checkpoint-3: optimizer.pt" in message and "checkpoint-2: model.safetensors" in message
    assert all(torch.equal(left, right) for left, right in zip(saved[1], weights(trainer), strict=True))
    assert newest_whole_checkpoint(run) == run / "checkpoint-3", "what was cut off has been written anew"


def test_no_whole_checkpoint_and_no_checkpoint_at_all_are_errors(run, agent_dirs, tokenizer):
    trainer = build(agent_dirs, tokenizer, run, **SETTINGS)
    for checkpoint in run.glob("checkpoint-*"):
        (checkpoint / "trainer_state.json").write_text('{"global_step": ')
    with pytest.raises(
        ValueError, match=r"no checkpoint in '.*' is whole \(checkpoint-3: trainer_state.json is cut off"
    ):
        trainer.train(resume_from_checkpoint=True)
    for checkpoint in run.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    with pytest.raises(ValueError, match="No valid checkpoint found in output directory"):
        trainer.train(resume_from_checkpoint=True)


def test_sigterm_saves_a_checkpoint_that_resumes(saved, agent_dirs, tokenizer, tmp_path, monkeypatch):
    """
    With `enable_jit_checkpoint`, an option of transformers; its seconds of waiting for a second signal are left out.
    """

    class AtOnce:
        def __init__(self, seconds, function):
            self.start = function

    class Terminate(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(trainer_jit_checkpoint, "threading", SimpleNamespace(Timer=AtOnce))
    settings = {**SETTINGS, "save_strategy": "no"}
    stopped = build(agent_dirs, tokenizer, tmp_path, **settings, enable_jit_checkpoint=True, callbacks=[Terminate()])
    stopped.train()
    assert signal.getsignal(signal.SIGTERM) is before
    assert json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())["global_step"] == 2
    resumed = build(agent_dirs, tokenizer, tmp_path, **settings)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 3
    assert all(torch.equal(left, right) for left, right in zip(saved[1], weights(resumed), strict=True))
