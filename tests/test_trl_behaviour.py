"""What users of TRL's trainer may do with ours too: replace `generate`, name columns, bring any decoder."""

from unittest.mock import patch

import pytest
import tiny
import torch
from datasets import Dataset, DatasetDict
from transformers import BloomConfig, BloomForCausalLM, MambaConfig, MambaForCausalLM

from arpo_trl import ARPOConfig, ARPOTrainer
from arpo_trl.evaluation import Agent

CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 3, "b": 4}}\n</tool_call><|im_end|>'


def build(model, tokenizer, folder, reward=None, rows=None, tools=(tiny.add,), **settings):
    args = ARPOConfig(
        str(folder),
        **{
            "num_generations": 3,
            "num_initial_generations": 3,
            "per_device_train_batch_size": 3,
            "max_completion_length": 128,
            "max_steps": 1,
            "bf16": False,
            "use_cpu": True,
            "report_to": "none",
            "save_strategy": "no",
            "logging_steps": 1,
            "disable_tqdm": True,
            **settings,
        },
    )
    if rows is None:
        rows = Dataset.from_list([{"prompt": tiny.question(3, 4)}] * 4)
    return ARPOTrainer(
        model,
        reward or (lambda completions, **kwargs: [0.0] * len(completions)),
        args,
        rows,
        processing_class=tokenizer,
        tools=list(tools),
    )


@pytest.mark.parametrize("initial", [3, 1])
def test_a_replaced_generate_is_used_and_stays(initial, tokenizer, tmp_path):
    trainer = build(
        tiny.build_model(tokenizer), tokenizer, tmp_path, num_initial_generations=initial, branch_probability=1.0
    )

    def generate(input_ids, **kwargs):
        answered = [tokenizer.decode(ids).count("<tool_response>") for ids in input_ids]
        rows = [tokenizer.encode("Seven.<|im_end|>" if count else CALL) for count in answered]
        width = max(map(len, rows))
        padded = [ids + [tokenizer.pad_token_id] * (width - len(ids)) for ids in rows]
        return torch.cat([input_ids, torch.tensor(padded, device=input_ids.device)], dim=1)

    with patch.object(trainer.model, "generate", side_effect=generate) as replaced:
        trainer.train()
        assert trainer.model.generate is replaced
    log = trainer.state.log_history[0]
    assert replaced.call_count >= 2 and log["tools/call_frequency"] == 1.0 and log["tools/failure_frequency"] == 0.0
    # It calls no logits processor, so entropies are unknown and nothing is decided on them
    assert "arpo/entropy_initial" not in log and log["arpo/forks"] == 0
    assert log["arpo/initial"] == initial and log["arpo/supplements"] == 3 - initial
    assert "generate" not in vars(trainer.model)


def columns(name):
    return Dataset.from_list([{"prompt": tiny.question(3, 4), name: "add"}] * 4)


@pytest.mark.parametrize("name", ["tool_calls", "model_text"])
@pytest.mark.parametrize(
    "make",
    [
        columns,
        lambda name: columns(name).to_iterable_dataset(),
        lambda name: columns(name).to_iterable_dataset().map(lambda row: row),
    ],
    ids=["dataset", "stream", "stream without features"],
)
def test_columns_that_the_rollout_fills_are_refused(name, make, tokenizer, tmp_path):
    with pytest.raises(ValueError, match=f"`train_dataset` has a column '{name}'.*rename_column"):
        build(None, tokenizer, tmp_path, rows=make(name))


def test_of_evaluation_sets_too(tokenizer, tmp_path):
    args = ARPOConfig(str(tmp_path), bf16=False, use_cpu=True, report_to="none")
    sets = DatasetDict({"first": columns("truth"), "second": columns("tool_calls")})
    with pytest.raises(ValueError, match="`eval_dataset` has a column 'tool_calls'"):
        ARPOTrainer("no-such/model", lambda **kwargs: [], args, columns("truth"), eval_dataset=sets, tools=[tiny.add])


def test_without_tools_they_are_the_data_sets(tokenizer, tmp_path):
    seen = []

    def reward(completions, tool_calls, **kwargs):
        seen.append((tool_calls, "model_text" in kwargs))
        return [0.0] * len(completions)

    trainer = build(tiny.build_model(tokenizer), tokenizer, tmp_path, reward, columns("tool_calls"), tools=())
    trainer.train()
    assert seen == [(["add"] * 3, False)]


SMALL = {"hidden_size": 32, "pad_token_id": 0, "eos_token_id": 2, "bos_token_id": 0}
MODELS = {
    "bloom": lambda size: BloomForCausalLM(BloomConfig(vocab_size=size, n_layer=1, n_head=2, **SMALL)),
    "mamba": lambda size: MambaForCausalLM(MambaConfig(vocab_size=size, num_hidden_layers=1, state_size=4, **SMALL)),
}


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("tools", [(), (tiny.add,)], ids=["plain", "tools"])
def test_a_model_whose_config_names_no_context_window(family, tools, tokenizer, tmp_path):
    trainer = build(MODELS[family](len(tokenizer)), tokenizer, tmp_path, tools=tools, max_completion_length=8)
    trainer.train()
    agent = Agent(trainer.model.eval(), tokenizer, tools, max_completion_length=8)
    try:
        assert len(agent.rollout([tiny.question(3, 4)])[0].completion_ids) <= 8
    finally:
        agent.close()
