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

import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from .prefix_tree import PrefixTree


class Level(NamedTuple):
    """
    Stretches of a tree that are scanned in one call.

    Args:
        slots (`np.ndarray` of shape `(stretches, tokens)`): Where their tokens stand in the pack; L for padding.
        parents (`np.ndarray` of shape `(stretches,)`): Which stretch of the level before each one goes on from; of no
            meaning in the first level.
    """

    slots: np.ndarray
    parents: np.ndarray


class PathStates:
    """
    Where the tokens of a packed tree find what stands before them.

    Args:
        tree ([`PrefixTree`]): What to scan.
    """

    def __init__(self, tree: PrefixTree):
        self.size = size = len(tree.input_ids)
        self.before = np.arange(-1, size - 1)  # the token before each one on its path, -1 for none
        for segment in tree.segments:
            self.before[segment.start] = tree.slots[segment.row][segment.depth - 1] if segment.depth else -1
        self.starts = np.array([segment.start for segment in tree.segments])
        self.levels = self._levels()
        laid_out = np.concatenate([level.slots.ravel() for level in self.levels])
        places = np.empty(size + 1, dtype=np.int64)  # of each token in what is laid out; the last is padding
        places[laid_out] = np.arange(len(laid_out))
        self.arrays: dict[Any, np.ndarray] = {"scan": laid_out, "scanned": places[:-1]}
        self.arrays |= {("parents", depth): level.parents for depth, level in enumerate(self.levels)}
        self.indices: dict[Any, torch.Tensor] = {}  # these on each device: layers of a split model run on several

    def _levels(self) -> list[Level]:
        # Cut where a segment begins, and behind each token that another segment goes on from
        forks = self.before[self.starts]
        cuts = np.union1d(self.starts, forks[forks >= 0] + 1)
        ends = np.r_[cuts[1:], self.size]
        parents = np.searchsorted(ends, self.before[cuts], side="right")  # of each stretch; unused for a root
        depths = np.zeros(len(cuts), dtype=np.int64)
        for stretch, parent in enumerate(parents):  # in depth-first order parents come first
            if self.before[cuts[stretch]] >= 0:
                depths[stretch] = depths[parent] + 1
        levels = []
        places = np.zeros(len(cuts), dtype=np.int64)  # of a stretch in its level
        for depth in range(depths.max() + 1):
            own = np.flatnonzero(depths == depth)
            places[own] = np.arange(len(own))
            lengths = ends[own] - cuts[own]
            tokens = np.arange(lengths.max())
            slots = np.where(tokens < lengths[:, None], cuts[own, None] + tokens, self.size)
            levels.append(Level(slots, places[parents[own]]))
        return levels

    def _index(self, name: Any, device: torch.device) -> torch.Tensor:
        if (name, device) not in self.indices:
            self.indices[name, device] = torch.from_numpy(self.arrays[name]).to(device)
        return self.indices[name, device]

    def _lay_behind_context(self, context: int) -> None:
        """Lay each segment behind the so many tokens before it; L stands where there are none."""
        ancestors: list[np.ndarray] = []
        slots = self.starts
        for _ in range(context):
            slots = np.where(slots >= 0, self.before[slots], -1)
            ancestors.insert(0, slots)
        ends = np.r_[self.starts[1:], self.size]
        parts = [
            np.r_[[slots[segment] for slots in ancestors], np.arange(start, end)].astype(np.int64)
            for segment, (start, end) in enumerate(zip(self.starts, ends, strict=True))
        ]
        laid_out = np.concatenate(parts)
        tokens = np.arange(self.size)
        self.arrays["convolution", context] = np.where(laid_out < 0, self.size, laid_out)
        self.arrays["convolved", context] = tokens + context * np.searchsorted(self.starts, tokens, side="right")

    def convolve(
        self, stock: Callable[..., torch.Tensor], states: torch.Tensor, weight: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """A causal convolution along paths; states are of shape `(1, channels, L)`."""
        context = weight.shape[-1] - 1
        if ("convolution", context) not in self.arrays:
            self._lay_behind_context(context)
        laid_out = F.pad(states, (0, 1)).index_select(2, self._index(("convolution", context), states.device))
        mixed = stock(laid_out, weight, *args, **kwargs)
        return mixed.index_select(2, self._index(("convolved", context), states.device))

    def scan(
        self, call: Callable[..., tuple[torch.Tensor, torch.Tensor]], inputs: tuple[torch.Tensor, ...]
    ) -> torch.Tensor:
        """
        Scan each level from the last states of the one before.

        Args:
            call (`Callable`): Takes the inputs of a level, of shape `(stretches, tokens, …)` and 0 for padding, and
                the states that they start from, or `None`; gives outputs and last states.
            inputs (`tuple[torch.Tensor, ...]`): Each of shape `(1, L, …)`.

        Returns:
            `torch.Tensor` of shape `(1, L, …)`
        """
        device = inputs[0].device
        index = self._index("scan", device)
        laid_out = [F.pad(x[0], (0, 0) * (x.dim() - 2) + (0, 1)).index_select(0, index) for x in inputs]
        parts = zip(*(x.split([level.slots.size for level in self.levels]) for x in laid_out), strict=True)
        outputs, states = [], None
        for depth, (level, own) in enumerate(zip(self.levels, parts, strict=True)):
            if states is not None:
                states = states.index_select(0, self._index(("parents", depth), device))
            output, states = call(*(x.unflatten(0, level.slots.shape) for x in own), states)
            outputs.append(output.flatten(0, 1))
        return torch.cat(outputs).index_select(0, self._index("scanned", device))[None]


def _convolution(stock: Callable[..., Any], paths: PathStates, *args: Any, **kwargs: Any) -> torch.Tensor:
    return paths.convolve(stock, *args, **kwargs)


def _gated_delta_rule(
    stock: Callable[..., Any],
    paths: PathStates,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    def call(query, key, value, g, beta, states):  # type: ignore[no-untyped-def]
        return stock(
            query, key, value, g=g, beta=beta, **kwargs | {"initial_state": states, "output_final_state": True}
        )

    # A token of zeros decays by exp(0) and writes 0 times 0
    return paths.scan(call, (query, key, value, g, beta)), None


def _mamba2(
    stock: Callable[..., Any],
    paths: PathStates,
    hidden_states: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    dt_bias: torch.Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    **kwargs: Any,
) -> torch.Tensor:
    def call(hidden_states, dt, B, C, states):  # type: ignore[no-untyped-def]
        return stock(hidden_states, dt, A, B, C, **kwargs | {"initial_states": states, "return_final_states": True})

    # A token whose time step is 0 leaves the state as it is, so time steps are made before there is padding; as in the
    # kernels, in float32
    steps = dt.float() if dt_bias is None else dt.float() + dt_bias.float()
    steps = (F.softplus(steps) if dt_softplus else steps).clamp(*dt_limit)
    return paths.scan(call, (hidden_states, steps, B, C))


def _unfused(stock: Callable[..., Any], paths: PathStates, *args: Any, **kwargs: Any) -> None:
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


def _mixing_functions(model: nn.Module) -> Iterator[tuple[dict[str, Any], str]]:
    for file in {type(module).__module__ for module in model.modules()}:
        functions = vars(sys.modules[file])
        yield from ((functions, name) for name in _ROUTES if name in functions)


def can_route_states(model: nn.Module) -> bool:
    """
    Whether the mixers of a model call functions that can be given a tree, rather than kernels that replace them, and
    hand on what they do not know. In some versions of transformers some do not (LFM2 in 5.17).
    """
    if getattr(model, "use_kernels", False) or not any(_mixing_functions(model)):
        return False
    methods = {method for module in model.modules() for method in vars(type(module)).values() if callable(method)}
    return all(_hands_on(method) for method in methods if _ROUTES.keys() & _names(method))


def _names(method: Callable[..., Any]) -> set[str]:
    """What a method calls."""
    return set(getattr(getattr(inspect.unwrap(method), "__code__", None), "co_names", ()))


def _hands_on(method: Callable[..., Any]) -> bool:
    return any(each.kind is each.VAR_KEYWORD for each in inspect.signature(method).parameters.values())


def route_states(model: nn.Module) -> None:
    """Let the mixers of a model follow a `path_states`; without one they are as they were."""
    for functions, name in _mixing_functions(model):
        if getattr(functions[name], "__module__", None) != __name__:
            functions[name] = _routed(functions[name], _ROUTES[name])
