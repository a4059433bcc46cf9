"""
Score the rows of a micro-batch with every token that rows share computed once, the prompt included: the same
log-probabilities, entropies and gradients as row by row, from one forward of the stock model.

The packed tree (see `prefix_tree`) is scored by the stock head with labels that are already shifted, each token
attending to its ancestors only (see `path_attention`), and layers with a state going on from those of its ancestors
(see `path_states`). The load-balancing loss of a mixture of experts weighs each token by the rows that hold it.

What it does not do:
- models other than the families in `MODEL_TYPES`, and attention other than sdpa and eager, or flex_attention,
  flash_attention_2 and flash_attention_3 on CUDA: `None` is returned after one line in the log, and the caller scores
  row by row;
- images, prompt-learning adapters, compiled models;
- equal dropout: with dropout on, rows that share a token share its noise;
- prefixes that two micro-batches share: `prefix_tree.sibling_order` brings siblings together where they fit.
"""

import functools
import logging
from collections import Counter
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from .path_attention import FLASH_ATTENTION, attention_inputs
from .path_states import PathStates, can_route_states, route_states
from .prefix_tree import Cost, PrefixTree, pack, unpadded
from .tally import NotPacked, chunk_counts

logger = logging.getLogger(__name__)

# Families whose tokens mix through attention and states alone, and which take position ids and pass keyword arguments
# on. A family is listed once tests/test_prefix_families.py holds it to row by row.
MODEL_TYPES = frozenset(
    """
    cohere2 gemma gemma2 gemma3 gemma3_text gemma4 gemma4_text glm4 glm4_moe gpt_oss granite llama ministral ministral3
    mistral mistral3 mixtral olmo2 olmo3 olmoe phi3 qwen2 qwen2_5_vl qwen2_moe qwen3 qwen3_moe qwen3_vl qwen3_vl_moe
    smollm3

    bamba falcon_h1 granitemoehybrid lfm2 lfm2_moe nemotron_h olmo_hybrid qwen3_5 qwen3_5_moe qwen3_5_moe_text
    qwen3_5_text qwen3_next
    """.split()
)

# Rotary embeddings that look at the longest position of a batch would see another one in a packed tree.
_LENGTH_DEPENDENT_ROPE = frozenset({"dynamic", "longrope"})

# What one attention call costs beside its arithmetic, in FLOPs of the matrix products that the device could have done
# instead: about 0.1 ms at 100 GFLOP/s on a CPU and 30 µs at 300 TFLOP/s on a GPU.
_CALL_FLOPS_CPU, _CALL_FLOPS_GPU = 1e7, 1e10

# Share only where the model of the cost promises this much, so that its error does not make a step slower.
_MARGIN = 0.97


def _unwrapped(model: nn.Module) -> list[Any]:
    """The model, what its wrappers (DDP, FSDP, DeepSpeed, PEFT) hold, and last the transformers model itself."""
    chain: list[Any] = [model]
    while hasattr(chain[-1], "module"):
        chain.append(chain[-1].module)
    if hasattr(chain[-1], "peft_config") and hasattr(chain[-1], "get_base_model"):
        chain.append(chain[-1].get_base_model())
    return chain


def _is_compiled(module: nn.Module) -> bool:
    """Whether `torch.compile(module)` made it, or `module.compile()` was called."""
    return isinstance(module, torch._dynamo.OptimizedModule) or module._compiled_call_impl is not None


def unsupported_reason(model: nn.Module, device: torch.device) -> NotPacked | None:
    """
    Why the rows of `model` have to be scored one by one; `None` if they can share prefixes.

    Args:
        model (`nn.Module`): Model, wrapped or not.
        device (`torch.device`): Where it runs.

    Returns:
        [`~arpo_trl.scoring.tally.NotPacked`] or `None`
    """
    chain = _unwrapped(model)
    config = chain[-1].config
    if config.model_type not in MODEL_TYPES:
        known = ", ".join(sorted(MODEL_TYPES))
        return NotPacked("model_type", f"model type {config.model_type!r} is not one of {known}")
    config = config.get_text_config()
    if getattr(config, "use_bidirectional_attention", None) in (True, "all"):
        return NotPacked("attention", "its tokens attend to those that follow them")
    implementation = config._attn_implementation
    if implementation not in ("sdpa", "eager") and (
        implementation not in ("flex_attention", *FLASH_ATTENTION) or device.type != "cuda"
    ):
        return NotPacked("attention", f"attention {implementation!r} on {device.type}; use attn_implementation='sdpa'")
    if implementation == "flex_attention" and len(set((getattr(chain[-1], "hf_device_map", None) or {}).values())) > 1:
        return NotPacked(
            "attention",
            "attention 'flex_attention' on a model that is split over devices; use attn_implementation='sdpa'",
        )
    if has_states(config) and not can_route_states(chain[-1]):
        return NotPacked(
            "states",
            "its layers with states run kernels that know no tree; load it with use_kernels=False, and if it is, "
            "update transformers",
        )
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {rope.get("rope_type")} | {part.get("rope_type") for part in rope.values() if isinstance(part, dict)}
    if kinds & _LENGTH_DEPENDENT_ROPE:
        return NotPacked("rotary_embedding", "its rotary embedding depends on the length of the batch")
    if any(_is_compiled(module) for module in model.modules()):
        return NotPacked("compiled", "the model is compiled")
    if any(isinstance(module, nn.DataParallel) for module in chain):
        return NotPacked("data_parallel", "DataParallel splits a batch by rows; launch with `accelerate launch`")
    adapters = [adapter for module in chain[:-1] for adapter in getattr(module, "peft_config", {}).values()]
    if any(adapter.is_prompt_learning for adapter in adapters):
        return NotPacked("prompt_learning", "a prompt-learning adapter adds tokens to each row")
    return None


@functools.cache
def _log_once(message: str, level: int = logging.WARNING) -> None:
    logger.log(level, message)


def _why_no_load_balancing_loss(model: nn.Module) -> NotPacked | None:
    """Why the load-balancing loss of a mixture of experts cannot be that of row by row."""
    if not _load_balancing_loss_takes_weights():
        why = "the load-balancing loss of this version of transformers counts each token once; update transformers"
    elif _unwrapped(model)[-1].config.get_text_config()._attn_implementation == "flex_attention":
        why = "flex_attention's mask does not tell the load-balancing loss how many rows hold a token"
    else:
        return None
    return NotPacked("router_loss", f"{why}, or leave the loss out with router_aux_loss_coef=0")


@functools.cache
def _load_balancing_loss_takes_weights() -> bool:
    """Whether transformers' loss reads its mask as weights of tokens, whatever the mask's shape."""
    experts = torch.tensor([[5.0, 0.0], [0.0, 5.0]])
    try:
        weighted = load_balancing_loss_func((experts,), 2, 1, torch.tensor([2.0, 1.0])[:, None, None, None])
    except ValueError:
        return False
    return torch.allclose(weighted, load_balancing_loss_func((experts[[0, 0, 1]],), 2, 1))


def why_not_packed(
    model: nn.Module, device: torch.device, aux_loss: bool = False, images: bool = False
) -> NotPacked | None:
    """
    What speaks against sharing prefixes, if anything does; the first time, it is logged.

    Args:
        model (`nn.Module`): Model, wrapped or not.
        device (`torch.device`): Where it runs.
        aux_loss (`bool`, *optional*, defaults to `False`): Whether its load-balancing loss is part of the objective.
        images (`bool`, *optional*, defaults to `False`): Whether the rows have images.

    Returns:
        [`~arpo_trl.scoring.tally.NotPacked`] or `None`
    """
    reason = unsupported_reason(model, device)
    if reason is None and aux_loss:
        reason = _why_no_load_balancing_loss(model)
    if reason is None and images:
        reason = NotPacked("images", "the rows have images")
    if reason is not None:
        _log_once(f"Prefix sharing is off, rows are scored one by one: {reason.text}.")
    return reason


def rows_may_change_micro_batch(
    loss_type: str, top_entropy_quantile: float, entropy_bonus: bool, aux_loss: bool = False
) -> bool:
    """
    Whether the loss of an optimiser step is the same whichever of its micro-batches a row is in.

    `GRPOTrainer` takes some averages and a quantile over the tokens of each micro-batch; then it is not the same, and
    the first time the log says why.

    Args:
        loss_type (`str`): As in [`~trl.GRPOConfig`].
        top_entropy_quantile (`float`): As in [`~trl.GRPOConfig`].
        entropy_bonus (`bool`): Whether the entropy is part of the loss.
        aux_loss (`bool`, *optional*, defaults to `False`): Whether the load-balancing loss of a mixture of experts is
            part of the loss.

    Returns:
        `bool`
    """
    if top_entropy_quantile < 1.0:
        by_micro_batch = f"`top_entropy_quantile={top_entropy_quantile}` ranks"
    elif loss_type == "bnpo":
        by_micro_batch = "`loss_type='bnpo'` averages over"
    elif entropy_bonus:
        by_micro_batch = "the entropy bonus averages over"
    elif aux_loss:
        by_micro_batch = "the load-balancing loss averages over"
    else:
        return True
    _log_once(f"Rows that share a prefix are not brought together: {by_micro_batch} the tokens of each micro-batch.")
    return False


def has_states(config: PreTrainedConfig) -> bool:
    """Whether tokens of a model mix in another way than attention, too."""
    return any(
        kind not in ("full_attention", "sliding_attention") for kind in getattr(config, "layer_types", None) or ()
    )


def forward_cost(config: PreTrainedConfig, device_type: str) -> Cost:
    """
    Model the FLOPs of a forward; only their ratios matter, since both sides run on the same device.

    Args:
        config ([`~transformers.PreTrainedConfig`]): Config of the language model.
        device_type (`str`): `"cpu"` or `"cuda"`.

    Returns:
        [`Cost`]
    """
    hidden, layers, heads = config.hidden_size, config.num_hidden_layers, config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    attention = 2 * head_dim * (heads + (getattr(config, "num_key_value_heads", None) or heads))
    experts = getattr(config, "num_experts_per_tok", None)
    width = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
    mlp = 3 * (experts * width if experts else config.intermediate_size)
    window = getattr(config, "sliding_window", None) or 0
    kinds = getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"] * layers
    pair = 4 * heads * head_dim
    return Cost(
        token=2 * hidden * (layers * (attention + mlp) + config.vocab_size),
        pair=pair * (kinds.count("full_attention") + kinds.count("hybrid")),
        call=layers * (_CALL_FLOPS_CPU if device_type == "cpu" else _CALL_FLOPS_GPU),
        causal=1.0 if device_type == "cpu" else 0.5,
        windowed=pair * kinds.count("sliding_attention"),
        window=window,
    )


def packed_tree(
    model: nn.Module,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    logits_to_keep: int,
    only_if_cheaper: bool = True,
    compute_aux_loss: bool = False,
) -> PrefixTree | NotPacked:
    """The prefix tree that [`shared_prefix_logps`] scores, or why it scores none; arguments as there."""
    device = input_ids.device
    reason = why_not_packed(model, device, compute_aux_loss)
    if reason is not None:
        return reason
    ids, mask = input_ids.cpu().numpy(), attention_mask.bool().cpu().numpy()
    prompt_lengths = mask[:, :-logits_to_keep].sum(1)
    stretches = mask[:, 0].astype(int) + (mask[:, 1:] & ~mask[:, :-1]).sum(1)
    if (prompt_lengths == 0).any():
        return NotPacked("no_prompt", "a row has no prompt to predict its first token from")
    if (stretches > 1).any():
        return NotPacked("mask", "the attention mask of a row has holes")
    cost = forward_cost(_unwrapped(model)[-1].config.get_text_config(), device.type)
    # The load-balancing loss is of every token
    tree = pack(unpadded(ids, mask), prompt_lengths.tolist(), cost, every_token=compute_aux_loss)
    if not tree.segments:
        return NotPacked("no_completion", "all completions are masked")
    if only_if_cheaper and tree.cost > _MARGIN * cost.batch(len(ids), ids.shape[1], padded=not mask.all()):
        return NotPacked("cost", "the rows of a micro-batch share too little for it to pay")
    return tree


def shared_prefix_logps(
    model: nn.Module,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    logits_to_keep: int,
    compute_entropy: bool = False,
    compute_aux_loss: bool = False,
    only_if_cheaper: bool = True,
    counts: Counter[str] | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None] | None:
    """
    Per-token log-probabilities and entropies of completions from one forward over their prefix tree.

    A drop-in for one chunk of `GRPOTrainer._get_per_token_logps_and_entropies`: call it under the trainer's autocast
    and score row by row where it returns `None`. It calls `model` exactly once or not at all, so the number of
    forwards, which sharded models have to agree on, stays that of row by row.

    Args:
        model (`nn.Module`): Model with TRL's fused head (`trl.trainer.utils.add_fused_lm_head`), wrapped or not.
        input_ids (`torch.Tensor` of shape `(B, P + C)`): Prompts padded left, completions padded right.
        attention_mask (`torch.Tensor` of shape `(B, P + C)`): 1 for tokens, 0 for padding. A completion may be masked
            as a whole.
        logits_to_keep (`int`): C.
        compute_entropy (`bool`, *optional*, defaults to `False`): Whether to return entropies, in nats.
        compute_aux_loss (`bool`, *optional*, defaults to `False`): Whether to return the load-balancing loss of a
            mixture of experts.
        only_if_cheaper (`bool`, *optional*, defaults to `True`): Whether to decline where the modelled cost promises
            no gain. In bfloat16 packed rows differ from rows scored one by one by its rounding, so `False` is for
            log-probabilities that are compared with those of the same rows in another chunk.
        counts (`Counter[str]`, *optional*): Where the counts of this chunk are added
            ([`~arpo_trl.scoring.tally.chunk_counts`]).

    Returns:
        `tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None] | None`: log-probabilities and entropies of
        shape `(B, C)`, 0 where a token is masked, and the load-balancing loss; `None` if sharing does not pay or is
        not supported.
    """
    device = input_ids.device
    tree = packed_tree(model, input_ids, attention_mask, logits_to_keep, only_if_cheaper, compute_aux_loss)
    if counts is not None:
        scored = int(attention_mask[:, -logits_to_keep:].sum())
        outcome = tree if isinstance(tree, NotPacked) else len(tree.input_ids)
        counts.update(chunk_counts(scored, input_ids.numel(), outcome))
    if isinstance(tree, NotPacked):
        _log_once(f"Some rows are scored one by one: {tree.text}.", logging.INFO)
        return None

    stock = _unwrapped(model)[-1]
    config = stock.config.get_text_config()
    prompt_lengths = attention_mask[:, :-logits_to_keep].sum(1).tolist()
    index = np.zeros((len(input_ids), logits_to_keep), dtype=np.int64)
    for row, (slots, prompt_length) in enumerate(zip(tree.slots, prompt_lengths, strict=True)):
        scores = slots[prompt_length - 1 : prompt_length - 1 + logits_to_keep]
        index[row, : len(scores)] = scores
    packed = {"input_ids": tree.input_ids, "position_ids": tree.position_ids, "shift_labels": tree.labels}
    inputs: dict[str, Any] = {name: torch.from_numpy(values)[None].to(device) for name, values in packed.items()}
    if hasattr(config, "output_router_logits"):
        inputs["output_router_logits"] = compute_aux_loss  # whatever the config asks for
    if has_states(config):
        route_states(stock)
        inputs["path_states"] = PathStates(tree)
    outputs = model(**inputs, **attention_inputs(tree, stock, device), fused_lm_head=True)
    masked = ~attention_mask[:, -logits_to_keep:].bool()
    places = torch.from_numpy(index).to(device)

    def unpack(packed_values: torch.Tensor) -> torch.Tensor:
        # The head of a model that is split over devices may be on another one than the rows
        return packed_values[0].to(device)[places].masked_fill(masked, 0.0)

    entropies = unpack(outputs.entropy) if compute_entropy else None
    return unpack(outputs.log_probs), entropies, outputs.aux_loss if compute_aux_loss else None
