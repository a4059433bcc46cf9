"""A copy of the weights in another data type samples the rollouts; the update stays the policy's own."""

import pytest
import tiny
import torch
from datasets import Dataset

from arpo_trl import ARPOConfig, ARPOTrainer
from arpo_trl.rollout.engines.transformers import copy_in

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
