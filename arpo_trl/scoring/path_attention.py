"""
Attention of a packed tree: each token attends to its ancestors, and no mask is as large as the square of a row.

The tokens that are new with a row, against the keys of its whole path, are a causal mask that is aligned with the
lower right corner. Flash kernels have it built in: through PyTorch (`causal_lower_right`, CUDA) a row at a time, and
with flash_attention_2 and flash_attention_3 as one call for all rows. Elsewhere, and for sliding windows in PyTorch,
queries go in blocks, each against the keys that it can see, under a strip of a mask: memory grows linearly with the
row. A sliding window counts tokens along the path. A model's own eager attention is called with the same blocks, so
that what it adds is there (attention sinks, soft-capped scores); the scores of a block are computed again in the
backward pass, and hence not kept. Flex attention reads the tree as a block-sparse mask.

What it does not do: the paths for CUDA are written to the documentation of the kernels and tested with stand-ins for
them; none has run on a GPU. Keys of grouped queries are read as they are on a CPU and by flash kernels, and repeated
for others.
"""

import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.backends.cuda import SDPAParams, can_use_flash_attention
from torch.nn.attention.bias import causal_lower_right
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .prefix_tree import PrefixTree

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

# Flash attention as a package of its own, or as the kernels that transformers loads in its place
FLASH_ATTENTION = (
    *("flash_attention_2", "flash_attention_3"),
    *("kernels-community/flash-attn2", "kernels-community/flash-attn3", "kernels-community/vllm-flash-attn3"),
)

# Queries of a call where a kernel has no mask of its own
_BLOCK = 256


class PathAttention:
    """
    Attention of a packed tree: the queries that are new with a row against the keys of its whole path.

    Keys are cut once at every place where a path jumps, and a path is the concatenation of its cuts: views of one
    tensor would each leave a gradient as large as the pack.

    Args:
        tree ([`PrefixTree`]): What to attend over.
    """

    def __init__(self, tree: PrefixTree):
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
        self.lengths = [len(tree.slots[segment.row]) for segment in tree.segments]  # of the paths
        # Layers of a split model run on different devices
        self.strips: dict[tuple[int | None, torch.dtype, torch.device], torch.Tensor] = {}
        self.bounds: dict[torch.device, dict[str, Any]] = {}

    def __call__(
        self,
        attend: Callable[..., Any],
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        sliding_window: int | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """Attend a row at a time; `attend` is transformers' sdpa. States are of shape `(1, heads, L, head size)`."""
        outputs = []
        for queries, keys, values in self._rows(query, key, value):
            length = keys.shape[2]
            window = sliding_window if sliding_window is not None and sliding_window < length else None
            if queries.shape[2] == length and window is None:  # the kernel's own causal mask will do
                outputs.append(attend(module, queries, keys, values, None, **kwargs)[0])
            else:
                options = {"dropout_p": kwargs.get("dropout", 0.0), "scale": kwargs.get("scaling")}
                attended = self._lower_right(queries, keys, values, window, options)
                outputs.append(attended.transpose(1, 2))
        return torch.cat(outputs, dim=1), None

    def eager(
        self,
        attend: Callable[..., Any],
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        sliding_window: int | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """Attend a block at a time; `attend` is the model's own eager attention."""

        def block(*states: torch.Tensor) -> torch.Tensor:
            return attend(module, *states, **kwargs)[0]

        outputs = []
        for queries, keys, values in self._rows(query, key, value):
            blocks = list(self._blocks(queries, keys, values, sliding_window))
            for states in blocks:
                again = len(blocks) > 1 and torch.is_grad_enabled()
                outputs.append(checkpoint(block, *states, use_reentrant=False) if again else block(*states))
        return torch.cat(outputs, dim=1), None

    def _rows(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Of each row the queries that are new with it, and the keys and values of its whole path."""
        device = query.device.type
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            # once, rather than in the calls of each row
            query, key, value = (states.to(torch.get_autocast_dtype(device)) for states in (query, key, value))
        keys, values = key.split(self.key_sizes, dim=2), value.split(self.key_sizes, dim=2)
        for queries, path in zip(query.split(self.query_sizes, dim=2), self.paths, strict=True):
            own_keys, own_values = (torch.cat([parts[cut] for cut in path], dim=2) for parts in (keys, values))
            yield queries, own_keys, own_values

    def _blocks(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int | None
    ) -> Iterator[tuple[torch.Tensor, ...]]:
        """The last tokens of a path in blocks: queries, the keys and values that any of them sees, and their mask."""
        end = key.shape[2] - query.shape[2]
        for queries in query.split(_BLOCK, dim=2):
            end += queries.shape[2]
            start = 0 if window is None else max(0, end - queries.shape[2] - window + 1)
            mask = self._strip(window, queries)[-queries.shape[2] :, start - end :]
            yield queries, key[:, :, start:end], value[:, :, start:end], mask

    def _lower_right(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        window: int | None,
        options: dict[str, Any],
    ) -> torch.Tensor:
        """The last tokens of a path, of shape `(1, heads, new, head size)`, against its keys of length `length`."""
        new, length, device = query.shape[2], key.shape[2], query.device.type
        grouped = query.shape[1] != key.shape[1]
        built_in = device == "cuda" and window is None
        kept = device == "cpu"  # whether the kernel reads keys of grouped queries as they are
        if built_in:
            parameters = SDPAParams(query, key, value, None, options["dropout_p"], False, grouped)
            kept = can_use_flash_attention(parameters)
        if grouped and not kept:
            repeats = query.shape[1] // key.shape[1]
            key, value = (states.repeat_interleave(repeats, dim=1) for states in (key, value))
        options = {**options, "enable_gqa": grouped and kept}
        if built_in:
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask=causal_lower_right(new, length), **options
            )
        outputs = [
            F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, **options)
            for queries, keys, values, mask in self._blocks(query, key, value, window)
        ]
        return torch.cat(outputs, dim=2)

    def _strip(self, window: int | None, query: torch.Tensor) -> torch.Tensor:
        """
        What is added to the scores of a block, of shape `(block, keys)`: a view of its last rows and columns is the
        mask of a smaller block and of fewer keys.
        """
        kind = (window, query.dtype, query.device)
        if kind not in self.strips:
            block, longest = min(_BLOCK, max(self.query_sizes)), max(self.lengths)
            width = longest if window is None else min(longest, block + window)
            sees = torch.ones(block, width, dtype=torch.bool, device=query.device).tril(width - block)
            sees = sees if window is None else sees.triu(width - block - window + 1)
            self.strips[kind] = torch.zeros_like(sees, dtype=query.dtype).masked_fill_(~sees, float("-inf"))
        return self.strips[kind]

    def varlen(
        self,
        attend: Callable[..., Any],
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """Attend all rows in one call; `attend` is transformers' flash attention."""
        keys, values = key.split(self.key_sizes, dim=2), value.split(self.key_sizes, dim=2)
        own_keys, own_values = (
            torch.cat([parts[cut] for path in self.paths for cut in path], dim=2) for parts in (keys, values)
        )
        if query.device not in self.bounds:
            of_queries, of_keys = (
                torch.tensor(np.r_[0, np.cumsum(sizes)], dtype=torch.int32, device=query.device)
                for sizes in (self.query_sizes, self.lengths)
            )
            self.bounds[query.device] = {
                "cu_seq_lens_q": of_queries,
                "cu_seq_lens_k": of_keys,
                "max_length_q": max(self.query_sizes),
                "max_length_k": max(self.lengths),
            }
        return attend(module, query, own_keys, own_values, None, **{**kwargs, **self.bounds[query.device]})


def _routed(stock: Callable[..., Any], method: str) -> Callable[..., Any]:
    """An attention function of transformers that follows a `path_attention`; without one it is as it was."""

    def routed(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        path_attention: PathAttention | None = None,
        path_states: Any = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if path_attention is None:
            return stock(module, query, key, value, attention_mask, **kwargs)
        return getattr(path_attention, method)(stock, module, query, key, value, **kwargs)

    return routed


def _is_routed(function: Callable[..., Any]) -> bool:
    return getattr(function, "__module__", None) == __name__


def _route(model: nn.Module, implementation: str) -> None:
    """Let the attention of a model follow a `path_attention`."""
    if implementation != "eager":
        stock = ALL_ATTENTION_FUNCTIONS[implementation]
        if not _is_routed(stock):
            method = "varlen" if implementation in FLASH_ATTENTION else "__call__"
            AttentionInterface.register(implementation, _routed(stock, method))
        return
    for file in {type(module).__module__ for module in model.modules()}:  # each file has an eager attention of its own
        functions = vars(sys.modules[file])
        stock = functions.get("eager_attention_forward")
        if stock is not None and not _is_routed(stock):
            functions["eager_attention_forward"] = _routed(stock, "eager")


def _block_mask(tree: PrefixTree, window: int | None, device: torch.device) -> "BlockMask":
    """The tree as a block-sparse mask for flex_attention; `window` in tokens of depth."""
    from torch.nn.attention.flex_attention import create_block_mask

    ends, depths = torch.from_numpy(tree.subtree_ends()).to(device), torch.from_numpy(tree.position_ids).to(device)

    def sees(batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        seen = (key <= query) & (query < ends[key])
        return seen if window is None else seen & (depths[query] - depths[key] < window)

    size = len(tree.input_ids)
    return create_block_mask(sees, None, None, size, size, device=device, _compile=device.type == "cuda")


def attention_inputs(tree: PrefixTree, model: PreTrainedModel, device: torch.device) -> dict[str, Any]:
    """What the transformers `model` is called with so that each token attends to its ancestors only."""
    config = model.config.get_text_config()
    implementation = config._attn_implementation
    if implementation != "flex_attention":
        _route(model, implementation)
        # Attention does not read this mask. It has four dimensions, so that no causal mask is built, and the wrong
        # ones, so that a model whose attention does read it fails. The load-balancing loss of a mixture of experts
        # reads it as one weight for each token.
        weights = torch.from_numpy(tree.row_counts()).to(device, torch.float32)
        return {"attention_mask": weights[:, None, None, None], "path_attention": PathAttention(tree)}
    kinds, window = getattr(config, "layer_types", None), getattr(config, "sliding_window", None)
    if kinds is None:  # all layers are alike
        return {"attention_mask": _block_mask(tree, window, device)}
    windows = {"full_attention": None, "sliding_attention": window}
    masks = {kind: _block_mask(tree, windows[kind], device) if kind in windows else None for kind in set(kinds)}
    return {"attention_mask": masks if masks.keys() != {"full_attention"} else masks["full_attention"]}
