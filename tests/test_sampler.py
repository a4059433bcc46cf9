"""Entropies, limits and stop strings inside a real `generate`."""

import pytest
import tiny
import torch
from transformers import GenerationConfig

from arpo_trl.rollout.sampler import recorded_generation, recorded_samples, stop_string_criteria, top_k_samples


@pytest.fixture(scope="module")
def model(tokenizer):
    return tiny.build_model(tokenizer, seed=1).eval()


def generate(model, tokenizer, contexts, limits, window=6, temperature=0.7, stop_strings=(), **settings):
    torch.manual_seed(0)
    length = max(map(len, contexts))
    pad = tokenizer.pad_token_id
    input_ids = torch.tensor([[pad] * (length - len(ids)) + ids for ids in contexts])
    config = GenerationConfig(
        do_sample=True,
        max_new_tokens=max(limits),
        temperature=temperature,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=pad,
        **settings,
    )
    criteria = stop_string_criteria(tokenizer, stop_strings)
    with recorded_generation(model, limits, criteria, window, temperature) as (recorder, stops):
        output = model.generate(input_ids, attention_mask=(input_ids != pad).long(), generation_config=config)
    ids = []
    for row in output[:, length:].tolist():
        end = row.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in row else len(row)
        ids.append(row[:end])
    return recorded_samples(ids, recorder, stops), recorder


def test_entropies_are_those_of_a_forward_pass(model, tokenizer):
    contexts = [tokenizer.encode("one"), tokenizer.encode("two and three")]
    samples, recorder = generate(model, tokenizer, contexts, [12, 12], top_k=5, top_p=0.5)
    for context, sample in zip(contexts, samples, strict=True):
        logits = model(torch.tensor([context + sample.ids])).logits[0, len(context) - 1 : -1]
        logprobs = torch.log_softmax(logits.float() / 0.7, dim=-1)  # before top-k and top-p
        exact = -(logprobs.exp() * logprobs).sum(-1)[:6]
        assert sample.entropies == pytest.approx(exact.tolist(), abs=1e-4)
    assert len(recorder._columns) == 6, "memory is B × k: nothing is kept beyond the window"


def test_each_row_ends_at_its_own_limit(model, tokenizer):
    samples, _ = generate(model, tokenizer, [[5], [6], [7]], [3, 10, 1])
    assert [len(sample.ids) for sample in samples] == [3, 10, 1]
    assert [len(sample.entropies) for sample in samples] == [3, 6, 1]


def test_recording_does_not_change_what_is_sampled(model, tokenizer):
    samples, _ = generate(model, tokenizer, [[5], [6]], [10, 10])
    torch.manual_seed(0)
    plain = model.generate(
        torch.tensor([[5], [6]]),
        do_sample=True,
        temperature=0.7,
        max_new_tokens=10,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    assert [sample.ids for sample in samples] == plain[:, 1:].tolist()
    assert "generate" not in vars(model), "the model is left as it was"


def test_a_stop_string_ends_a_row_and_belongs_to_it(model, tokenizer):
    stop = tokenizer.decode([9])  # a token that an untrained model samples soon
    samples, _ = generate(model, tokenizer, [[5]] * 16, [200] * 16, temperature=3.0, stop_strings=[stop])
    ended = [sample for sample in samples if 9 in sample.ids]
    assert ended, "no row sampled the stop string; the test shows nothing"
    assert all(sample.ids.index(9) == len(sample.ids) - 1 for sample in ended)


def test_the_sampled_token_is_looked_up_among_the_top_k():
    # Rank 1 is token 7; token 4 was sampled, from outside the top 2
    logprobs, tokens = [[[-0.3, -1.6, -4.0]]], [[[7, 2, 4]]]
    (sample,) = top_k_samples([[4]], logprobs, tokens, top_k=2, window=20, vocab_size=100)
    assert sample.ids == [4] and sample.logprobs == [-4.0]
    from arpo_trl.rollout.branching import top_k_entropy

    assert sample.entropies == [top_k_entropy([-0.3, -1.6], 100)]
