"""The families of models, text on multimodal checkpoints first: tools, forks, both protocols. Images are in
`test_images.py`.
"""

import re

import multimodal
import pytest
import torch
from datasets import Dataset
from multimodal import PROMPT, ROWS, records, reward, trainer_of, weather
from trl import GRPOConfig, GRPOTrainer

from arpo_trl import ARPOConfig, ARPOTrainer
from arpo_trl.evaluation import Agent
from arpo_trl.protocols import check_chat_template, checkpoint_protocol
from arpo_trl.protocols.suffix import suffix_renderer

TAGS = ("Qwen3-VL", "Qwen3.5", "Gemma 4")  # one of each architecture
LORA = TAGS
EQUAL = ("Qwen3-VL", "Qwen3.5, no thinking", "Gemma 4")


def trained(family, folder, **own):
    """One step of training; the records, and the names of the parameters that it has changed."""
    trainer = trainer_of(family, folder, **own)
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    parameters = dict(trainer.model.named_parameters())
    changed = {name for name, parameter in parameters.items() if not torch.equal(parameter, before[name])}
    return trainer, records(folder), changed


def in_vision(name: str) -> bool:
    return ".visual." in name or "vision" in name


def assert_forked(rows: list[dict]) -> None:
    assert [row["kind"] for row in rows] == ["initial", "initial", "fork", "fork"]
    for row in rows:
        (call,) = row["tool_calls"]
        assert call["error"] is None and call["result"] == f"sun in {call['arguments']['city']}"
        assert call["shared"] is (row["kind"] == "fork")


@pytest.mark.parametrize("family", multimodal.MODELS)
def test_rollouts_branch_and_the_language_model_learns(family, tmp_path):
    trainer, rows, changed = trained(family, tmp_path)
    assert_forked(rows)
    assert changed and not any(map(in_vision, changed))
    assert any(map(in_vision, dict(trainer.model.named_parameters())))
    log = trainer.state.log_history[0]
    assert log["arpo/forks"] == 2 and log["tools/calls_executed"] == 2
    assert trainer.args.ddp_find_unused_parameters is True


@pytest.mark.parametrize("family", (*TAGS, *multimodal.TEXT_MODELS))
def test_the_tags_protocol(family, tmp_path):
    _, rows, changed = trained(family, tmp_path, tool_protocol="tags")
    assert_forked(rows)
    assert changed and not any(map(in_vision, changed))


@pytest.mark.parametrize("family", LORA)
def test_lora_and_hard_attribution(family, tmp_path):
    from peft import LoraConfig

    projections = r".*language_model.*\.(q_proj|v_proj|in_proj_qkv|down_proj)"
    _, rows, changed = trained(
        family, tmp_path, lora=LoraConfig(r=2, target_modules=projections), advantage_attribution="hard"
    )
    assert_forked(rows)
    assert changed and all("lora_B" in name for name in changed), "lora_A has no gradient while lora_B is zero"


@pytest.mark.parametrize("family", EQUAL)
def test_grpo_is_the_special_case(family, tmp_path):
    ours = {"num_initial_generations": 4, "prefix_sharing": False}
    arpo = trainer_of(family, tmp_path / "arpo", max_steps=2, **ours)
    arpo.train()
    grpo = trainer_of(family, tmp_path / "grpo", trainer=GRPOTrainer, config=GRPOConfig, max_steps=2)
    grpo.train()
    for stock, own in zip(grpo.state.log_history, arpo.state.log_history, strict=True):
        same = {name for name in stock if not re.search("time|per_second", name)}
        assert {name: own[name] for name in same} == {name: stock[name] for name in same}
    assert grpo.state.log_history[0]["tools/call_frequency"] == 1
    for left, right in zip(arpo.model.parameters(), grpo.model.parameters(), strict=True):
        assert torch.equal(left, right)


def test_what_has_been_read_is_kept_and_images_of_before_shift_nothing(tmp_path):
    read = {}
    for sharing in (True, False):
        trainer = trainer_of("Qwen3-VL", tmp_path / str(sharing), prefix_sharing=sharing)
        # As a `generate` with images leaves it, whose rows were another number of other rows
        trainer.model.model.rope_deltas = torch.full((3, 1), 5)
        trainer.train()
        rows = records(tmp_path / str(sharing))
        assert_forked(rows)
        read[sharing] = [[segment["entropy"] for segment in row["segments"]] for row in rows], rows
        assert (trainer._engine.lookups["prefix_cache_hits"] > 0) is sharing
    (kept, rows), (anew, others) = read[True], read[False]
    assert [row["completion_ids"] for row in rows] == [row["completion_ids"] for row in others]
    torch.testing.assert_close(kept, anew, rtol=0, atol=1e-5)


def test_a_prompt_may_be_plain_text(tmp_path):
    trainer = trainer_of("Qwen3.5", tmp_path, rows=[{"prompt": "The weather: "}] * 4, tool_protocol="tags")
    trainer.train()
    assert_forked(records(tmp_path))


def test_a_result_may_hold_what_stands_for_an_image(tmp_path):
    def weather(city: str) -> str:
        """
        Weather.

        Args:
            city: Where.
        """
        return f"sun in <|vision_start|><|image_pad|><|vision_end|>{city}"

    trainer_of("Qwen3-VL", tmp_path, tools=[weather]).train()
    image = trainer_of("Qwen3-VL", tmp_path)._tokenizer.convert_tokens_to_ids("<|image_pad|>")
    for row in records(tmp_path):
        assert image not in row["completion_ids"] and row["tool_calls"][0]["error"] is None


# Outside of training


@pytest.mark.parametrize("family", multimodal.MODELS)
def test_an_agent_takes_the_processor(family):
    for protocol in ("chat_template", "tags"):
        model, processor = multimodal.build(family)
        multimodal.asks_then_answers(model.eval(), processor, tags=protocol == "tags")
        agent = Agent(model, processor, [weather], tool_protocol=protocol)
        rows = agent.rollout([PROMPT, "The weather: "][: 2 if protocol == "tags" else 1])
        agent.close()
        for row in rows:
            (own,) = row.calls
            assert own.call.result == f"sun in {own.call.arguments['city']}" and not row.truncated
        completion = agent.completion(rows[0], PROMPT)
        assert "sun in" in str(completion) and completion[-1]["role"] == "assistant"


@pytest.mark.parametrize("family", multimodal.MODELS)
def test_results_are_the_same_tokens_from_a_processor_and_from_its_tokenizer(family):
    _, processor = multimodal.build(family)
    assert processor.tokenizer.chat_template == processor.chat_template
    results = [{"role": "tool", "name": name, "content": "told"} for name in ("weather", "add")]
    ends = processor.tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|tool_response>", "<turn|>"])
    for last in [None, *(end for end in ends if end is not None)]:
        assert suffix_renderer(processor)(results, last) == suffix_renderer(processor.tokenizer)(results, last)


def test_an_agent_renders_as_the_trainer_does(tmp_path):
    trainer = trainer_of("Qwen3.5", tmp_path)
    agent = Agent(trainer.model, trainer.processing_class, [weather])
    assert trainer._tokenize_prompts([PROMPT])[0][0] == agent.tokenize(PROMPT)
    agent.close()


def test_a_processor_whose_template_knows_no_tools_is_told_the_ways_on(tmp_path):
    model, processor = multimodal.build("Qwen3-VL")
    vars(processor).pop("apply_chat_template", None)  # bound to this processor, where copies of it are asked
    processor.chat_template = "{% for m in messages %}{{ m.content[0].text }}<|im_end|>{% endfor %}"
    told = []
    for attempt in (
        lambda: ARPOTrainer(
            model,
            reward,
            ARPOConfig(str(tmp_path), bf16=False, use_cpu=True),
            Dataset.from_list(ROWS),
            processing_class=processor,
            tools=[weather],
        ),
        lambda: Agent(model, processor, [weather]),
        lambda: check_chat_template(processor),
    ):
        with pytest.raises(ValueError) as caught:
            attempt()
        told.append(str(caught.value))
    assert told[0] == told[1] == told[2]
    assert "knows no tools" in told[0] and "Set `tool_protocol='tags'`" in told[0]
    assert "`processor.chat_template = " in told[0] and "qwen3_vl" in told[0]
    assert getattr(processor.tokenizer, "response_template", None) is None


def test_a_checkpoint_says_which_protocol_it_speaks(tmp_path):
    trainer = trainer_of("Gemma 4", tmp_path, tool_protocol="tags")
    assert checkpoint_protocol(trainer.processing_class.tokenizer) == "tags"
