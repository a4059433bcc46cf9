"""What benchmarks count rather than time: tokens that recipes compute, bytes and requests of vLLM's answers."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import prefix_sharing  # noqa: E402
import vllm_requests  # noqa: E402

CONFIGS = Path(__file__).parents[1] / "examples" / "configs"
RECIPES = sorted(path.stem for path in CONFIGS.glob("*.yaml") if "cold_start" not in path.stem)
MOST = {2: 0.72, 4: 0.66, 8: 0.62}
"""Rows of a micro-batch → tokens computed at most, of those of its rows."""


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("micro_batch", [None, 2, 8])
def test_recipes_compute_little_more_than_half_of_their_tokens(recipe, micro_batch):
    counted = prefix_sharing.count_recipe(CONFIGS / f"{recipe}.yaml", micro_batch)
    if counted["rows_a_step"] % counted["micro_batch"]:
        pytest.skip("a step holds no whole number of such micro-batches")
    assert counted["whole groups"] <= MOST[counted["micro_batch"]]
    assert counted["whole groups"] < counted["together within a step"] < counted["shuffled rows"]


@pytest.mark.parametrize("where", ["server", "colocated"])
def test_entropy_costs_few_bytes_where_it_is_read_alone(where):
    """K = 20 for the first 20 of 1,000 tokens; the time of reading them is measured by the benchmark."""
    none, read, everywhere = (vllm_requests.parsing(where, side, 2, 1000)["bytes"] for side in vllm_requests.SIDES)
    assert none < read < 1.3 * none and everywhere > 5 * none


def test_a_wave_is_a_handful_of_requests():
    own, few = vllm_requests.concurrency(128)
    assert own["requests"] == 128 and few["requests"] <= 6
    assert few["rows at once"] == 128
