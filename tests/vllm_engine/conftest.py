"""Tests with a real vLLM engine, on a CPU: `make test-vllm` makes an environment for them and runs them.

Three things are not as vLLM has them: it computes in float32, so that its numbers can be compared with transformers';
it compiles nothing, which takes half a minute an engine and a C++ compiler; and weights stay as they are loaded, where
the CPU engine would repack them for oneDNN into a form that no weight push can write to.
"""

import importlib.util
import os

HAS_VLLM = importlib.util.find_spec("vllm") is not None

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # a colocated engine runs in this process
os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"  # GiB
os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
os.environ["VLLM_HOST_IP"] = "127.0.0.1"
if HAS_VLLM:  # this file is also read where the other tests run, and these compile
    os.environ["TORCHDYNAMO_DISABLE"] = "1"

from functools import partial  # noqa: E402
from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
import tiny  # noqa: E402
from vllm_server import serving  # noqa: E402

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items):
    if not HAS_VLLM:
        for item in items:
            if HERE in item.path.parents:
                item.add_marker(pytest.mark.skip(reason="needs vLLM: run `make test-vllm`"))


@pytest.fixture(scope="session")
def agents(tokenizer, tmp_path_factory):
    """Checkpoints of a small tool-calling model, one for each protocol; vLLM wants heads of 32 or more."""
    folders = {}
    for protocol in ("chat_template", "tags"):
        folder = tmp_path_factory.mktemp("agents") / protocol
        tiny.train_agent(tokenizer, protocol, head_dim=32).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        folders[protocol] = str(folder)
    return folders


@pytest.fixture(scope="session")
def colocated():
    """What the first lines of this file say, for the engines that TRL makes in this process."""
    from trl.generation import vllm_generation
    from vllm import _custom_ops

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vllm_generation, "LLM", partial(vllm_generation.LLM, dtype="float32", enforce_eager=True))
        patch.setattr(_custom_ops, "_supports_onednn", False)
        yield


@pytest.fixture(scope="session")
def clean_environment():
    """For other processes: without what a colocated engine needs or leaves behind in this one's."""
    ours = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "VLLM_ENABLE_V1_MULTIPROCESSING")
    return {name: value for name, value in os.environ.items() if name not in ours}


@pytest.fixture(scope="session")
def server(agents, clean_environment, tmp_path_factory):
    """The address of a server of text."""
    with serving(agents["chat_template"], clean_environment, tmp_path_factory.mktemp("server") / "log") as address:
        yield address
