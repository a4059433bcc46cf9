"""Layers of the cache of `generate` that have room for tokens to come."""

import pytest
import torch
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionAndFullAttentionLayer

from arpo_trl.rollout.engines.growing_layers import growing_layer
from arpo_trl.rollout.engines.weights_copy import one_query_attention


@pytest.mark.parametrize(
    "make", [DynamicLayer, lambda: DynamicSlidingWindowLayer(9), lambda: LinearAttentionAndFullAttentionLayer(1)]
)
def test_a_growing_layer_returns_what_one_of_transformers_does_and_is_rarely_copied(make):
    torch.manual_seed(0)
    own, theirs, rooms = growing_layer(make()), make(), set()
    for new in (5, *[1] * 60):
        states = torch.randn(2, 3, new, 4), torch.randn(2, 3, new, 4)
        for kind, (ours, expected) in enumerate(zip(own.update(*states), theirs.update(*states), strict=True)):
            seen = min(ours.size(-2), expected.size(-2))
            assert torch.equal(ours[:, :, -seen:], expected[:, :, -seen:]), (new, kind)
        rooms.add(own.keys.data_ptr())
    assert len(rooms) <= 2
    assert own.get_seq_length() == theirs.get_seq_length() == 65


def test_what_was_put_into_a_layer_is_left_as_it_is():
    held = torch.randn(2, 3, 7, 4)
    layer = growing_layer(DynamicLayer())
    DynamicLayer.lazy_initialization(layer, held, held)
    layer.keys = layer.values = held
    before, one = held.clone(), torch.randn(2, 3, 1, 4)
    keys, _ = layer.update(one, one)
    assert torch.equal(keys, torch.cat([before, one], dim=2)) and torch.equal(held, before)


@pytest.mark.parametrize("masked", [False, True])
def test_attention_of_one_query_does_not_see_the_room(masked):
    torch.manual_seed(0)
    layer = growing_layer(DynamicLayer())
    layer.update(torch.randn(2, 3, 7, 4), torch.randn(2, 3, 7, 4))
    keys, values = layer.update(torch.randn(2, 3, 1, 4), torch.randn(2, 3, 1, 4))
    assert not keys.is_contiguous()
    query = torch.randn(2, 6, 1, 4)
    mask = torch.rand(2, 1, 1, 8) < 0.7 if masked else None
    if mask is not None:
        mask[..., -1] = True
    ours, _ = one_query_attention(torch.nn.Module(), query, keys, values, mask)
    expected, _ = one_query_attention(torch.nn.Module(), query, keys.contiguous(), values.contiguous(), mask)
    torch.testing.assert_close(ours, expected)
