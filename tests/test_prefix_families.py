"""Each family whose rows may share prefixes, held to row by row: windows, sinks, soft caps, experts, states."""

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_families import EAGER, FAMILIES, LOAD_BALANCED, build, build_family, config_of
from packed_rows import (
    TOKENS_ONLY,
    assert_equal_in_double,
    assert_equal_to_row_by_row,
    batch,
    long_tree,
    shared,
    sharing_always,
    tools_tree,
    trees,
)

from arpo_trl.scoring import shared_prefix as prefix_sharing
from arpo_trl.scoring.path_states import PathStates
from arpo_trl.scoring.prefix_tree import pack
from arpo_trl.scoring.shared_prefix import MODEL_TYPES, forward_cost, has_states, shared_prefix_logps

pytestmark = pytest.mark.usefixtures("always_share")
WITH_STATES = sorted(family for family, config in FAMILIES.items() if has_states(config.get_text_config()))


def test_every_family_that_is_served_is_held_to_row_by_row():
    assert MODEL_TYPES == FAMILIES.keys()
    assert all(config.model_type == family for family, config in FAMILIES.items())


def test_the_docs_list_these_families():
    made = runpy.run_path(str(Path(__file__).parents[1] / "docs" / "make_models.py"), run_name="made")
    assert made["packed_table"]() in made["PAGE"].read_text("utf-8"), "run `python docs/make_models.py`"


@pytest.mark.parametrize("family", sorted(MODEL_TYPES))
def test_families(family):
    assert_equal_to_row_by_row(build_family(family), *tools_tree(vocab=36))


@pytest.mark.parametrize("family", sorted(MODEL_TYPES))
def test_families_in_double(family):
    # Weights large enough that every layer changes what is scored
    assert_equal_in_double(build_family(family, std=0.2, tie_word_embeddings=True), *tools_tree(vocab=36))


@pytest.mark.parametrize("family", WITH_STATES)
def test_states_of_long_stretches(family):
    assert_equal_to_row_by_row(build_family(family), *long_tree())
    assert_equal_in_double(build_family(family, std=0.2), *long_tree())


def test_mixers_that_hand_no_tree_on_are_scored_row_by_row(monkeypatch):
    """As LFM2's in some versions of transformers, which take what they know by its name."""
    model = build_family("lfm2")
    module = sys.modules[type(model).__module__]

    def forward(self, hidden_states, past_key_values=None, attention_mask=None, seq_idx=None):
        raise AssertionError(module.causal_conv1d_fn)

    monkeypatch.setattr(module.Lfm2ShortConv, "forward", forward)
    assert prefix_sharing.why_not_packed(model, torch.device("cpu")).code == "states"


@pytest.mark.parametrize("family", ["gemma3_text", "gpt_oss", "lfm2", "nemotron_h", "qwen3_5"])
def test_random_trees(family):
    model = build_family(family)

    @settings(max_examples=40, deadline=None)
    @given(rows=trees(), multiple=st.sampled_from([1, 8]))
    def holds(rows, multiple):
        if any(completion for _, completion in rows):
            with sharing_always():
                assert_equal_to_row_by_row(model, *batch(*zip(*rows, strict=True), pad_to_multiple_of=multiple))

    holds()


@pytest.mark.parametrize("family", LOAD_BALANCED)
def test_load_balancing_loss(family):
    assert_equal_to_row_by_row(build_family(family), *tools_tree(vocab=36), aux_loss=True)
    assert_equal_in_double(build_family(family, std=0.2), *tools_tree(vocab=36), aux_loss=True)


@settings(max_examples=40, deadline=None)
@given(rows=trees())
def test_load_balancing_loss_of_random_trees(rows):
    model = build_family("qwen3_moe")
    with sharing_always():
        assert_equal_to_row_by_row(model, *batch(*zip(*rows, strict=True)), aux_loss=True)


def test_load_balancing_loss_falls_back_where_it_takes_no_weights(monkeypatch):
    def of_two_dimensions(gates, experts, top_k, attention_mask=None):
        batch_size, sequence_length = attention_mask.shape

    monkeypatch.setattr(prefix_sharing, "load_balancing_loss_func", of_two_dimensions)
    prefix_sharing._load_balancing_loss_takes_weights.cache_clear()
    model = build_family("qwen3_moe")
    try:
        assert prefix_sharing.why_not_packed(model, torch.device("cpu"), aux_loss=True).code == "router_loss"
        assert shared_prefix_logps(model, *tools_tree(), compute_aux_loss=True) is None
        assert prefix_sharing.why_not_packed(model, torch.device("cpu")) is None
    finally:
        prefix_sharing._load_balancing_loss_takes_weights.cache_clear()


@pytest.mark.parametrize("family", sorted(set(MODEL_TYPES) - EAGER))
def test_eager_attention(family):
    assert_equal_to_row_by_row(build(config_of(family), "eager"), *tools_tree(vocab=36))


@pytest.mark.parametrize("family", ["gpt_oss", "gemma2"])
def test_eager_attention_in_several_blocks(family, monkeypatch):
    monkeypatch.setattr("arpo_trl.scoring.path_attention._BLOCK", 7)
    assert_equal_to_row_by_row(build_family(family), *tools_tree(vocab=36))


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("family", ["gpt_oss", "nemotron_h", "qwen3_5_text"])
def test_gradient_checkpointing(family, use_reentrant):
    model = build_family(family)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    model.train()
    assert_equal_to_row_by_row(model, *tools_tree(vocab=36))


def test_lora_on_layers_with_states():
    peft = pytest.importorskip("peft")
    modules = ["in_proj_qkv", "in_proj_a", "out_proj", "q_proj"]
    model = peft.get_peft_model(build_family("qwen3_5_text"), peft.LoraConfig(r=4, target_modules=modules))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at first, and then no gradient reaches A
            torch.nn.init.normal_(parameter, std=0.1)
    assert_equal_to_row_by_row(model, *tools_tree(vocab=36))


def test_a_routed_model_is_its_own_without_a_tree():
    for family in ("gpt_oss", "nemotron_h", "qwen3_5_text"):
        model = build_family(family).train()
        ids = torch.arange(3, 30)[None]
        before = model(ids).logits
        shared(model, *tools_tree(vocab=36))
        assert torch.equal(model(ids).logits, before)
        functions = vars(sys.modules[type(model).__module__])
        routed = dict(functions)
        shared(model, *tools_tree(vocab=36))
        assert functions == routed, "routed once"


def kept_bytes(model, rows):
    """Bytes of what a forward keeps for its gradient, parameters left out."""
    sizes = {}
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def pack_hook(tensor):
        if tensor.untyped_storage().data_ptr() not in parameters:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack_hook, lambda tensor: tensor):
        shared(model, *rows)
    return sum(sizes.values())


@pytest.mark.parametrize("family", ["gpt_oss", "gemma2", "gemma3_text", "qwen3_5_text"])
def test_what_is_kept_for_the_gradient_grows_with_the_length_alone(family):
    model = build_family(family, max_position_embeddings=8192)
    completions = [[6, *[7] * 300], [8, *[9] * 300]]
    kept = [kept_bytes(model, batch([[5] * length] * 2, completions)) for length in (1000, 2000, 3000)]
    first, second = kept[1] - kept[0], kept[2] - kept[1]
    assert second < 1.2 * first, "a square would add more the second time"


# The tree of states


def states_of(*rows):
    return PathStates(pack([np.array(row) for row in rows], [1] * len(rows), TOKENS_ONLY))


def test_levels_by_hand():
    # The second row shares a position with the first, and goes on from it; the third has no position before its own.
    # Slots:            0  1  2  3              4                        5
    paths = states_of([3, 4, 5, 6, 7], [3, 4, 8], [9, 9])
    assert paths.before.tolist() == [-1, 0, 1, 2, 0, -1]
    roots, leaves = paths.levels
    assert roots.slots.tolist() == [[0], [5]]
    assert leaves.slots.tolist() == [[1, 2, 3], [4, 6, 6]] and leaves.parents.tolist() == [0, 0]  # 6 is padding


@settings(max_examples=150, deadline=None)
@given(trees())
def test_a_scan_sees_the_path_of_each_token(rows):
    ids = [np.array(prompt + completion) for prompt, completion in rows]
    if not any(completion for _, completion in rows):
        return
    tree = pack(ids, [len(prompt) for prompt, _ in rows], TOKENS_ONLY)
    values = torch.from_numpy(np.random.default_rng(0).normal(size=(1, len(tree.input_ids), 1)))

    def call(x, start):  # a scan whose state is the sum of what it has read
        sums = x.cumsum(1) if start is None else x.cumsum(1) + start[:, None]
        return sums, sums[:, -1]

    paths = PathStates(tree)
    sums = paths.scan(call, (values,))
    read = paths.convolve(
        lambda x, weight: torch.nn.functional.conv1d(torch.nn.functional.pad(x, (weight.shape[-1] - 1, 0)), weight)[
            ..., : x.shape[-1]
        ],
        values.transpose(1, 2),
        torch.tensor([[[1.0, 10.0, 100.0]]], dtype=torch.float64),
    )
    for slots in tree.slots:
        own = values[0, slots, 0]
        torch.testing.assert_close(sums[0, slots, 0], own.cumsum(0))
        behind = torch.nn.functional.pad(own, (2, 0))
        torch.testing.assert_close(read[0, 0, slots], behind[:-2] + 10 * behind[1:-1] + 100 * behind[2:])


def test_cost_of_windows_and_states_by_hand():
    # One layer with a window of 6, one without: a new token reads 6 keys in one and the whole path in the other
    cost = forward_cost(FAMILIES["gemma3_text"], "cuda")
    assert (cost.window, cost.windowed, cost.pair) == (6, 4 * 32, 4 * 32)
    assert cost.row(2, 100) == 2 * cost.token + (2 * 100 - 0.5 * 4) * 128 + 2 * 6 * 128 + cost.call
    # A layer with states has no pairs
    assert forward_cost(FAMILIES["qwen3_5_text"], "cpu").pair == 4 * 32


def test_states_in_kernels_of_the_hub_are_refused(monkeypatch):
    model = build_family("qwen3_5_text")
    monkeypatch.setattr(type(model), "use_kernels", True)
    assert prefix_sharing.unsupported_reason(model, torch.device("cpu")).code == "states"
    assert shared_prefix_logps(model, *tools_tree()) is None


@pytest.mark.parametrize("family", sorted(MODEL_TYPES))
def test_every_family_has_a_cost(family):
    cost = forward_cost(config_of(family).get_text_config(), "cpu")
    assert cost.token > 0 and cost.call > 0 and cost.pair + cost.windowed > 0
    assert (cost.windowed > 0) == (cost.window > 0)


def test_attention_in_both_directions_is_refused():
    model = build(config_of("gemma3_text", use_bidirectional_attention=True))
    reason = prefix_sharing.unsupported_reason(model, torch.device("cpu"))
    assert reason.code == "attention" and "follow" in reason.text
