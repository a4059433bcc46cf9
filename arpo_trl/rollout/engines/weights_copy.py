"""A copy of a model in another data type, to sample with.

Decoding reads every weight for every token, so half the bytes are twice the speed, if the rest keeps up. On a CPU
torch's scaled-dot-product attention does not: with one query a row, its kernel takes several times as long in bfloat16
as in float32 (`benchmarks/rollout_dtype.py`). There a copy attends with plain products instead.
"""

import copy
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

_ATTENTION = "arpo_one_query"


def copy_in(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """
    A copy of `model` that samples, its floating-point weights in `dtype`. Weights that are tied stay tied; buffers,
    such as the frequencies of rotary positions, keep their dtype.
    """
    weights = {
        id(weight): torch.nn.Parameter(weight.detach().to(dtype), requires_grad=False)
        for weight in model.parameters()
        if weight.is_floating_point()
    }
    sampler = copy.deepcopy(model, memo=dict(weights))
    for module in sampler.modules():  # TRL turns it off for a rollout, but on the model itself
        if getattr(module, "gradient_checkpointing", False):
            module.gradient_checkpointing = False
    halved = dtype.itemsize < 4 and model.device.type == "cpu"
    if halved and sampler.config._attn_implementation == "sdpa":
        sampler.set_attn_implementation(_ATTENTION)
    return sampler


def one_query_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """
    transformers' attention function `"sdpa"`; a single query of each row is multiplied out.

    Args:
        query (`torch.Tensor` of shape `(B, heads, queries, size)`): Of several queries, `"sdpa"` takes over.
        key, value (`torch.Tensor` of shape `(B, kv heads, T, size)`): What they attend to.
        attention_mask (`torch.Tensor` of shape `(B, 1, queries, T)`, *optional*): What `"sdpa"` is given.

    Returns:
        `tuple[torch.Tensor, None]`: of shape `(B, queries, heads, size)`, as all attention functions do.
    """
    if query.size(2) > 1 or any(kwargs.get(name) is not None for name in ("position_bias", "softcap")):
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    rows, heads, _, size = query.shape
    kv_heads, length = key.shape[1:3]
    scores = query.reshape(rows, kv_heads, heads // kv_heads, size) @ _with_room(key).transpose(2, 3)
    scores = scores[..., :length].float() * (size**-0.5 if scaling is None else scaling)
    if attention_mask is not None:
        seen = attention_mask[..., :length]
        scores = scores.masked_fill(~seen, -torch.inf) if seen.dtype == torch.bool else scores + seen
    value = _with_room(value)
    weights = torch.nn.functional.pad(scores.softmax(-1).to(value.dtype), (0, value.size(2) - length))
    return (weights @ value).reshape(rows, 1, heads, size), None


def _with_room(states: torch.Tensor) -> torch.Tensor:
    """
    The whole tensor of which `states` are the first columns, where a layer of a cache has room behind them
    (`growing_layers.py`). Products read that as it stands, whereas torch copies what is cut off it. Room holds zeros.
    """
    rows, heads, length, size = states.shape
    columns = states.stride(1) // size
    strides = (heads * columns * size, columns * size, size, 1)
    if columns <= length or states.stride() != strides or states.storage_offset():
        return states
    return states.as_strided((rows, heads, columns, size), strides)


AttentionInterface.register(_ATTENTION, one_query_attention)
AttentionMaskInterface.register(_ATTENTION, sdpa_mask)
