"""
Linear attention and short convolutions of a packed tree: a stretch of tokens starts from the state in which the tokens
before it on its path have left a layer, and gradients flow back through that state.

Transformers' mixers leave what mixes tokens to functions of their modelling file, and pass keyword arguments on to
them. These functions are given the tree:

- A convolution reads the few tokens before it, so each segment is laid behind copies of them, and one call of the
  layer's own kernel does the whole pack.
- A scan is cut wherever rows part. Stretches of one depth in the tree are one call, padded with tokens that leave a
  state as it is; each starts from the last state of its parent. So there are as many calls as forks lie behind one
  another, whatever the number of rows.

What it does not do: a scan on several devices of one pack; states longer than a call (each call keeps its own in
memory, as the layer itself does).
"""

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from .prefix_tree import PrefixTree


class PathStates:
    """
    Where the tokens of a packed tree find what stands before them.

    Args:
        tree ([`PrefixTree`]): What to scan.
    """

    def __init__(self, tree: PrefixTree):
        size = len(tree.input_ids)
        self.size = size
        self.before = np.arange(-1, size - 1)  # the token before each one on its path, -1 for none
        for segment in tree.segments:
            self.before[segment.start] = tree.slots[segment.row][segment.depth - 1] if segment.depth else -1
        self.starts = np.array([segment.start for segment in tree.segments])

        # Cut where a segment begins, and behind each token that another segment goes on from
        forks = self.before[self.starts]
        cuts = np.union1d(self.starts, forks[forks >= 0] + 1)
        ends = np.r_[cuts[1:], size]
        parents = np.searchsorted(ends, self.before[cuts], side="right")  # of each stretch; unused for a root
        depths = np.zeros(len(cuts), dtype=np.int64)
        for stretch, parent in enumerate(parents):  # in depth-first order parents come first
            if self.before[cuts[stretch]] >= 0:
                depths[stretch] = depths[parent] + 1
        self.levels: list[Level] = []
        place = np.empty(len(cuts), dtype=np.int64)  # of a stretch in its level
        for depth in range(depths.max() + 1):
            own = np.flatnonzero(depths == depth)
            place[own] = np.arange(len(own))
            lengths = ends[own] - cuts[own]
            tokens = np.arange(lengths.max())
            slots = np.where(tokens < lengths[:, None], cuts[own, None] + tokens, size)
            self.levels.append(Level(slots, place[parents[own]] if depth else None))
        laid_out = np.concatenate([level.slots.ravel() for level in self.levels])
        self.places = np.empty(size + 1, dtype=np.int64)  # of each token among those of all levels, padding included
        self.places[laid_out] = np.arange(len(laid_out))
        self.laid_out = laid_out
        self.indices: dict[tuple[Any, torch.device], torch.Tensor] = {}  # layers of a split model run on other devices

    def _index(self, name: Any, device: torch.device, values: Callable[[], np.ndarray]) -> torch.Tensor:
        if (name, device) not in self.indices:
            self.indices[name, device] = torch.from_numpy(values()).to(device)
        return self.indices[name, device]

    def convolve(
        self, stock: Callable[..., torch.Tensor], states: torch.Tensor, weight: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """A causal convolution along paths; states are of shape `(1, channels, L)`."""
        context = weight.shape[-1] - 1

        def laid_out() -> np.ndarray:
            behind = []  # the tokens before each segment, nearest first; -1, that is L, for none
            slots = self.starts
            for _ in range(context):
                slots = np.where(slots >= 0, self.before[slots], -1)
                behind.append(slots)
            ends = np.r_[self.starts[1:], self.size]
            parts = [
                np.r_[[slots[i] for slots in reversed(behind)], np.arange(start, end)].astype(np.int64)
                for i, (start, end) in enumerate(zip(self.starts, ends, strict=True))
            ]
            index = np.concatenate(parts)
            return np.where(index < 0, self.size, index)

        def kept() -> np.ndarray:
            return np.arange(self.size) + context * np.searchsorted(self.starts, np.arange(self.size), side="right")

        index = self._index(("convolution", context), states.device, laid_out)
        own = self._index(("own", context), states.device, kept)
        mixed = stock(F.pad(states, (0, 1)).index_select(2, index), weight, *args, **kwargs)
        return mixed.index_select(2, own)

    def scan(
        self, call: Callable[..., tuple[torch.Tensor, torch.Tensor]], inputs: tuple[torch.Tensor, ...]
    ) -> torch.Tensor:
        """
        Scan each level from the last states of the one before.

        Args:
            call (`Callable`): Takes the inputs of a level, of shape `(stretches, tokens, …)` and 0 for padding, and
                the states that they start from, or `None`; gives outputs and last states.
            inputs (`tuple[torch.Tensor, ...]`): Each of shape `(1, L, …)`.
        """
        device = inputs[0].device
        index = self._index("scan", device, lambda: self.laid_out)
        padded = [F.pad(x[0], (0, 0) * (x.dim() - 2) + (0, 1)).index_select(0, index) for x in inputs]
        sizes = [level.slots.size for level in self.levels]
        outputs, states = [], None
        for depth, (level, *own) in enumerate(zip(self.levels, *(x.split(sizes) for x in padded), strict=True)):
            if level.parents is not None and states is not None:
                parents = level.parents
                states = states.index_select(0, self._index(("parents", depth), device, lambda p=parents: p))
            output, states = call(*(x.unflatten(0, level.slots.shape) for x in own), states)
            outputs.append(output.flatten(0, 1))
        places = self._index("places", device, lambda: self.places[:-1])
        return torch.cat(outputs).index_select(0, places)[None]


class Level:
    """
    Stretches of a tree that are scanned in one call.

    Args:
        slots (`np.ndarray` of shape `(stretches, tokens)`): Where their tokens stand in the pack; L for padding.
        parents (`np.ndarray` of shape `(stretches,)`, *optional*): Which stretch of the level before each one goes on
            from; `None` where a row begins.
    """

    def __init__(self, slots: np.ndarray, parents: np.ndarray | None):
        self.slots = slots
        self.parents = parents


def _convolution(stock: Callable[..., Any], paths: PathStates, states, weight, *args, **kwargs):
    return paths.convolve(stock, states, weight, *args, **kwargs)


def _gated_delta_rule(stock: Callable[..., Any], paths: PathStates, query, key, value, g, beta, **kwargs):
    # A token of zeros decays by exp(0) and writes 0 times 0
    kwargs = {**kwargs, "output_final_state": True}

    def call(query, key, value, g, beta, states):
        return stock(query, key, value, g=g, beta=beta, **{**kwargs, "initial_state": states})

    return paths.scan(call, (query, key, value, g, beta)), None


def _mamba2(stock: Callable[..., Any], paths: PathStates, hidden_states, dt, A, B, C, **kwargs):
    # A token whose time step is 0 leaves the state as it is, so time steps are made before there is padding
    bias, limit = kwargs.pop("dt_bias", None), kwargs.pop("dt_limit", (0.0, float("inf")))
    steps = dt if bias is None else dt + bias.to(dt.dtype)
    steps = F.softplus(steps) if kwargs.pop("dt_softplus", False) else steps
    kwargs = {**kwargs, "return_final_states": True}

    def call(hidden_states, dt, B, C, states):
        return stock(hidden_states, dt, A, B, C, **{**kwargs, "initial_states": states})

    return paths.scan(call, (hidden_states, steps.clamp(*limit), B, C))


def _unfused(stock: Callable[..., Any], paths: PathStates, *args, **kwargs) -> None:
    """Mamba2's kernel that does all at once knows no tree; without it the layer goes on step by step."""


_ROUTES: dict[str, Callable[..., Any]] = {
    "causal_conv1d_fn": _convolution,
    "torch_chunk_gated_delta_rule": _gated_delta_rule,
    "mamba2_chunk_scan": _mamba2,
    "mamba2_split_conv1d_scan_combined": _unfused,
}
"""Functions of transformers' modelling files → what they become under a tree."""


def _routed(stock: Callable[..., Any], under_a_tree: Callable[..., Any]) -> Callable[..., Any]:
    def routed(*args: Any, path_states: PathStates | None = None, **kwargs: Any) -> Any:
        if path_states is None:
            return stock(*args, **kwargs)
        return under_a_tree(stock, path_states, *args, **kwargs)

    return routed


def route_states(model: nn.Module) -> None:
    """Let the mixers of a model follow a `path_states`; without one they are as they were."""
    for file in {type(module).__module__ for module in model.modules()}:
        functions = vars(sys.modules[file])
        for name, under_a_tree in _ROUTES.items():
            if name in functions and getattr(functions[name], "__module__", None) != __name__:
                functions[name] = _routed(functions[name], under_a_tree)
