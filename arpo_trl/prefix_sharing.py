"""
Score the rows of a micro-batch with every token that rows share computed once, the prompt included: the same
log-probabilities, entropies and gradients as row by row, from one forward of the stock model.

How it works. Sorted by tokens, each row shares its longest prefix with the row before it, so the rows laid end to end
without those prefixes are the prefix tree in depth-first order. Two rows share a *position* if they agree on its token
and on the next: a position predicts one token, so the last token before a fork is repeated for each child and the
stock head scores the packed tree with labels that are already shifted. Attention runs row by row, the new tokens of a
row against the keys of its whole path, so its cost is that of the tokens saved and never the square of the pack.

What it does not do:
- models other than the families in `MODEL_TYPES`, and attention other than sdpa, or flex_attention on CUDA: `None`
  is returned after one line in the log, and the caller scores row by row;
- images, prompt-learning adapters, compiled models, the load-balancing loss of mixtures of experts (it counts tokens);
- equal dropout: with dropout on, rows that share a token share its noise;
- prefixes that two micro-batches share: `sibling_order` keeps siblings in one micro-batch where they fit.
"""

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

logger = logging.getLogger(__name__)

# Families whose tokens mix through attention alone, which take position ids and pass keyword arguments on to it. A
# family is listed once tests/test_prefix_sharing.py holds it to row by row.
MODEL_TYPES = frozenset({"gemma", "gemma3_text", "llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "smollm3"})

# Rotary embeddings that look at the longest position of a batch would see another one in a packed tree.
_LENGTH_DEPENDENT_ROPE = frozenset({"dynamic", "longrope"})

# What one attention call costs beside its arithmetic, in FLOPs of the matrix products that the device could have done
# instead: about 0.1 ms at 100 GFLOP/s on a CPU and 30 µs at 300 TFLOP/s on a GPU.
_CALL_FLOPS = {"cpu": 1e7, "cuda": 1e10}

# Share only where the model of the cost promises this much, so that its error does not make a step slower.
_MARGIN = 0.97


class Cost(NamedTuple):
    """What a forward is made of, in FLOPs: one token, one query-key pair, one attention call, each over all layers."""

    token: float
    pair: float
    call: float

    def row(self, new: int, length: int) -> float:
        """Cost of a row of `length` tokens whose last `new` are computed."""
        return self.token * new + self.pair * new * length + (self.call if new else 0)


class Segment(NamedTuple):
    """The part of a row that no row before it has: stands at `start` in the pack, begins at `depth` of the row."""

    row: int
    start: int
    depth: int


@dataclass
class PrefixTree:
    """
    Rows packed into one sequence in which every shared position stands once, in depth-first order.

    Args:
        input_ids (`np.ndarray` of shape `(L,)`): Tokens.
        position_ids (`np.ndarray` of shape `(L,)`): Depth of each token in its row, from 0.
        labels (`np.ndarray` of shape `(L,)`): Next token where a row scores it, else -100.
        slots (`list[np.ndarray]`): For each row, where its positions 0, 1, … stand in the pack; empty for a row that
            scores nothing.
        segments (`list[Segment]`): What each row adds; they tile the pack in order.
        cost (`float`): Modelled FLOPs of a forward.
    """

    input_ids: np.ndarray
    position_ids: np.ndarray
    labels: np.ndarray
    slots: list[np.ndarray]
    segments: list[Segment]
    cost: float

    def subtree_ends(self) -> np.ndarray:
        """Where the subtree below each token ends: the token at `q` attends to the one at `k` if `k <= q < ends[k]`."""
        ends = np.empty_like(self.input_ids)
        for segment in self.segments:
            path = self.slots[segment.row]
            ends[path] = path[-1] + 1
        return ends


def shared_prefixes(rows: Sequence[np.ndarray]) -> tuple[list[int], list[int]]:
    """
    Order rows so that each shares more with the one before it than with any earlier one.

    Args:
        rows (`Sequence[np.ndarray]`): Token ids of each row, 1-D and of one dtype.

    Returns:
        `tuple[list[int], list[int]]`: the order (indices of rows; equal rows stay in the order they came in), and the
        number of leading tokens that each row of that order shares with the one before it (0 for the first).
    """
    keys = [row.tobytes() for row in rows]  # any order does in which equal prefixes are neighbours; bytes compare fast
    order = sorted(range(len(rows)), key=keys.__getitem__)
    shared = [0] * min(1, len(rows))
    for before, after in zip(order, order[1:], strict=False):
        n = min(len(rows[before]), len(rows[after]))
        differs = rows[before][:n] != rows[after][:n]
        shared.append(int(differs.argmax()) if differs.any() else n)
    return order, shared


def sibling_order(rows: Sequence[np.ndarray], num_steps: int = 1) -> list[int]:
    """
    Put rows that share a prefix next to each other, without moving any row to another optimiser step.

    Args:
        rows (`Sequence[np.ndarray]`): Token ids (prompt and completion, no padding) of each row of a generation batch.
        num_steps (`int`, *optional*, defaults to `1`): Optimiser steps that the generation batch is cut into, in
            order and into equal parts; rows are moved within a part only.

    Returns:
        `list[int]`: a permutation: the row to put at each place.
    """
    if len(rows) % num_steps:
        raise ValueError(f"num_steps must divide the number of rows, but got {num_steps} steps for {len(rows)} rows.")
    size = len(rows) // num_steps
    return [
        start + row
        for start in range(0, len(rows), size or 1)
        for row in shared_prefixes(rows[start : start + size])[0]
    ]


def pack(rows: Sequence[np.ndarray], prompt_lengths: Sequence[int], cost: Cost) -> PrefixTree:
    """
    Lay rows out as a prefix tree; a prefix too short to be worth a masked attention call is computed again.

    Args:
        rows (`Sequence[np.ndarray]`): Token ids of each row, prompt and completion.
        prompt_lengths (`Sequence[int]`): Tokens of each row that belong to its prompt, at least 1.
        cost (`Cost`): What tokens, pairs and calls cost.

    Returns:
        [`PrefixTree`]
    """
    scored = [row for row, prompt_length in enumerate(prompt_lengths) if len(rows[row]) > prompt_length]
    order, shared = shared_prefixes([rows[row] for row in scored])
    slots = [np.empty(0, dtype=np.int64)] * len(rows)
    segments: list[Segment] = []
    size, flops = 0, 0.0
    before = slots[0] if rows else None
    for row, shared_tokens in zip((scored[place] for place in order), shared, strict=True):
        length = len(rows[row]) - 1  # the last token predicts nothing, and nothing attends to it
        depth = max(shared_tokens - 1, 0)  # a position is shared if the next token is, too
        if cost.row(length - depth, length) >= cost.row(length, length):
            depth = 0
        slots[row] = before = np.concatenate([before[:depth], np.arange(size, size + length - depth)])
        if depth < length:
            segments.append(Segment(row, size, depth))
            size += length - depth
            flops += cost.row(length - depth, length)
    ids, positions = np.empty(size, dtype=np.int64), np.empty(size, dtype=np.int64)
    for row, start, depth in segments:
        length = len(rows[row]) - 1
        ids[start : start + length - depth] = rows[row][depth:-1]
        positions[start : start + length - depth] = np.arange(depth, length)
    labels = np.full(size, -100, dtype=np.int64)
    for row in scored:
        labels[slots[row][prompt_lengths[row] - 1 :]] = rows[row][prompt_lengths[row] :]
    return PrefixTree(ids, positions, labels, slots, segments, flops)


class PathAttention:
    """
    Attention of a packed tree, row by row: the queries that are new with a row against the keys of its whole path.

    Keys are cut once at every place where a path jumps, and a path is the concatenation of its cuts: views of one
    tensor would each leave a gradient as large as the pack.

    Args:
        tree ([`PrefixTree`]): What to attend over.
        device (`torch.device`): Where masks are kept.
    """

    def __init__(self, tree: PrefixTree, device: torch.device):
        starts = [segment.start for segment in tree.segments] + [len(tree.input_ids)]
        self.query_sizes = np.diff(starts).tolist()
        runs = []  # each path as the stretches (start, end) of the pack that it runs through
        for segment in tree.segments:
            path = tree.slots[segment.row]
            jumps = np.flatnonzero(np.diff(path) != 1)
            runs.append((path[np.r_[0, jumps + 1]], path[np.r_[jumps, -1]] + 1))
        cuts = np.unique(np.concatenate([bound for run in runs for bound in run]))
        self.key_sizes = np.diff(cuts).tolist()
        first, last = ([np.searchsorted(cuts, run[side]) for run in runs] for side in (0, 1))
        self.paths = [
            [cut for a, b in zip(*bounds, strict=True) for cut in range(a, b)]
            for bounds in zip(first, last, strict=True)
        ]
        self.depths = [segment.depth for segment in tree.segments]
        self.length = max(len(tree.slots[segment.row]) for segment in tree.segments)
        self.device = device
        self.masks: dict[int | None, torch.Tensor] = {}

    def mask(self, depth: int, length: int, window: int | None) -> torch.Tensor | None:
        """Which of `length` keys the queries from `depth` on see; `None` where the kernel's own causal mask does."""
        window = window if window is not None and window < length else None
        if depth == 0 and window is None:
            return None
        if window not in self.masks:  # one square for all rows and layers, of which each row takes a part
            square = torch.ones(self.length, self.length, dtype=torch.bool, device=self.device).tril()
            self.masks[window] = square if window is None else square.triu(1 - window)
        return self.masks[window][None, None, depth:length, :length]

    def __call__(self, attend, module, query, key, value, sliding_window=None, **kwargs) -> tuple[torch.Tensor, None]:
        keys, values = key.split(self.key_sizes, dim=2), value.split(self.key_sizes, dim=2)
        outputs = []
        for queries, path, depth in zip(query.split(self.query_sizes, dim=2), self.paths, self.depths, strict=True):
            own_keys, own_values = (torch.cat([parts[cut] for cut in path], dim=2) for parts in (keys, values))
            mask = self.mask(depth, own_keys.shape[2], sliding_window)
            outputs.append(attend(module, queries, own_keys, own_values, mask, **kwargs)[0])
        return torch.cat(outputs, dim=1), None


def _route_sdpa() -> None:
    """Let transformers' sdpa follow a tree that is handed to the model as `path_attention`; else it is as it was."""
    stock = ALL_ATTENTION_FUNCTIONS["sdpa"]
    if getattr(stock, "follows_paths", False):
        return

    @functools.wraps(stock)
    def sdpa(module, query, key, value, attention_mask, path_attention: PathAttention | None = None, **kwargs):
        if path_attention is None:
            return stock(module, query, key, value, attention_mask, **kwargs)
        return path_attention(stock, module, query, key, value, **kwargs)

    sdpa.follows_paths = True
    AttentionInterface.register("sdpa", sdpa)


def _block_mask(tree: PrefixTree, window: int | None, device: torch.device):
    """The tree as a block-sparse mask for flex_attention; `window` in tokens of depth."""
    from torch.nn.attention.flex_attention import create_block_mask

    ends, depths = torch.from_numpy(tree.subtree_ends()).to(device), torch.from_numpy(tree.position_ids).to(device)

    def sees(batch, head, query, key):
        seen = (key <= query) & (query < ends[key])
        return seen if window is None else seen & (depths[query] - depths[key] < window)

    size = len(tree.input_ids)
    return create_block_mask(sees, None, None, size, size, device=device, _compile=device.type == "cuda")


def _attention_inputs(tree: PrefixTree, config: PreTrainedConfig, device: torch.device) -> dict[str, Any]:
    """What the model is called with so that each token attends to its ancestors only."""
    if config._attn_implementation == "sdpa":
        _route_sdpa()
        # The mask is never read. It has four dimensions, so that no causal mask is built, and no entries, so that a
        # model which does read it fails.
        return {
            "attention_mask": torch.empty(1, 1, 0, 0, device=device),
            "path_attention": PathAttention(tree, device),
        }
    full = _block_mask(tree, None, device)
    if "sliding_attention" not in (getattr(config, "layer_types", None) or ()):
        return {"attention_mask": full}
    sliding = _block_mask(tree, config.sliding_window, device)
    return {"attention_mask": {"full_attention": full, "sliding_attention": sliding}}


def _unwrapped(model: nn.Module) -> nn.Module:
    """The transformers model inside DDP, FSDP, DeepSpeed and PEFT wrappers."""
    while hasattr(model, "module"):
        model = model.module
    return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model


def unsupported_reason(model: nn.Module, device: torch.device) -> str | None:
    """
    Why the rows of `model` have to be scored one by one; `None` if they can share prefixes.

    Args:
        model (`nn.Module`): Model, wrapped or not.
        device (`torch.device`): Where it runs.

    Returns:
        `str` or `None`
    """
    base = _unwrapped(model)
    config = base.config.get_text_config()
    if config.model_type not in MODEL_TYPES:
        return f"model type {config.model_type!r} is not one of {', '.join(sorted(MODEL_TYPES))}"
    implementation = config._attn_implementation
    if implementation != "sdpa" and (implementation != "flex_attention" or device.type != "cuda"):
        return f"attention {implementation!r} on {device.type}; use attn_implementation='sdpa'"
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {rope.get("rope_type")} | {part.get("rope_type") for part in rope.values() if isinstance(part, dict)}
    if kinds & _LENGTH_DEPENDENT_ROPE:
        return "its rotary embedding depends on the length of the batch"
    if any(isinstance(module, torch._dynamo.OptimizedModule) for module in (model, base)):
        return "the model is compiled"
    wrapper = next(
        (module for module in (model, getattr(model, "module", None)) if hasattr(module, "peft_config")), None
    )
    if wrapper is not None and any(adapter.is_prompt_learning for adapter in wrapper.peft_config.values()):
        return "a prompt-learning adapter adds tokens to each row"
    return None


@functools.cache
def _log_once(reason: str) -> None:
    logger.warning("Prefix sharing is off, rows are scored one by one: %s.", reason)


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
    mlp = 3 * (experts * config.moe_intermediate_size if experts else config.intermediate_size)
    return Cost(
        token=2 * hidden * (layers * (attention + mlp) + config.vocab_size),
        pair=4 * layers * heads * head_dim,
        call=layers * _CALL_FLOPS.get(device_type, _CALL_FLOPS["cuda"]),
    )


def shared_prefix_logps(
    model: nn.Module,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    logits_to_keep: int,
    compute_entropy: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None] | None:
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

    Returns:
        `tuple[torch.Tensor, torch.Tensor | None] | None`: log-probabilities and entropies of shape `(B, C)`, 0 where a
        token is masked; `None` if sharing does not pay or is not supported.
    """
    device = input_ids.device
    if reason := unsupported_reason(model, device):
        _log_once(reason)
        return None
    config = _unwrapped(model).config.get_text_config()
    ids, mask = input_ids.cpu().numpy(), attention_mask.bool().cpu().numpy()
    prompt_lengths = mask[:, :-logits_to_keep].sum(1)
    stretches = mask[:, 0].astype(int) + (mask[:, 1:] & ~mask[:, :-1]).sum(1)
    if (prompt_lengths == 0).any() or (stretches > 1).any():  # nothing to predict from, or holes
        return None
    tree = pack(
        [row[kept] for row, kept in zip(ids, mask, strict=True)],
        prompt_lengths.tolist(),
        cost := forward_cost(config, device.type),
    )
    row_by_row = len(ids) * (cost.row(ids.shape[1], ids.shape[1]) - cost.call) + cost.call
    if not tree.segments or tree.cost > _MARGIN * row_by_row:
        return None

    index = np.zeros((len(ids), logits_to_keep), dtype=np.int64)
    for row, (slots, prompt_length) in enumerate(zip(tree.slots, prompt_lengths, strict=True)):
        index[row, : len(slots[prompt_length - 1 :])] = slots[prompt_length - 1 :]
    packed = {"input_ids": tree.input_ids, "position_ids": tree.position_ids, "shift_labels": tree.labels}
    inputs = {name: torch.from_numpy(values)[None].to(device) for name, values in packed.items()}
    outputs = model(**inputs, **_attention_inputs(tree, config, device), fused_lm_head=True)
    masked = ~attention_mask[:, -logits_to_keep:].bool()
    places = torch.from_numpy(index).to(device)
    logps, entropies = (
        values[0][places].masked_fill(masked, 0.0) if wanted else None
        for values, wanted in ((outputs.log_probs, True), (outputs.entropy, compute_entropy))
    )
    return logps, entropies
