"""
Layers of the cache that `generate` goes on with, with room behind their keys and values.

transformers' own layers copy all keys and values for every token; these write the token into the room, and copy when
that is full. Room holds zeros, so that products may read it (`weights_copy.py`).
"""

from typing import Any

import torch
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionAndFullAttentionLayer

KeysValues = tuple[torch.Tensor, torch.Tensor]

# Columns at most that are left free when a layer is copied
_ROOM = 32


class _Growing:
    """Goes before a layer of transformers among the bases of one that grows."""

    keys: torch.Tensor | None
    values: torch.Tensor | None
    free: int = _ROOM  # columns left free when the layer is copied
    _rooms: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> KeysValues:
        if not self.is_initialized:  # type: ignore[attr-defined]
            self.lazy_initialization(key_states, value_states)  # type: ignore[attr-defined]
        keys_room, values_room = self._rooms or (None, None)
        keys_room, keys = _appended(self.keys, key_states, keys_room, self.free)
        values_room, values = _appended(self.values, value_states, values_room, self.free)
        self.keys, self.values, self._rooms = keys, values, (keys_room, values_room)
        return keys, values


def _appended(held: Any, states: torch.Tensor, room: torch.Tensor | None, free: int) -> KeysValues:
    """
    Write `states` behind `held`, into its `room` where that is left.

    Args:
        held (`torch.Tensor` of shape `(rows, heads, T, size)`): What the layer holds, a view of `room` unless another
            has put it there; empty where it holds nothing.
        states (`torch.Tensor` of shape `(rows, heads, new, size)`): What comes behind it.
        room (`torch.Tensor` of shape `(rows, heads, at least T, size)`, *optional*): Where `held` stands.
        free (`int`): Columns that a new room has beside those that it needs.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: the room, and the view of it that holds both.
    """
    rows, heads, new, size = states.shape
    seen = held.size(-2) if held.numel() else 0
    end = seen + new
    if room is None or room.data_ptr() != held.data_ptr() or room.size(-2) < end:
        room = states.new_zeros(rows, heads, end + free, size)
        if seen:
            room[:, :, :seen] = held
    room[:, :, seen:end] = states
    return room, room[:, :, :end]


class GrowingLayer(_Growing, DynamicLayer):
    pass


class GrowingHybrid(_Growing, LinearAttentionAndFullAttentionLayer):
    pass


class WholeWindow(_Growing, DynamicSlidingWindowLayer):
    """A sliding window that keeps what has left it. Attention is handed the window, as ever."""

    is_croppable = False  # `generate` must not cut it back to the window

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> KeysValues:
        self.cumulative_length += key_states.size(-2)
        keys, values = super().update(key_states, value_states)
        visible = self.sliding_window - 1 + key_states.size(-2)
        return keys[:, :, -visible:], values[:, :, -visible:]


def growing_layer(layer: Any, new_tokens: int | None = None) -> Any:
    """
    An empty layer that grows, in the place of one of transformers'; others stay. It has no more room than the
    `new_tokens` that it can get at most.
    """
    if type(layer) is DynamicSlidingWindowLayer:
        grown: Any = WholeWindow(layer.sliding_window)
    elif type(layer) is LinearAttentionAndFullAttentionLayer:
        grown = GrowingHybrid(layer.number_of_states)
    elif type(layer) is DynamicLayer:
        grown = GrowingLayer()
    else:
        return layer
    grown.free = _ROOM if new_tokens is None else min(_ROOM, new_tokens - 1)
    return grown
