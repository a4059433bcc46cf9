"""
The layers of transformers' caches, by what they hold of the tokens that they have read.

- Full attention: keys and values of every token.
- Sliding windows: the same; they are kept whole, and the model sees the window (`WholeWindow`).
- Linear attention and convolutions: a state of the tokens so far, of one size whatever their number. It cannot be cut
  back, so it is copied at the places where it will be needed (`EndStates`).
- Layers without a cache, and those that use another layer's: nothing.

Tokens are read into tensors that stand as `generate` will need them, every row ending in the last column
(`read_into`). Layers that `generate` goes on with have room for tokens to come (`growing_layers.py`).
"""

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import (
    DynamicCache,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
    cache_utils,
)
from transformers.cache_utils import (
    Cache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionLayer,
)

from .growing_layers import KeysValues, growing_layer

# A layer that caches nothing, which older transformers do not have
_EMPTY = tuple(getattr(cache_utils, name) for name in ("DummyLayer",) if hasattr(cache_utils, name))

# What a model calls its cache: transformers renamed it
CACHE = (
    "cache"
    if "cache" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    else "past_key_values"
)

State = list[torch.Tensor | None]  # convolution and recurrent states of all layers, in order, of shape `(rows, …)`


class Found(NamedTuple):
    """The known prefix of a context: in which block and row of it, and how many tokens."""

    block: int
    row: int
    length: int


class Block(NamedTuple):
    """
    Keys and values of some rows.

    Args:
        layers (`list[tuple[torch.Tensor, torch.Tensor] | None]`): Keys and values of each layer, of shape
            `(rows, heads, positions, head_dim)`; `None` for a layer without.
        starts (`list[int]`): Position of each row's first token.
        rows (`list[np.ndarray]`): Tokens of each row, which stand at consecutive positions.
    """

    layers: list[KeysValues | None]
    starts: list[int]
    rows: list[np.ndarray]


class Part(NamedTuple):
    """
    What one forward reads.

    Args:
        rows (`list[int]`): The rows that take part.
        ends (`list[int]`): The column that follows the last token read of each.
        new (`int`): Tokens that each reads.
        seen (`int`): Columns that each sees, those that it reads included.
    """

    rows: list[int]
    ends: list[int]
    new: int
    seen: int


class _Reading:
    """A layer that writes the keys and values of one `Part` into those of all rows, and keeps none of its own."""

    keys: torch.Tensor | None
    values: torch.Tensor | None

    def place(self, keys_values: KeysValues | None, part: Part, rows: int, width: int) -> None:
        self.keys, self.values = keys_values or (None, None)
        self.is_initialized = True
        self.part, self.rows, self.width = part, rows, width
        self.cumulative_length = part.seen - part.new

    def get_seq_length(self) -> int:
        return self.part.seen - self.part.new

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> KeysValues:
        if self.keys is None or self.values is None:
            self.keys, self.values = self._empty(key_states), self._empty(value_states)
        return self._written(self.keys, key_states), self._written(self.values, value_states)

    def _empty(self, states: torch.Tensor) -> torch.Tensor:
        return states.new_zeros(self.rows, states.size(1), self.width, states.size(3))

    def _written(self, whole: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        part = self.part
        seen = min(part.seen, getattr(self, "sliding_window", part.seen) - 1 + part.new)
        rows = None if len(part.rows) == self.rows else torch.tensor(part.rows, device=whole.device)
        if len(set(part.ends)) == 1:
            end = part.ends[0]
            if rows is None:
                whole[:, :, end - part.new : end] = states
                return whole[:, :, end - seen : end]
            whole[:, :, end - part.new : end].index_copy_(0, rows, states)
            return whole[:, :, end - seen : end].index_select(0, rows)
        index = torch.tensor(part.rows, device=whole.device).unsqueeze(1)
        ends = torch.tensor(part.ends, device=whole.device).unsqueeze(1)
        columns = ends + torch.arange(-seen, 0, device=whole.device)
        whole[index, :, columns[:, -part.new :]] = states.transpose(1, 2)
        # What stands before a row's start is masked, so any column does
        return whole[index, :, columns.clamp(min=0)].transpose(1, 2)


class _ReadLayer(_Reading, DynamicLayer):
    pass


class _ReadWindow(_Reading, DynamicSlidingWindowLayer):
    pass


class _ReadHybrid(_Reading, LinearAttentionAndFullAttentionLayer):
    pass


_READ: dict[type, type] = {
    DynamicLayer: _ReadLayer,
    DynamicSlidingWindowLayer: _ReadWindow,
    LinearAttentionAndFullAttentionLayer: _ReadHybrid,
}
_KNOWN = (*_READ, LinearAttentionLayer, *_EMPTY)


def _layers(config: PreTrainedConfig) -> list[Any]:
    """The layers of the cache that `generate` would make."""
    return DynamicCache(config=config.get_text_config(decoder=True)).layers


def layers_obstacle(model: PreTrainedModel) -> str | None:
    """Why the layers of the model's cache cannot be kept; `None` if they can."""
    layers = _layers(model.config)
    unknown = sorted({type(layer).__name__ for layer in layers if type(layer) not in _KNOWN})
    if unknown:
        return f"the model has cache layers that are not known here: {', '.join(unknown)}"
    if not any(isinstance(layer, DynamicLayer) for layer in layers):
        return "the model has no attention layer, so its cache does not count tokens"
    if model._is_stateful and not is_recurrent(model.config):
        return f"a `{model.config.get_text_config().model_type}` model keeps a state outside its cache"
    return None


def is_recurrent(config: PreTrainedConfig) -> bool:
    """Whether the cache holds states, which are known at some places of a row alone."""
    return any(isinstance(layer, LinearAttentionLayer) for layer in _layers(config))


def keys_values_of(cache: Cache) -> list[KeysValues | None]:
    """The keys and values of a cache, layer by layer."""
    return [None if getattr(layer, "keys", None) is None else (layer.keys, layer.values) for layer in cache.layers]


def states_of(cache: Cache) -> State:
    """The states of a cache."""
    return [
        states[index]
        for layer in cache.layers
        if isinstance(layer, LinearAttentionLayer)
        for states in (layer.conv_states, layer.recurrent_states)
        for index in range(layer.number_of_states)
    ]


def _set_states(cache: Cache, state: State) -> None:
    """Let a cache go on from `state`."""
    left = iter(state)
    for layer in cache.layers:
        if not isinstance(layer, LinearAttentionLayer):
            continue
        for index in range(layer.number_of_states):
            layer.conv_states[index] = conv = next(left)
            if conv is not None:
                layer.device, layer.dtype = conv.device, conv.dtype
                layer.conv_kernel_size[index] = conv.size(-1)
                layer.is_conv_states_initialized[index] = True
            layer.has_previous_state[index] = True
        for index in range(layer.number_of_states):
            layer.recurrent_states[index] = recurrent = next(left)
            layer.is_recurrent_states_initialized[index] = recurrent is not None


def _rows_of(state: State, rows: Sequence[int]) -> State:
    """A copy of some rows of a state."""
    return [None if part is None else part[torch.tensor(rows, device=part.device)] for part in state]


def _put(state: State, rows: list[int], values: State, size: int) -> State:
    """`state` of `size` rows (`[]` if there is none yet) with those of `rows` replaced."""
    if len(rows) == size:
        return values
    state = state or [None if part is None else part.new_zeros(size, *part.shape[1:]) for part in values]
    for whole, part in zip(state, values, strict=True):
        if whole is not None and part is not None:
            whole[torch.tensor(rows, device=whole.device)] = part
    return state


def joined(states: dict[int, State], size: int) -> State:
    """The states of some rows as one of `size` rows; `[]` of none."""
    if not states:
        return []
    parts = zip(*states.values(), strict=True)
    return _put([], list(states), [None if part[0] is None else torch.cat(part) for part in parts], size)


def rows_apart(state: State, rows: Sequence[int]) -> list[State]:
    """Copies of some rows of a state, each on its own."""
    return [_rows_of(state, [row]) for row in rows]


def states_taken(cache: Cache, rows: Sequence[int]) -> list[State]:
    """
    The states of some rows, each on its own; the cache loses its states, so that no more than a layer stands twice.
    """
    taken: list[State] = [[] for _ in rows]
    for layer in cache.layers:
        if not isinstance(layer, LinearAttentionLayer):
            continue
        for states in (layer.conv_states, layer.recurrent_states):
            for index in range(layer.number_of_states):
                whole, states[index] = states[index], None
                for row, own in zip(rows, taken, strict=True):
                    own.append(None if whole is None else whole[row : row + 1].clone())
    return taken


class Target(NamedTuple):
    """
    Where known prefixes are copied to: `found[i]` into row `i`, so that it ends before column `ends[i]` of `width`.
    """

    found: Sequence[Found]
    ends: Sequence[int]
    width: int


def gathered(
    blocks: Sequence[Block], targets: Sequence[Target], release: bool = False
) -> list[list[KeysValues | None]]:
    """
    The keys and values of each target, layer by layer. With `release` a layer of the blocks is freed once it has been
    copied, so that memory never holds two caches. Where nothing is known a target's layers are `None`.
    """
    made: list[list[KeysValues | None]] = [[] for _ in targets]
    for layer in range(max((len(block.layers) for block in blocks), default=0)):
        for target, layers in zip(targets, made, strict=True):
            layers.append(_gathered_layer(blocks, target, layer))
        if release:
            for block in blocks:
                block.layers[layer] = None
    return made


def _gathered_layer(blocks: Sequence[Block], target: Target, layer: int) -> KeysValues | None:
    both: list[torch.Tensor] = []
    for kind in range(2):
        for row, (place, end) in enumerate(zip(target.found, target.ends, strict=True)):
            source = blocks[place.block].layers[layer] if place.length else None
            if source is None:
                continue
            states = source[kind]
            if len(both) == kind:
                both.append(states.new_zeros(len(target.found), states.size(1), target.width, states.size(3)))
            start = blocks[place.block].starts[place.row]
            both[kind][row, :, end - place.length : end] = states[place.row, :, start : start + place.length]
    return (both[0], both[1]) if both else None


def parts_to_read(lengths: Sequence[int], known: Sequence[int], width: int, recurrent: bool) -> list[Part]:
    """
    How to read the rest of each row in few forwards.

    Attention takes one: a row whose rest is short reads some tokens again. A state goes on from where it is, and
    padding would change it: rows that have one read together as many tokens as each still lacks. Where many lengths
    meet, these are powers of two, so that there are no more forwards than bits in the longest rest. Rows without a
    state are padded on the left, as by `generate`.

    Args:
        lengths (`Sequence[int]`): Tokens of each row, which ends before column `width`.
        known (`Sequence[int]`): How many of them are known.
        width (`int`): Columns.
        recurrent (`bool`): Whether the model has states.
    """
    rests = [length - before for length, before in zip(lengths, known, strict=True)]
    parts = []

    def add(rows: list[int], ends: list[int], new: int) -> None:
        seen = max(lengths[row] - (width - end) for row, end in zip(rows, ends, strict=True))
        parts.append(Part(rows, ends, new, max(seen, new)))

    fresh = [row for row, rest in enumerate(rests) if rest and (not known[row] or not recurrent)]
    if fresh:
        add(fresh, [width] * len(fresh), max(rests[row] for row in fresh))
    going = [row for row, rest in enumerate(rests) if rest and row not in set(fresh)]
    steps = sorted({rests[row] for row in going})
    if steps and len(steps) > steps[-1].bit_length():
        for bit in reversed(range(steps[-1].bit_length())):
            if rows := [row for row in going if rests[row] >> bit & 1]:
                add(rows, [width - rests[row] % (1 << bit) for row in rows], 1 << bit)
    else:
        for before, step in zip([0, *steps], steps, strict=False):
            rows = [row for row in going if rests[row] >= step]
            add(rows, [width - rests[row] + step for row in rows], step - before)
    return parts


def read_into(
    model: PreTrainedModel,
    rows: Sequence[np.ndarray],
    known: Sequence[int],
    layers: list[KeysValues | None],
    state: State,
    width: int,
) -> State:
    """
    Read the unknown rest of each row.

    Args:
        model ([`~transformers.PreTrainedModel`]): The model that reads.
        rows (`Sequence[np.ndarray]`): Tokens of each row.
        known (`Sequence[int]`): How many of them are known.
        layers (`list[tuple[torch.Tensor, torch.Tensor] | None]`): Keys and values of all rows, each row ending before
            column `width`; completed in place.
        state (`State`): For a model with states, those of all rows after their known tokens, `[]` where nothing is
            known of any ([`joined`]).
        width (`int`): Columns.

    Returns:
        `State`: the states of all rows; `[]` for a model without.
    """
    config = model.config.get_text_config(decoder=True)
    recurrent = is_recurrent(config)
    lengths = [len(row) for row in rows]
    tokens = np.zeros((len(rows), width), dtype=np.int64)
    for row, ids in enumerate(rows):
        tokens[row, width - len(ids) :] = ids
    # Only keys, values and states are wanted. A slice of nothing rather than a number: what is sliced off for a number
    # is not contiguous, and torch then copies the head's weight for each row in half precision on a CPU. It is no
    # tensor, since the last layer of a model that is split over devices is on another one than the tokens.
    no_logits = slice(0, 0)
    for part in parts_to_read(lengths, known, width, recurrent):
        cache = DynamicCache(config=config)
        for index, layer in enumerate(cache.layers):
            if type(layer) in _READ:
                cache.layers[index] = reading = _READ[type(layer)](
                    sliding_window=getattr(layer, "sliding_window", None),
                    number_of_states=getattr(layer, "number_of_states", 1),
                )
                reading.place(layers[index] if layers else None, part, len(rows), width)
        if recurrent and known[part.rows[0]]:
            _set_states(cache, state if len(part.rows) == len(rows) else _rows_of(state, part.rows))
        ends = np.array(part.ends)[:, None]
        starts = np.array([width - lengths[row] for row in part.rows])[:, None]
        columns = ends + np.arange(-part.seen, 0)
        new = columns[:, -part.new :]
        model(
            input_ids=torch.from_numpy(tokens[np.array(part.rows)[:, None], new]).to(model.device),
            attention_mask=torch.from_numpy((columns >= starts).astype(np.int64)).to(model.device),
            position_ids=torch.from_numpy((new - starts).clip(min=0)).to(model.device),
            use_cache=True,
            logits_to_keep=no_logits,
            **{CACHE: cache},
        )
        layers[:] = keys_values_of(cache)
        if recurrent:
            state = _put(state, part.rows, states_of(cache), len(rows))
    return state


def generation_cache(
    config: PreTrainedConfig, layers: Sequence[KeysValues | None], state: State, new_tokens: int | None
) -> DynamicCache:
    """
    The cache from which `generate` goes on: `layers` as they stand, with `state` and room for at most `new_tokens`.
    """
    cache = DynamicCache(config=config.get_text_config(decoder=True))
    for index, keys_values in enumerate(layers):
        layer = cache.layers[index]
        cache.layers[index] = layer = growing_layer(layer, new_tokens)
        if keys_values is None:
            continue
        DynamicLayer.lazy_initialization(layer, *keys_values)
        layer.keys, layer.values = keys_values
        if isinstance(layer, DynamicSlidingWindowLayer):
            layer.cumulative_length = layer.keys.size(-2)
    if state:
        _set_states(cache, state)
    return cache


def forget_positions(model: PreTrainedModel) -> None:
    """
    Let a vision-language model compute the positions of rows of text anew: one that goes on from a cache adds what
    images shifted in its latest `generate`, whose rows were others.
    """
    for module in model.modules():
        if getattr(module, "rope_deltas", None) is not None:
            module.rope_deltas = None


class EndStates(StoppingCriteria):
    """
    Copies the state of each row when it ends, since `generate` goes on with it as long as any row goes on. Ends
    nothing.

    Args:
        criteria ([`~transformers.StoppingCriteriaList`]): What ends a row beside its end-of-turn tokens.
        ends (`Sequence[int]`): The end-of-turn tokens.
        cache ([`~transformers.DynamicCache`]): The cache of the rows.

    Attributes:
        states (`dict[int, tuple[int, State]]`): For each row that has ended, the columns that had been read by then
            (all but the token that was just sampled), and its state.
    """

    def __init__(self, criteria: StoppingCriteriaList, ends: Sequence[int], cache: DynamicCache):
        self.criteria, self.ends, self.cache = criteria, list(ends), cache
        self.states: dict[int, tuple[int, State]] = {}

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> torch.Tensor:
        done = self.criteria(input_ids, scores, **kwargs)
        over = done | torch.isin(input_ids[:, -1], torch.tensor(self.ends, device=input_ids.device))
        for row, is_over in enumerate(over.tolist()):
            if is_over and row not in self.states:
                self.states[row] = (input_ids.size(1) - 1, _rows_of(states_of(self.cache), [row]))
        return done
