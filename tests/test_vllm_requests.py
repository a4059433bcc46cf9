"""What `benchmarks/vllm_requests.py` counts rather than times: bytes and requests of vLLM's answers."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import vllm_requests  # noqa: E402


@pytest.mark.parametrize("where", ["server", "colocated"])
def test_entropy_costs_few_bytes_where_it_is_read_alone(where):
    """K = 20 for the first 20 of 1,000 tokens; the time of reading them is measured by the benchmark."""
    none, read, everywhere = (vllm_requests.parsing(where, side, 2, 1000)["bytes"] for side in vllm_requests.SIDES)
    assert none < read < 1.3 * none and everywhere > 5 * none


def test_a_wave_is_a_handful_of_requests():
    own, few = vllm_requests.concurrency(128)
    assert own["requests"] == 128 and few["requests"] <= 6
    assert few["rows at once"] == 128
