"""A copy of the weights in another data type samples the rollouts; the update stays the policy's own."""

import pytest
import tiny
import torch
from datasets import Dataset
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from arpo_trl import ARPOConfig, ARPOTrainer
from arpo_trl.rollout.engines.weights_copy import copy_in, one_query_attention

CPU = {"bf16": False, "use_cpu": True, "report_to": "none"}


def build(tmp_path, tokenizer, model, **settings):
    return ARPOTrainer(
        model=model,
        args=ARPOConfig(
            str(tmp_path),
            **{**CPU, **settings},
            num_generations=4,
            num_initial_generations=2,
            per_device_train_batch_size=4,
            max_completion_length=60,
            max_steps=2,
            learning_rate=1e-2,
            tool_protocol="tags",
        ),
        reward_funcs=lambda completions, **kwargs: [float(i) for i in range(len(completions))],
        train_dataset=Dataset.from_list([{"prompt": tiny.question(1, 2)}] * 4),
        processing_class=tokenizer,
        tools=[tiny.add],
    )


def test_a_copy_keeps_ties_and_buffers_and_shares_no_weight(tokenizer):
    model = tiny.build_model(tokenizer)
    model.gradient_checkpointing_enable()
    sampler = copy_in(model, torch.bfloat16)
    assert {weight.dtype for weight in sampler.parameters()} == {torch.bfloat16}
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert not any(weight.requires_grad for weight in sampler.parameters())
    assert sampler.lm_head.weight is sampler.model.embed_tokens.weight
    assert sampler.model.rotary_emb.inv_freq.dtype == torch.float32
    assert not sampler.model.gradient_checkpointing and model.model.gradient_checkpointing
    own = {weight.data_ptr() for weight in model.parameters()}
    assert own.isdisjoint(weight.data_ptr() for weight in sampler.parameters())


@pytest.mark.parametrize("masked", [False, True])
def test_attention_of_one_query_is_that_of_sdpa(masked):
    torch.manual_seed(0)
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = 3, True
    query, key, value = torch.randn(2, 6, 1, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    mask = torch.tensor([[True] * 5, [False, False, True, True, True]])[:, None, None] if masked else None
    for queries in (query, query.repeat(1, 1, 5, 1)):
        seen = mask if mask is None else mask.expand(2, 1, queries.size(2), 5)
        ours, _ = one_query_attention(module, queries, key, value, seen, scaling=0.3)
        theirs, _ = sdpa_attention_forward(module, queries, key, value, seen, scaling=0.3)
        torch.testing.assert_close(ours, theirs)


def test_a_half_precision_copy_on_a_cpu_decodes_as_sdpa_does(tokenizer):
    model = tiny.build_model(tokenizer).eval()
    assert model.config._attn_implementation == "sdpa"
    sampler = copy_in(model, torch.bfloat16)
    assert sampler.config._attn_implementation != "sdpa" and model.config._attn_implementation == "sdpa"
    assert copy_in(model, torch.float32).config._attn_implementation == "sdpa"
    ids, mask = torch.tensor([[5, 6, 7, 8], [0, 0, 9, 10]]), torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    settings = dict(attention_mask=mask, max_new_tokens=12, output_logits=True, return_dict_in_generate=True)
    settings |= dict(do_sample=False, eos_token_id=None, pad_token_id=0)
    ours = sampler.generate(ids, **settings)
    sampler.set_attn_implementation("sdpa")
    theirs = sampler.generate(ids, **settings)
    assert torch.equal(ours.sequences, theirs.sequences)
    torch.testing.assert_close(torch.stack(ours.logits), torch.stack(theirs.logits), atol=0.02, rtol=0.02)


@pytest.mark.parametrize("sharing", [False, True])
def test_the_copy_samples_with_the_weights_of_the_step_and_is_gone_afterwards(
    sharing, tokenizer, tmp_path, monkeypatch
):
    model = tiny.train_agent(tokenizer, "tags", steps=30)
    trainer = build(tmp_path, tokenizer, model, rollout_dtype="bfloat16", prefix_sharing=sharing)
    seen = []
    generate = type(model).generate

    def recorded(self, *args, **kwargs):
        weight = self.model.embed_tokens.weight
        latest = model.model.embed_tokens.weight.detach().clone()
        seen.append((self is model, weight.dtype, torch.equal(weight, latest.to(torch.bfloat16)), latest))
        return generate(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "generate", recorded)
    trainer.train()
    assert seen and {entry[:3] for entry in seen} == {(False, torch.bfloat16, True)}
    assert not torch.equal(seen[0][3], seen[-1][3]), "a step has changed the weights between the two rollouts"
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert trainer._engine._sampler is None and "generate" not in vars(model)


def test_a_copy_in_the_same_data_type_changes_nothing(tokenizer, tmp_path):
    runs = []
    for dtype in (None, "float32"):
        trainer = build(
            tmp_path / str(dtype), tokenizer, tiny.train_agent(tokenizer, "tags", steps=30), rollout_dtype=dtype
        )
        trainer.train()
        runs.append(trainer.model.state_dict())
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


def test_log_probabilities_of_the_update_are_the_policys(tokenizer, tmp_path):
    """The first step's importance ratio is 1, since no log-probability comes from the copy."""
    trainer = build(tmp_path, tokenizer, tiny.train_agent(tokenizer, "tags", steps=30), rollout_dtype="bfloat16")
    trainer.args.logging_steps = trainer.state.logging_steps = 1
    batch = next(iter(trainer.get_train_dataloader()))
    outputs = trainer._generate_and_score_completions(batch)
    assert outputs.get("old_per_token_logps") is None and outputs.get("sampling_per_token_logps") is None


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"rollout_dtype": "int8"}, ["`rollout_dtype` is 'int8'", "'bfloat16'"]),
        ({"rollout_dtype": "bfloat16", "use_vllm": True}, ["`rollout_dtype` is 'bfloat16'", "`use_vllm`"]),
    ],
)
def test_what_cannot_be_is_refused(tmp_path, settings, words):
    with pytest.raises(ValueError) as caught:
        ARPOConfig(str(tmp_path), **CPU, **settings)
    assert all(word in str(caught.value) for word in words), str(caught.value)
