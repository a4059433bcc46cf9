"""
Devices that are not there, for tests of what is split over several: a tensor of such a device holds its values on the
CPU, and where tensors of two devices meet in one operation it raises what PyTorch would raise on real ones. Like MPS,
they know no float64.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate.utils import send_to_device
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

# A kind of device whose backend is written in Python. It is registered for the whole process, hence tests in one of
# their own
KIND = "pretended"
_setup_privateuseone_for_python_backend(KIND)
FIRST, SECOND = torch.device(KIND, 0), torch.device(KIND, 1)

# These take indices from the CPU
_INDEXING = {torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default, torch.ops.aten.index_put.default}
# What a model calls the norm behind its last layer
_LAST_NORMS = ("norm", "norm_f", "final_layernorm", "embedding_norm")

_COPIES = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}


class Pretended(torch.Tensor):
    """A tensor of a device that is not there."""

    @staticmethod
    def __new__(cls, values: torch.Tensor, device: torch.device):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            values.size(),
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=device,
            requires_grad=values.requires_grad,
        )

    def __init__(self, values: torch.Tensor, device: torch.device):
        self.values_of = values

    def __repr__(self):
        return f"Pretended({self.values_of}, {self.device})"

    def tolist(self):
        return self.values_of.tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


def _run(func, args, kwargs):
    wanted = kwargs.get("device")
    wanted = None if wanted is None else torch.device(wanted)
    tensors = [item for item in tree_flatten((args, kwargs))[0] if isinstance(item, torch.Tensor)]
    devices = {tensor.device for tensor in tensors if isinstance(tensor, Pretended)}
    if func in _COPIES:
        devices = {args[0].device}
    else:
        plain = [tensor for tensor in tensors if not isinstance(tensor, Pretended) and tensor.dim() > 0]
        if len(devices) > 1 or (devices and plain and func not in _INDEXING):
            told = sorted({*map(str, devices), *("cpu" for _ in plain)})
            raise RuntimeError(
                f"{func}: expected all tensors to be on the same device, but found {' and '.join(told)}"
            )
    device = wanted or next(iter(devices), torch.device("cpu"))
    if wanted is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    if func is torch.ops.aten.histc.default and not args[0].is_floating_point():  # a CPU counts no whole numbers
        return func(args[0].float(), *args[1:], **kwargs).to(args[0].dtype)
    own_args, own_kwargs = tree_map_only(Pretended, lambda tensor: tensor.values_of, (args, kwargs))
    result = func(*own_args, **own_kwargs)
    if func._schema.name.endswith("_") and isinstance(result, torch.Tensor) and not func._schema.name.endswith("__"):
        return args[0]
    if device.type != KIND:
        return result
    if any(part.dtype == torch.float64 for part in tree_flatten(result)[0] if isinstance(part, torch.Tensor)):
        raise TypeError(f"{func}: {device} has no float64, as MPS has none")
    return tree_map_only(torch.Tensor, lambda tensor: Pretended(tensor, device), result)


# Below Python's dispatch, for instance in `torch.tensor(…, device=…)`
_BELOW = torch.library.Library("aten", "IMPL")


def _empty_strided(size, stride, dtype=None, layout=None, device=None, pin_memory=None):
    return Pretended(torch.empty_strided(size, stride, dtype=dtype), device)


def _empty(size, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None):
    return Pretended(torch.empty(size, dtype=dtype), device)


def _copy_from(source, target, non_blocking=False):
    target.values_of.copy_(source.values_of if isinstance(source, Pretended) else source)
    return target


for name, function in (("empty_strided", _empty_strided), ("empty.memory_format", _empty), ("_copy_from", _copy_from)):
    _BELOW.impl(name, function, "PrivateUse1")


class _Factories(TorchDispatchMode):
    """Makes tensors of such a device where they are asked for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


@contextmanager
def devices() -> Iterator[None]:
    """Within the context there are two devices, `FIRST` and `SECOND`."""
    with _Factories():
        yield


def split(model: torch.nn.Module) -> torch.nn.Module:
    """Put half of the layers on each device, as `device_map="auto"` does: tensors follow from module to module."""
    layers = len(model.model.layers)
    places = {f"model.layers.{index}": FIRST if index < layers // 2 else SECOND for index in range(layers)}
    for name, _ in model.model.named_children():
        if name != "layers":
            places[f"model.{name}"] = SECOND if name in _LAST_NORMS else FIRST
    tied = model.lm_head.weight is model.get_input_embeddings().weight
    places["lm_head"] = FIRST if tied else SECOND
    for name, device in places.items():
        for part in model.get_submodule(name).modules():
            for key, parameter in part._parameters.items():
                if parameter is not None and not isinstance(parameter, Pretended):
                    parameter = torch.nn.Parameter(Pretended(parameter.data, device), parameter.requires_grad)
                    part._parameters[key] = parameter
            for key, buffer in part._buffers.items():
                if buffer is not None and not isinstance(buffer, Pretended):
                    part._buffers[key] = Pretended(buffer, device)
    if tied:
        model.lm_head.weight = model.get_input_embeddings().weight
    for name, device in {"": FIRST, **places}.items():
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, kwargs, device=device: send_to_device((args, kwargs), device), with_kwargs=True
        )
    model.register_forward_hook(lambda module, args, output: send_to_device(output, FIRST))
    model.hf_device_map = places
    return model
