"""The random number generators of Python, NumPy and PyTorch, put back to where they were."""

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def kept_random_state(devices: Iterable[torch.device]) -> Iterator[None]:
    """
    What is drawn inside the block leaves what is drawn after it as it is.

    Args:
        devices (`Iterable[torch.device]`): Devices that draw beside the CPU. Generators of CUDA devices are put back;
            those of other accelerators are not.
    """
    python, numpy = random.getstate(), np.random.get_state()
    cuda = sorted({device.index or 0 for device in devices if device.type == "cuda"})
    try:
        with torch.random.fork_rng(cuda):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
