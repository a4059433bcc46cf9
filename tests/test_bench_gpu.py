"""`make bench-gpu` at toy size, on the CPU: that every part runs, and what it counts by hand."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import gpu  # noqa: E402


def test_every_part_runs_at_toy_size(tmp_path):
    path = tmp_path / "made" / "gpu.json"
    results = gpu.main([], toy=True, repeats=1, path=path)
    assert json.loads(path.read_text()) == results and results["card"] == "CPU"
    scored = {(line["length"], line["side"], line["micro_batch"]): line for line in results["scoring"]}
    assert {side for _, side, _ in scored} == {"row by row", "shared"} and all(
        line["tokens_per_second"] == pytest.approx(8 * length / line["seconds"])
        for (length, _, _), line in scored.items()
    )
    (rolled,) = results["rollout"]
    assert {"TRL", "waves"} < rolled.keys() and rolled["TRL"] > 0
    assert [line["side"] for line in results["training"]] == ["cold start", "GRPO", "ARPO"]


def test_a_part_whose_time_is_over_begins_nothing_new(capsys):
    results = gpu.main(["scoring"], toy=True, repeats=1, path=None, minutes=0)
    assert len(results["scoring"]) == 1 and "what would follow is left out" in capsys.readouterr().out


def test_mfu_is_of_the_peak_of_the_card(monkeypatch):
    monkeypatch.setattr(gpu, "peak_flops", lambda device: 1e9)
    line = next(gpu.scoring("cpu", toy=True, repeats=1))
    config, rows = gpu.config_of("toy"), gpu.forked_group(48, 6)
    weights = sum(parameter.numel() for parameter in gpu.AutoModelForCausalLM.from_config(config).parameters())
    done = gpu.operations(config, weights, *gpu.computed(rows, "row by row", 1, 6))
    assert line["mfu"] == pytest.approx(done / line["seconds"] / 1e9) and line["peak_gib"] is None


def test_without_vllm_its_part_says_so(monkeypatch, capsys):
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    assert gpu.main(["vllm"], toy=True, repeats=1, path=None)["vllm"] == []
    assert "vLLM is not installed" in capsys.readouterr().out


def test_with_vllm_its_part_has_a_line_for_each_script(monkeypatch):
    asked = []

    def on_an_engine(rows, seeds, device, config):
        asked.append((rows, seeds, device, config and config.num_hidden_layers))
        sides = {side: {"seconds": 1.0, "tokens": 5} for side in ("waves", "continuous", "slowest_row", "no_tools")}
        return [{"seed": seed, **sides} for seed in range(seeds)]

    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(gpu.schedules, "on_an_engine", on_an_engine)
    line = {"waves": 1.0, "continuous": 1.0, "slowest_row": 1.0, "no_tools": 1.0, "tokens": 5}
    assert list(gpu.vllm_rollouts("cuda", False, 2)) == [{"script": 0, **line}, {"script": 1, **line}]
    assert list(gpu.vllm_rollouts("cpu", True, 2)) == [{"script": 0, **line}]
    assert asked == [(64, 2, "cuda", 28), (4, 1, "cpu", None)]


def test_without_a_gpu_it_says_what_to_do():
    if gpu.torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit, match="--toy"):
        gpu.main(["scoring"], toy=False, repeats=1, path=None)


def test_computed_tokens_and_pairs_by_hand():
    # Two rows of 4 tokens that share 3: row by row 8 tokens, 2 × (1 + 2 + 3 + 4) pairs
    rows = [np.array([1, 2, 3, 4]), np.array([1, 2, 3, 5])]
    assert gpu.computed(rows, "row by row", 1, 1) == (8, 20)
    # Shared: a row's last token is not read, since nothing follows it, and the one after which they part once for each
    assert gpu.computed(rows, "shared", 2, 1) == (4, 1 + 2 + 3 + 3)


def test_operations_by_hand():
    config = gpu.config_of("toy")  # 2 layers, 4 heads of size 16
    assert gpu.operations(config, weights=10, tokens=3, pairs=6) == 3 * (2 * 10 * 3 + 4 * 2 * 4 * 16 * 6)
