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
