"""Rows that share prefixes, and what holds their scores to row by row."""

from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode
from trl import GRPOTrainer
from trl.kernels import ChunkedLogProbFunction

from arpo_trl.scoring import shared_prefix as prefix_sharing
from arpo_trl.scoring.prefix_tree import Cost
from arpo_trl.scoring.shared_prefix import shared_prefix_logps

TOKENS_ONLY = Cost(token=1.0, pair=0.0, call=0.0)  # a saved token is all that counts: share whatever can be shared


def batch(prompts, completions, pad_to_multiple_of=1):
    """Pad as TRL does: prompts left, completions right; `None` is a completion masked as a whole."""
    width = max(map(len, prompts))
    length = max(max(len(completion or []) for completion in completions), 1)
    length += -length % pad_to_multiple_of
    ids = torch.zeros(len(prompts), width + length, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        tokens = [*prompt, *(completion or [])]
        ids[row, width - len(prompt) : width + len(completion or [])] = torch.tensor(tokens)
        mask[row, width - len(prompt) : width + len(completion or [])] = 1
    return ids, mask, length


def row_by_row(model, ids, mask, length, aux_loss=False):
    """TRL's own method, without a trainer around it."""
    method = GRPOTrainer._get_per_token_logps_and_entropies.__wrapped__
    trainer = SimpleNamespace(accelerator=Accelerator(cpu=True))
    return method(trainer, model, ids, mask, length, compute_entropy=True, compute_aux_loss=aux_loss)


def shared(model, ids, mask, length, aux_loss=False):
    scores = shared_prefix_logps(model, ids, mask, length, compute_entropy=True, compute_aux_loss=aux_loss)
    assert scores is not None, "sharing was declined"
    return scores


class Doubled(TorchFunctionMode):
    """Puts float64 where a model asks for float32."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.float:
            return args[0].double()
        args = tuple(torch.float64 if argument is torch.float32 else argument for argument in args)
        kwargs = {name: torch.float64 if value is torch.float32 else value for name, value in (kwargs or {}).items()}
        return function(*args, **kwargs)


@contextmanager
def in_double():
    """
    Within the context, what a model computes in float32 whatever its own type (norms, rotary embeddings, states, the
    head) is computed in float64, so that rounding hides nothing.
    """
    stock = ChunkedLogProbFunction.backward

    def backward(*args):  # PyTorch leaves modes behind when it goes backwards
        with Doubled():
            return stock(*args)

    with pytest.MonkeyPatch.context() as patch, Doubled():
        patch.setattr(ChunkedLogProbFunction, "backward", staticmethod(backward))
        yield


def results(score, model, ids, mask, length, **options):
    """
    Log-probabilities, entropies and load-balancing loss, and the gradient of a loss that weighs every row's tokens
    differently.
    """
    model.zero_grad()
    weights = torch.rand(len(ids), length, generator=torch.Generator().manual_seed(1)) + 0.5
    logps, entropies, aux_loss = score(model, ids, mask, length, **options)
    loss = (logps * weights).sum() + 0.3 * (entropies * weights.sqrt()).sum()
    (loss if aux_loss is None else loss + 10.0 * aux_loss).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    values = [value.detach() for value in (logps, entropies, aux_loss) if value is not None]
    return values, gradients


def relative_error(value, reference, floor=1e-3):
    return ((value - reference).norm() / max(reference.norm().item(), floor)).item()


def assert_equal_to_row_by_row(model, ids, mask, length, tolerance=1e-5, floor=0.05, **options):
    values, gradients = results(shared, model, ids, mask, length, **options)
    expected_values, expected_gradients = results(row_by_row, model, ids, mask, length, **options)
    masked = mask[:, -length:] == 0
    assert (values[0][masked] == 0).all() and (values[1][masked] == 0).all()
    for value, expected in zip(values, expected_values, strict=True):
        assert relative_error(value, expected) <= tolerance
    assert gradients.keys() == expected_gradients.keys()
    # In float32 the gradient of a query with one key is zero but for rounding, of the order of float32's epsilon times
    # the whole gradient's norm; hence no norm below 5 % of that.
    total = torch.stack([gradient.norm() for gradient in expected_gradients.values()]).norm().item()
    for name, gradient in gradients.items():
        assert relative_error(gradient, expected_gradients[name], floor=floor * total) <= tolerance, name


def assert_equal_in_double(model, ids, mask, length, **options):
    """As row by row to ten digits of each gradient, however small beside the others."""
    with in_double():
        assert_equal_to_row_by_row(model.double(), ids, mask, length, tolerance=1e-10, floor=1e-6, **options)


def tools_tree(seed=0, vocab=40):
    """Two prompts of unequal length, forks of forks, a duplicate, a row that ends at a fork, a masked row."""
    draw = np.random.default_rng(seed).integers

    def text(n):
        return draw(3, vocab, n).tolist()

    first, second = text(11), text(7)
    root = text(30)
    fork = root[:12] + text(14)
    rows = [
        (first, root),
        (first, fork),
        (first, fork[:18] + text(9)),
        (first, root),
        (first, root[:12]),
        (first, None),
        (second, text(5)),
        (second, text(21)),
    ]
    return batch(*zip(*rows, strict=True))


def long_tree(seed=0, vocab=36):
    """Forks of forks whose stretches are longer and shorter than the chunks in which states are scanned."""
    draw = np.random.default_rng(seed).integers

    def text(n):
        return draw(3, vocab, n).tolist()

    prompt, other = text(70), text(2)
    root = text(200)
    fork = root[:65] + text(100)
    rows = [
        (prompt, root),
        (prompt, root[:130] + text(3)),
        (prompt, fork),
        (prompt, fork[:66] + text(64)),
        (prompt, text(1)),
        (other, text(90)),
        (other, text(2)),
    ]
    return batch(*zip(*rows, strict=True))


@contextmanager
def sharing_always():
    """Within the context, rows are packed whatever it costs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefix_sharing, "forward_cost", lambda config, device_type: TOKENS_ONLY)
        patch.setattr(prefix_sharing, "_MARGIN", float("inf"))
        yield


tokens = st.integers(3, 5)  # few, so that rows agree by chance; 0 is padding, whose embedding is zero


@st.composite
def trees(draw):
    """Rows that leave an earlier row (or a prompt) at any token: `(prompts, completions)`."""
    prompts = draw(st.lists(st.lists(tokens, min_size=1, max_size=4), min_size=1, max_size=2))
    rows = []
    for _ in range(draw(st.integers(1, 7))):
        new = draw(st.lists(tokens, max_size=8))
        if rows and draw(st.booleans()):
            prompt, completion = draw(st.sampled_from(rows))
            rows.append((prompt, completion[: draw(st.integers(0, len(completion)))] + new))
        else:
            rows.append((draw(st.sampled_from(prompts)), new))
    return rows
