"""Today's families on TRL's colocated engine: images, sliding windows, layers with a state."""

import gc
from functools import partial

import pytest
import small_models
import world
from PIL import Image
from server_weights import send_through_file
from vllm_server import serving

SETTINGS = {
    "max_completion_length": 100,
    "max_tool_calling_iterations": 3,
    "model_init_kwargs": {"dtype": "float32"},
}


def reward(completions, **kwargs):
    return [float(sum(map(ord, str(completion))) % 7) for completion in completions]


def train(folder, checkpoint, tolerance=world.TOLERANCE, **own):
    """Two steps, held against transformers by TRL's own comparison; the second sees the first one's update."""
    trainer = world.trainer(
        folder, str(checkpoint), "small_models:VowelProtocol", reward=reward, **{**SETTINGS, **own}
    )
    trainer.train()
    steps = [world.records(folder, step) for step in range(2)]
    world.check_two_steps(trainer.state.log_history, steps, tolerance)
    return trainer


@pytest.fixture
def one_engine(colocated):
    """The engine of a test is gone before the next one's is made."""
    yield
    gc.collect()


def test_images_in_prompts_and_results(tmp_path, one_engine, monkeypatch):
    from trl.generation import vllm_generation

    small_models.prepare_qwen3_vl(monkeypatch.setattr)
    monkeypatch.setattr(vllm_generation, "LLM", partial(vllm_generation.LLM, **small_models.NO_VIDEOS))
    small_models.build_qwen3_vl(tmp_path / "model")
    check_images(tmp_path)


def check_images(folder, **own):
    """Two steps with an image in each prompt and one in each result; the second sees them through new weights."""
    trainer = train(
        folder / "out",
        folder / "model",
        tools=[small_models.look],
        processing_class=small_models.qwen3_vl_processor(folder / "model"),
        rows=[{"prompt": [{"role": "user", "content": "Look."}], "image": Image.new("RGB", (64, 64), "red")}] * 4,
        **own,
    )
    assert trainer._schedule == "waves", "an engine is given images with whole waves"
    rows = [row for group in trainer._groups for row in group.trajectories]
    assert max(len(row.images) for row in rows) > 2
    assert any(row.kind == "fork" and len(row.images) > 1 for row in rows)


def test_images_on_a_server(tmp_path, clean_environment, monkeypatch):
    send_through_file(monkeypatch.setattr)
    small_models.build_qwen3_vl(tmp_path / "model")
    environment = clean_environment | {"SMALL_VISION": "1"}
    flags = ["--limit-mm-per-prompt", '{"video": 0}']
    with serving(str(tmp_path / "model"), environment, tmp_path / "log", *flags) as server:
        check_images(tmp_path, vllm_mode="server", vllm_server_base_url=server)


def test_sliding_windows(tmp_path, one_engine):
    small_models.build_text("gemma3", tmp_path / "model")
    train(tmp_path / "out", tmp_path / "model", tools=[small_models.tell])


def test_short_convolutions(tmp_path, one_engine, monkeypatch):
    small_models.repair_lfm2(monkeypatch)
    small_models.build_text("lfm2", tmp_path / "model")
    train(tmp_path / "out", tmp_path / "model", tools=[small_models.tell])


def test_gated_delta_net(tmp_path, one_engine, monkeypatch):
    """The CPU engine has it in bfloat16 alone, whose rounding, 0.06 nats or so, is all that is between the two."""
    from trl.generation import vllm_generation

    small_models.prepare_qwen3_5(monkeypatch)
    monkeypatch.setattr(vllm_generation, "LLM", partial(vllm_generation.LLM, dtype="bfloat16"))
    small_models.build_text("qwen3_5", tmp_path / "model")
    train(tmp_path / "out", tmp_path / "model", tolerance=0.2, tools=[small_models.tell])
