import itertools
import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_families import FAMILIES, SHAPE, build
from packed_rows import (
    TOKENS_ONLY,
    assert_equal_to_row_by_row,
    batch,
    relative_error,
    results,
    row_by_row,
    shared,
    tools_tree,
    trees,
)
from peak_bytes import PeakBytes
from torch.nn.attention.bias import CausalBias, CausalVariant
from torch.nn.attention.flex_attention import flex_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, Qwen2Config, Qwen3Config, Starcoder2Config
from transformers import modeling_flash_attention_utils as flash_utils
from transformers.integrations.flex_attention import WrappedFlexAttention

from arpo_trl.scoring import path_attention
from arpo_trl.scoring import shared_prefix as prefix_sharing
from arpo_trl.scoring.path_attention import PathAttention
from arpo_trl.scoring.prefix_tree import Cost, group_order, pack, shared_prefixes, sibling_order
from arpo_trl.scoring.shared_prefix import forward_cost, shared_prefix_logps

QWEN3 = FAMILIES["qwen3"]


def test_shared_prefixes_by_hand():
    rows = [np.array(row) for row in ([1, 2, 3], [9], [1, 2, 4, 5], [1, 2, 3], [1, 2])]
    order, lengths = shared_prefixes(rows)
    assert [rows[row].tolist() for row in order] == [[1, 2], [1, 2, 3], [1, 2, 3], [1, 2, 4, 5], [9]]
    assert order == [4, 0, 3, 2, 1]
    assert lengths == [0, 2, 3, 2, 0]
    assert shared_prefixes([]) == ([], [])


def test_pack_by_hand():
    # Prompt 5 6; the rows agree up to token 7 and part after it, so 7 stands once for each of them.
    rows = [np.array([5, 6, 7, 8, 9]), np.array([5, 6, 7, 3]), np.array([5, 6, 7, 3]), np.array([5, 6])]
    tree = pack(rows, [2, 2, 2, 2], TOKENS_ONLY)
    assert tree.input_ids.tolist() == [5, 6, 7, 7, 8]
    assert tree.position_ids.tolist() == [0, 1, 2, 2, 3]
    assert tree.labels.tolist() == [-100, 7, 3, 8, 9]
    assert [slots.tolist() for slots in tree.slots] == [[0, 1, 3, 4], [0, 1, 2], [0, 1, 2], []]
    assert tree.subtree_ends().tolist() == [5, 5, 3, 5, 5]
    assert tree.cost == 5


@pytest.mark.parametrize("causal, flops", [(1.0, 190 + 170), (0.5, 149.5 + 145.5)])
def test_cost_of_a_tree_by_hand(causal, flops):
    # Two rows of 9 positions that share 2. The first costs 9 tokens and 81 pairs, or 40.5 where the kernel leaves out
    # what a causal mask hides; the second 7 tokens and 7 x 9 pairs, or 24.5 less, those that its own 7 x 7 mask hides.
    rows = [np.arange(10), np.array([0, 1, 2, *range(20, 27)])]
    tree = pack(rows, [1, 1], Cost(token=1, pair=1, call=100, causal=causal))
    assert [segment.depth for segment in tree.segments] == [0, 2]
    assert tree.cost == flops


@given(trees())
def test_every_position_stands_once_and_sees_its_ancestors(rows):
    ids = [np.array(prompt + completion) for prompt, completion in rows]
    tree = pack(ids, [len(prompt) for prompt, _ in rows], TOKENS_ONLY)
    scored = [row for row, (_, completion) in enumerate(rows) if completion]
    distinct = {tuple(ids[row][: position + 2]) for row in scored for position in range(len(ids[row]) - 1)}
    assert len(tree.input_ids) == len(distinct) == tree.cost
    sees = np.tril(np.ones((len(distinct),) * 2, dtype=bool))
    sees &= np.arange(len(distinct))[:, None] < tree.subtree_ends()[None, :]
    for row in scored:
        slots = tree.slots[row]
        assert tree.input_ids[slots].tolist() == ids[row][:-1].tolist()
        assert tree.position_ids[slots].tolist() == list(range(len(slots)))
        assert tree.labels[slots][len(rows[row][0]) - 1 :].tolist() == rows[row][1]
        for position, slot in enumerate(slots):
            assert np.flatnonzero(sees[slot]).tolist() == slots[: position + 1].tolist()


@pytest.fixture(scope="module")
def qwen3():
    return build(QWEN3)


@settings(max_examples=150, deadline=None)
@given(rows=trees(), multiple=st.sampled_from([1, 8]))
def test_random_trees_score_as_row_by_row(qwen3, rows, multiple):
    ids, mask, length = batch(*zip(*rows, strict=True), pad_to_multiple_of=multiple)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefix_sharing, "forward_cost", lambda config, device_type: TOKENS_ONLY)
        patch.setattr(prefix_sharing, "_MARGIN", float("inf"))
        if not any(completion for _, completion in rows):
            assert shared_prefix_logps(qwen3, ids, mask, length) is None
        else:
            assert_equal_to_row_by_row(qwen3, ids, mask, length)


def test_qwen2_with_sliding_windows(always_share):
    config = Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=5, max_window_layers=1)
    assert "sliding_attention" in config.layer_types
    assert_equal_to_row_by_row(build(config), *tools_tree())


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant, always_share):
    model = build(QWEN3)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    model.train()
    assert_equal_to_row_by_row(model, *tools_tree())


def test_lora(always_share):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(build(QWEN3), peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"]))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at first, and then no gradient reaches A
            torch.nn.init.normal_(parameter, std=0.1)
    assert_equal_to_row_by_row(model, *tools_tree())


def test_ddp(tmp_path, always_share):
    store = f"file://{tmp_path}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        assert_equal_to_row_by_row(torch.nn.parallel.DistributedDataParallel(build(QWEN3)), *tools_tree())
    finally:
        torch.distributed.destroy_process_group()


def test_bfloat16_is_within_its_own_noise(always_share):
    exact = results(row_by_row, build(QWEN3), *tools_tree())
    model = build(QWEN3, dtype=torch.bfloat16)
    noisy, packed = (results(score, model, *tools_tree()) for score in (row_by_row, shared))
    for rounded, value, reference in zip(noisy[0], packed[0], exact[0], strict=True):
        noise = relative_error(rounded, reference)
        assert 0 < noise and relative_error(value, reference) <= 1.5 * noise
    noise, error = (
        torch.stack([(side[1][name] - exact[1][name]).norm() for name in exact[1]]).norm() for side in (noisy, packed)
    )
    assert 0 < noise and error <= 1.5 * noise


def test_no_grad_and_no_entropy(qwen3, always_share):
    ids, mask, length = tools_tree()
    with torch.no_grad():
        logps, entropies, aux_loss = shared_prefix_logps(qwen3, ids, mask, length)
        expected = row_by_row(qwen3, ids, mask, length)[0]
    assert entropies is None and aux_loss is None and not logps.requires_grad
    torch.testing.assert_close(logps, expected, rtol=1e-5, atol=1e-5)


def test_generation_is_untouched_once_sdpa_is_routed(qwen3, always_share):
    prompt = torch.tensor([[5, 6, 7]])
    fresh = build(QWEN3, attention="eager").generate(prompt, max_new_tokens=8, do_sample=False)
    shared(qwen3, *tools_tree())
    assert qwen3.generate(prompt, max_new_tokens=8, do_sample=False).tolist() == fresh.tolist()


def test_declined_where_nothing_is_shared_and_nothing_padded(qwen3):
    ids = torch.arange(4 * 40).reshape(4, 40) % 37 + torch.arange(4)[:, None]
    assert shared_prefix_logps(qwen3, ids, torch.ones_like(ids), 30) is None


def test_packed_whatever_the_cost_where_asked_for(qwen3, monkeypatch):
    monkeypatch.setattr(prefix_sharing, "_MARGIN", 0.0)
    ids, mask, length = tools_tree()
    assert shared_prefix_logps(qwen3, ids, mask, length) is None
    for rows in (slice(None), slice(6, 8), slice(0, 1)):  # a tree, one prompt, a row alone
        logps = shared_prefix_logps(qwen3, ids[rows], mask[rows], length, only_if_cheaper=False)[0]
        expected = row_by_row(qwen3, ids[rows], mask[rows], length)[0]
        assert relative_error(logps, expected) <= 1e-5


class Elsewhere:
    """Values on another device: they are cut by numbers and brought back, but no index of this device reads them."""

    def __init__(self, values):
        self.values = values

    def __getitem__(self, index):
        assert isinstance(index, int), "indices should be either on cpu or on the same device"
        return Elsewhere(self.values[index])

    def to(self, device):
        assert device == torch.device("cpu")
        return self.values


def test_scores_come_back_from_the_device_of_the_head(always_share, monkeypatch):
    model = build(QWEN3)
    ids, mask, length = tools_tree()
    expected = shared(model, ids, mask, length)
    forward = model.forward

    def head_elsewhere(**inputs):
        outputs = forward(**inputs)
        return SimpleNamespace(log_probs=Elsewhere(outputs.log_probs), entropy=Elsewhere(outputs.entropy))

    monkeypatch.setattr(model, "forward", head_elsewhere)
    for value, reference in zip(shared(model, ids, mask, length)[:2], expected[:2], strict=True):
        assert torch.equal(value, reference)


def masks_of(attention, device, dtype=torch.float32, window=None, heads=1):
    """The masks that the rows of a tree are attended with."""
    states = torch.zeros(1, heads, sum(attention.query_sizes), 8, device=device, dtype=dtype)
    masks = []

    def attend(module, query, key, value, mask, **kwargs):
        masks.append(mask)
        return query.transpose(1, 2), None

    class Kernel(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function is torch.nn.functional.scaled_dot_product_attention:
                masks.append(kwargs["attn_mask"])
                return args[0]
            return function(*args, **(kwargs or {}))

    with Kernel():
        attention(attend, None, states, states, states, sliding_window=window)
    return [mask for mask in masks if mask is not None]


def fork(prompt=2, completion=3):
    rows = [np.r_[np.arange(prompt), np.full(completion, 40 + row)] for row in (0, 1)]
    return PathAttention(pack(rows, [prompt, prompt], TOKENS_ONLY))


@pytest.mark.parametrize("window", [None, 2])
def test_each_layer_has_its_masks_on_its_own_device(window):
    attention = fork()
    for device in ("cpu", "meta", "cpu"):
        masks = masks_of(attention, device, window=window)
        assert masks and all(mask.device.type == device for mask in masks)


def test_masks_are_of_the_dtype_that_autocast_attends_in():
    with torch.autocast("cpu", torch.bfloat16):
        assert {mask.dtype for mask in masks_of(fork(), "cpu")} == {torch.bfloat16}
    assert {mask.dtype for mask in masks_of(fork(), "cpu")} == {torch.float32}


@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_autocast_reads_each_state_into_its_own_dtype_once(key_heads):
    rows = [np.r_[np.arange(300), np.full(300, 40 + row)] for row in range(3)]
    attention = PathAttention(pack(rows, [300] * 3, TOKENS_ONLY))
    length, cast = sum(attention.query_sizes), []
    states = [torch.zeros(1, heads, length, 8) for heads in (4, key_heads, key_heads)]

    class Casts(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            made = function(*args, **(kwargs or {}))
            if function is torch.ops.aten._to_copy.default and made.dtype == torch.bfloat16:
                cast.append(tuple(made.shape))
            return made

    def attend(module, query, key, value, mask, **kwargs):
        return query.transpose(1, 2), None

    with torch.autocast("cpu", torch.bfloat16), Casts():
        attention(attend, None, *states)
    assert cast == [tuple(state.shape) for state in states], "keys of grouped queries are not repeated before"


@pytest.mark.parametrize("window", [None, 100])
def test_masks_are_strips_whatever_the_length(window):
    sizes = []
    for length in (2000, 4000):
        attention = fork(prompt=length, completion=1200)
        masks = masks_of(attention, "meta", window=window)
        assert len({mask.untyped_storage().data_ptr() for mask in masks}) == 1, "views of one strip"
        assert {mask.shape[0] for mask in masks} <= {256, 1200 % 256, *[(length + 1199) % 256]}
        sizes.append(sum(strip.nbytes for strip in attention.strips.values()))
    if window is None:
        assert sizes == [256 * (length + 1199) * 4 for length in (2000, 4000)]  # a line for each query of a block
    else:
        assert sizes == [256 * (256 + 100) * 4] * 2


@pytest.mark.parametrize("window", [None, 512])
def test_memory_of_attention_grows_with_the_length_alone(window):
    """A row of 4k, 8k and 16k tokens that is forked at its half, forward and backward, counted beside its inputs."""

    def attend(module, query, key, value, mask, **kwargs):
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(
            1, 2
        ), None

    def peak(length: int) -> int:
        rows = [np.arange(length), np.r_[np.arange(length // 2), np.full(length // 2, 10**6)]]
        attention = PathAttention(pack(rows, [1, 1], TOKENS_ONLY))
        states = [torch.randn(1, 2, sum(attention.query_sizes), 16, requires_grad=True) for _ in range(3)]
        with PeakBytes() as counted:
            torch.autograd.grad(attention(attend, None, *states, sliding_window=window)[0].sum(), states)
        return counted.peak

    few, more, many = peak(4096), peak(8192), peak(16_384)
    assert more < 2.05 * few and many < 2.05 * more


def test_a_kernel_with_a_mask_of_its_own_needs_none(monkeypatch):
    # The device's kernel is not here; what it is called with is
    class Gpu:
        type = "cuda"

    calls = []

    def kernel(query, key, value, attn_mask, **options):
        calls.append((attn_mask, key.shape[1], options["enable_gqa"]))
        return query

    monkeypatch.setattr(path_attention.F, "scaled_dot_product_attention", kernel)
    attention = fork(prompt=600, completion=600)
    for flash, key_heads in ((True, 2), (False, 4)):
        monkeypatch.setattr(path_attention, "can_use_flash_attention", lambda parameters, flash=flash: flash)
        monkeypatch.setattr(path_attention, "SDPAParams", lambda *args: args)
        query = SimpleNamespace(shape=(1, 4, 600, 8), device=Gpu)
        key = torch.zeros(1, 2, 1199, 8)
        attention._lower_right(query, key, key, None, {"dropout_p": 0.0, "scale": None})
        mask, heads, enable_gqa = calls.pop()
        assert isinstance(mask, CausalBias) and mask.variant == CausalVariant.LOWER_RIGHT
        assert (mask.seq_len_q, mask.seq_len_kv) == (600, 1199)
        assert heads == key_heads and enable_gqa == flash, "keys are repeated where the kernel cannot group queries"
    assert not attention.strips


@pytest.mark.parametrize("window", [None, 5, 300])
@pytest.mark.parametrize("new, length", [(1, 700), (255, 256), (256, 700), (600, 1100), (700, 700)])
def test_blocks_attend_as_one_square_does(new, length, window):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 4, new, 8, generator=generator, requires_grad=True)
    key, value = (torch.randn(1, 2, length, 8, generator=generator, requires_grad=True) for _ in range(2))
    weights = torch.randn(1, 4, new, 8, generator=generator)
    attention = PathAttention(pack([np.arange(length + 1)], [1], TOKENS_ONLY))
    blocks = attention._lower_right(query, key, value, window, {"dropout_p": 0.0, "scale": 0.3})
    places = torch.arange(length)
    distance = places[-new:, None] - places
    sees = (distance >= 0) & (distance < (window or length))
    square = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=sees, scale=0.3, enable_gqa=True
    )
    torch.testing.assert_close(blocks, square, rtol=1e-5, atol=1e-5)
    for ours, expected in zip(
        torch.autograd.grad((blocks * weights).sum(), (query, key, value)),
        torch.autograd.grad((square * weights).sum(), (query, key, value)),
        strict=True,
    ):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1),
):  # fmt: skip
    """As flash-attn's function of this name, row by row: its causal mask is aligned with the lower right corner."""
    assert causal and q.shape[1] % k.shape[1] == 0
    outputs = []
    for row in range(len(cu_seqlens_q) - 1):
        of_queries, of_keys = (slice(int(cu[row]), int(cu[row + 1])) for cu in (cu_seqlens_q, cu_seqlens_k))
        queries, keys, values = (x.transpose(0, 1) for x in (q[of_queries], k[of_keys], v[of_keys]))
        assert queries.shape[1] <= max_seqlen_q and keys.shape[1] <= max_seqlen_k
        places = torch.arange(keys.shape[1])
        distance = places[-queries.shape[1] :, None] - places
        sees = distance >= 0
        if window_size[0] >= 0:
            sees &= distance <= window_size[0]
        outputs.append(
            torch.nn.functional.scaled_dot_product_attention(
                *(states[None] for states in (queries, keys, values)),
                attn_mask=sees,
                scale=softmax_scale,
                enable_gqa=True,
            )[0].transpose(0, 1)
        )
    return torch.cat(outputs)


@pytest.mark.parametrize("family", ["qwen3", "llama", "mistral", "gemma3_text"])
@pytest.mark.parametrize("implementation", ["flash_attention_2", "flash_attention_3"])
def test_flash_attention_scores_a_tree_in_one_call(family, implementation, monkeypatch, always_share):
    # The package needs a GPU. What transformers calls is stood in for, from its own attention function on.
    calls = []

    def varlen(*args, **kwargs):
        calls.append(kwargs)
        return flash_attn_varlen_func(*args, **kwargs)

    for name, value in {
        "_loaded_implementation": implementation,
        "_flash_fn": None,
        "_flash_varlen_fn": varlen,
        "_process_flash_kwargs_fn": flash_utils._lazy_define_process_function(flash_attn_varlen_func),
    }.items():
        monkeypatch.setattr(flash_utils, name, value)
    monkeypatch.setattr(prefix_sharing, "unsupported_reason", lambda model, device: None)
    model = build(FAMILIES[family])
    expected = results(row_by_row, model, *tools_tree())
    model.config._attn_implementation = implementation
    scores = results(shared, model, *tools_tree())
    assert len(calls) == SHAPE["num_hidden_layers"]
    for ours, reference in zip(scores[0], expected[0], strict=True):
        assert relative_error(ours, reference) <= 1e-5
    total = torch.stack([gradient.norm() for gradient in expected[1].values()]).norm().item()
    for name, gradient in scores[1].items():
        assert relative_error(gradient, expected[1][name], floor=0.05 * total) <= 1e-5, name


@pytest.mark.parametrize("implementation", path_attention.FLASH_ATTENTION)
def test_flash_attention_is_served_on_a_gpu(implementation):
    model = build(QWEN3)
    model.config._attn_implementation = implementation
    assert prefix_sharing.unsupported_reason(model, torch.device("cuda")) is None
    assert prefix_sharing.unsupported_reason(model, torch.device("cpu")).code == "attention"


def test_autocast_is_within_its_own_noise(always_share):
    model = build(QWEN3)
    exact = results(row_by_row, model, *tools_tree())
    with torch.autocast("cpu", torch.bfloat16):
        noisy, packed = (results(score, model, *tools_tree()) for score in (row_by_row, shared))
    for rounded, value, reference in zip(noisy[0], packed[0], exact[0], strict=True):
        noise = relative_error(rounded, reference)
        assert 0 < noise and relative_error(value, reference) <= 1.5 * noise


def test_used_where_it_pays_with_the_modelled_cost():
    wide = build(Qwen3Config(**{**SHAPE, "hidden_size": 256, "intermediate_size": 1024}))
    ids, mask, length = batch([list(range(3, 33)) * 4] * 4, [[row + 3] * 20 for row in range(4)])
    assert_equal_to_row_by_row(wide, ids, mask, length)


def test_declined_where_all_completions_are_masked_or_a_mask_has_holes(qwen3, always_share):
    ids, mask, length = batch([[5, 6], [5, 6]], [None, None])
    assert shared_prefix_logps(qwen3, ids, mask, length) is None
    ids, mask, length = batch([[5, 6], [5, 6]], [[7, 8, 9], [7, 8, 3]])
    mask[0, 3] = 0
    assert shared_prefix_logps(qwen3, ids, mask, length) is None


def refused():
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    yield "family", build(Starcoder2Config(**SHAPE)), "starcoder2"
    yield "dynamic rope", build(LlamaConfig(**SHAPE, rope_parameters=rope)), "rotary"
    yield "data parallel", torch.nn.DataParallel(build(QWEN3)), "DataParallel"
    yield "compiled", torch.compile(build(QWEN3)), "compiled"
    layers = build(QWEN3)
    for layer in layers.model.layers:
        layer.compile()  # as for FSDP and DeepSpeed
    yield "compiled layers", layers, "compiled"


@pytest.mark.parametrize("model, reason", [pytest.param(*rest, id=name) for name, *rest in refused()])
def test_refused_with_one_log_line(model, reason, caplog, always_share):
    prefix_sharing._log_once.cache_clear()
    with caplog.at_level(logging.WARNING, logger=prefix_sharing.__name__):
        for _ in range(2):
            assert shared_prefix_logps(model, *tools_tree()) is None
    assert len(caplog.records) == 1 and reason in caplog.text


def test_prompt_learning_is_refused():
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    model = peft.get_peft_model(build(QWEN3), config)
    assert "prompt-learning" in prefix_sharing.unsupported_reason(model, torch.device("cpu")).text


def test_flex_attention_of_a_split_model_is_refused():
    model = build(QWEN3, attention="flex_attention")
    model.hf_device_map = {"model.layers.0": 0, "model.layers.1": 0, "lm_head": 0}
    assert prefix_sharing.unsupported_reason(model, torch.device("cuda")) is None
    model.hf_device_map["lm_head"] = 1
    assert "split over devices" in prefix_sharing.unsupported_reason(model, torch.device("cuda")).text
    model.set_attn_implementation("sdpa")
    assert prefix_sharing.unsupported_reason(model, torch.device("cuda")) is None


def test_forward_cost_by_hand():
    cost = forward_cost(QWEN3, "cpu")
    # a layer: queries and output 32 x 32 each, keys and values 32 x 16 each, three matrices of 32 x 48; head 32 x 40
    assert cost.token == 2 * (2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48) + 32 * 40)
    assert cost.pair == 2 * 4 * 32  # scores and weighted values, 2 FLOPs each, 32 numbers a layer


@pytest.mark.parametrize(
    "steps_per_generation, accumulation, part",
    [(4, 2, 6), (4, 4, 12), (2, 4, 12), (4, 6, 6), (3, 2, 4), (1, 1, 12)],
)
def test_sibling_order_stays_within_a_step(steps_per_generation, accumulation, part):
    rows = [np.array([i % 3, i % 3, i]) for i in range(12)]
    order = sibling_order(rows, steps_per_generation, accumulation)
    for start in range(0, 12, part):
        assert sorted(order[start : start + part]) == list(range(start, start + part))
        families = [row % 3 for row in order[start : start + part]]
        assert families == sorted(families)


def test_group_order_by_hand():
    # Two groups of one prompt each; in the first, rows 0 and 5 are siblings, and so are rows 2 and 4
    rows = [np.array(row) for row in ([1, 7, 1], [2, 1], [1, 3, 1], [2, 2], [1, 3, 2], [1, 7, 2])]
    order = group_order(rows, [8, 9, 8, 9, 8, 8])
    assert order == [0, 5, 2, 4, 1, 3]
    # Of a group that is cut in two, siblings stay together; the row that the shuffle put first is in the first part
    assert group_order([rows[row] for row in (4, 0, 5, 2)], [0] * 4) == [0, 1, 2, 3]
    assert group_order([], []) == []


def test_each_row_is_equally_likely_to_be_in_each_step():
    rows = [np.array(row) for row in ([1, 1], [1, 2], [1, 3], [2, 1], [2, 2], [2, 3])]
    places = np.zeros((6, 6), dtype=int)
    for shuffle in itertools.permutations(range(6)):
        order = group_order([rows[row] for row in shuffle], [shuffle[place] // 3 for place in range(6)])
        for place, row in enumerate(order):
            places[shuffle[row], place] += 1
    assert (places == 120).all()


def test_sibling_order_wants_a_whole_generation_batch():
    with pytest.raises(ValueError, match="steps_per_generation"):
        sibling_order([np.array([1])] * 12, steps_per_generation=5)
    assert sibling_order([]) == []


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("family", ["qwen3", "gemma3_text", "mistral", "nemotron_h"])
def test_block_masks_of_flex_attention(family, monkeypatch, always_share):
    # flex_attention has no backward on a CPU and is not offered there; its masks can still be held to sdpa, forward
    # only and uncompiled.
    monkeypatch.setattr(prefix_sharing, "unsupported_reason", lambda model, device: None)
    monkeypatch.setattr(WrappedFlexAttention, "__call__", lambda self: flex_attention)
    ids, mask, length = tools_tree()
    with torch.no_grad():
        scores = shared(build(FAMILIES[family], attention="flex_attention"), ids, mask, length)
        expected = row_by_row(build(FAMILIES[family]), ids, mask, length)
    for value, reference in zip(scores[:2], expected[:2], strict=True):
        assert relative_error(value, reference) <= 1e-5
