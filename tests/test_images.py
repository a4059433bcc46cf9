"""Images in prompts and in what tools return, with forks and without; GRPO stays the special case."""

import re

import multimodal
import pytest
import torch
from multimodal import PICTURE, PROMPT, photo, records, trainer_of, weather
from trl import GRPOConfig, GRPOTrainer

FAMILIES = ("Qwen3-VL", "Qwen3.5, no thinking", "Gemma 4")
ROWS = [{"prompt": PROMPT}] * 4
WITH_PICTURES = [{"prompt": PROMPT, "image": PICTURE}] * 4
PLACES = {"prompt": (WITH_PICTURES, weather), "tool": (ROWS, photo), "both": (WITH_PICTURES, photo)}
"""Where images are → rows of the data, and the tool."""


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("family", FAMILIES)
def test_grpo_is_the_special_case(family, place, tmp_path):
    rows, tool = PLACES[place]
    shared = {"rows": rows, "tools": [tool], "max_steps": 2, "max_completion_length": 300}
    shared |= {"per_device_train_batch_size": 2, "steps_per_generation": 2}  # rows are shuffled and dealt out
    ours = {"num_initial_generations": 4, "prefix_sharing": False}
    arpo = trainer_of(family, tmp_path / "arpo", **shared, **ours)
    arpo.train()
    assert {len(row.images) for group in arpo._groups for row in group.trajectories} == {2 if place == "both" else 1}
    grpo = trainer_of(family, tmp_path / "grpo", trainer=GRPOTrainer, config=GRPOConfig, **shared)
    grpo.train()
    for stock, own in zip(grpo.state.log_history, arpo.state.log_history, strict=True):
        same = {name for name in stock if not re.search("time|per_second", name)}
        assert {name: own[name] for name in same} == {name: stock[name] for name in same}
    assert grpo.state.log_history[0]["tools/call_frequency"] == 1
    for left, right in zip(arpo.model.parameters(), grpo.model.parameters(), strict=True):
        assert torch.equal(left, right)
