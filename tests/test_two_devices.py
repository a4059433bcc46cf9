"""
A model that is split over two devices samples and scores as it does on one: no index, mask or state is made on one
device and used on another. The devices are not there (`two_devices.py`), so this shows where tensors meet, and not how
a kernel of a real device computes.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import hybrid_models
import pytest
from torch.utils import backend_registration

HERE = Path(__file__).parent
# One of each way of attending and of each kind of state
SCORED = ["qwen3", "gemma2", "gemma3_text", "gemma4_text", "gpt_oss", "qwen3_moe", "lfm2", "nemotron_h", "falcon_h1"]
CASES = [f"sample/{family}" for family in hybrid_models.configs()]
CASES += [f"score/{family}" for family in (*SCORED, "qwen3_5_text")]


@pytest.fixture(scope="module")
def faults():
    if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this PyTorch has no devices that are written in Python")
    command = [sys.executable, str(HERE / "two_devices_script.py"), *CASES]
    path = os.pathsep.join([str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    lines = [json.loads(line) for line in result.stdout.splitlines() if line.startswith('{"family"')]
    assert result.returncode == 0, result.stderr[-4000:]
    return {line["family"]: line["fault"] for line in lines}


@pytest.mark.parametrize("case", [*CASES])
def test_a_split_model_is_the_same_model(faults, case):
    assert faults[case] == ""


def test_tensors_of_two_devices_do_not_meet(faults):
    """What the tests above rest on."""
    program = (
        "import torch, two_devices as two\n"
        "with two.devices():\n"
        "    one, other = torch.ones(2, device=two.FIRST), torch.ones(2, device=two.SECOND)\n"
        "    assert (one + one).device == two.FIRST and (one + one).tolist() == [2.0, 2.0]\n"
        "    assert (one + other.to(two.FIRST)).cpu().tolist() == [2.0, 2.0]\n"
        "    for wrong in (lambda: one + other, lambda: one + torch.ones(2), lambda: one.double()):\n"
        "        try:\n"
        "            wrong()\n"
        "        except (RuntimeError, TypeError) as error:\n"
        "            print(error)\n"
    )
    path = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    assert result.returncode == 0, result.stderr[-2000:]
    met, plain, double = result.stdout.splitlines()
    assert "found pretended:0 and pretended:1" in met and "found cpu and pretended:0" in plain
    assert "has no float64" in double
