"""Tiny checkpoints, multimodal ones with their processors, made to write what a test says.

Models and processors are those of `trl_suite.py`. No test here has a video, so no video processor is needed, which
alone needs torchvision.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import trl_suite
from datasets import Dataset
from PIL import Image
from transformers import LogitsProcessor, LogitsProcessorList, ProcessorMixin

from arpo_trl import ARPOConfig, ARPOTrainer
from arpo_trl.viewer.records import read_file

MODELS = {
    "Qwen3-VL": "Qwen3VLForConditionalGeneration",
    "Qwen3.5": "Qwen3_5ForConditionalGeneration",
    "Qwen3.5, no thinking": "Qwen3_5ForConditionalGeneration-NoThink",
    "Qwen3.6": "Qwen3_5ForConditionalGeneration-3.6",
    "Qwen3.8": "Qwen3_5ForConditionalGeneration-3.8",
    "Gemma 4": "Gemma4ForConditionalGeneration",
}
"""Name of the family → of the model in `trl_suite.vision_models`."""

IMAGE_MODELS = {
    "Qwen2.5-VL": "Qwen2_5_VLForConditionalGeneration",
    "Gemma 3": "Gemma3ForConditionalGeneration",
    "LLaVA": "LlavaForConditionalGeneration",
    "LLaVA-Next": "LlavaNextForConditionalGeneration",
    "Idefics3": "Idefics3ForConditionalGeneration",
    "SmolVLM": "SmolVLMForConditionalGeneration",
    "LFM2-VL": "Lfm2VlForConditionalGeneration",
}
"""More of them, which `test_images.py` runs with the tags protocol."""

TEXT_MODELS = {
    "Qwen2.5": "Qwen2ForCausalLM-2.5",
    "Qwen3": "Qwen3ForCausalLM",
    "Qwen3 MoE": "Qwen3MoeForCausalLM",
    "Llama 3.2": "LlamaForCausalLM-3.2",
    "Gemma 2": "Gemma2ForCausalLM",
    "Cohere 2": "Cohere2ForCausalLM",
    "gpt-oss": "GptOssForCausalLM",
    "GLM-4 MoE": "Glm4MoeForCausalLM",
    "Nemotron 3": "NemotronHForCausalLM-nano",
}
"""Name of the family → of the model in `trl_suite.text_models`."""


PROMPT = [{"role": "user", "content": "What is the weather?"}]
ROWS = [{"prompt": PROMPT}] * 4
PICTURE = Image.new("RGB", (64, 64), "red")


def weather(city: str) -> str:
    """
    Weather.

    Args:
        city: Where.
    """
    return f"sun in {city}"


def photo(city: str) -> list:
    """
    Weather.

    Args:
        city: Where.
    """
    shown = Image.new("RGB", (64 + 32 * (ord(city[0]) % 2), 64), (25 * (ord(city[0]) - 96) % 256, 90, 0))
    return [{"type": "image", "image": shown}, {"type": "text", "text": f"sun in {city}"}]


photo.__name__ = "weather"  # the name that the model calls


def build_text(family: str):
    """A model of text with random weights and its tokenizer, the same in every call."""
    torch.manual_seed(0)
    return trl_suite.text_models()[TEXT_MODELS[family]]()


def build(family: str):
    """A multimodal model with random weights and its processor, the same in every call."""
    if not trl_suite.has_torchvision():
        ProcessorMixin.check_argument_for_proper_class = lambda *args: None
    torch.manual_seed(0)
    model, processor = trl_suite.vision_models()[{**MODELS, **IMAGE_MODELS}[family]]()
    if not trl_suite.has_torchvision():
        processor.save_pretrained = processor.tokenizer.save_pretrained  # what lacks a part cannot be saved
        processor.apply_chat_template = as_tensors(processor.apply_chat_template)
    return model, processor


def as_tensors(render):
    """`apply_chat_template` with pixels as tensors, which TRL expects; without torchvision they are NumPy's."""

    def rendered(*args, **kwargs):
        output = render(*args, **kwargs)
        if isinstance(output, Mapping):
            output.update({name: torch.from_numpy(x) for name, x in output.items() if isinstance(x, np.ndarray)})
        return output

    return rendered


def thought_text(processor) -> str:
    """What a turn begins with: the thought that the template has opened, if any."""
    message = {"role": "user", "content": [{"type": "text", "text": "hi"}]}
    opened = processor.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
    return "I ask.\n</think>\n\n" if opened.endswith("<think>\n") else ""


def call_text(processor, city: str) -> str:
    """A turn that calls `weather`, as the processor's template writes it, up to the token that ends it."""
    text = processor.chat_template
    if "<function=" in text:
        call = f"<tool_call>\n<function=weather>\n<parameter=city>\n{city}\n</parameter>\n</function>\n</tool_call>"
    elif "<|tool_call>" in text:
        return f'<|tool_call>call:weather{{city:<|"|>{city}<|"|>}}<tool_call|><|tool_response>'
    elif "<|tool_call_start|>" in text:
        call = f"<|tool_call_start|>[weather(city='{city}')]<|tool_call_end|>"
    else:
        call = f'<tool_call>\n{{"name": "weather", "arguments": {{"city": "{city}"}}}}\n</tool_call>'
    return thought_text(processor) + call + "<|im_end|>"


def end_text(processor) -> str:
    return "<turn|>" if "<|tool_call>" in processor.chat_template else "<|im_end|>"


class Script(LogitsProcessor):
    """
    Has each row write its own turn: one item a token, which is its id, or a list of ids to sample from.

    Args:
        turns (`list[list[int | list[int]]]`): Of each row.
        start (`int`): Tokens of the contexts.
        prefers (`Sequence[int]`, *optional*): Tokens that it would rather write than others of their list.
    """

    def __init__(self, turns, start: int, prefers: Sequence[int] = ()):
        self.turns = turns
        self.start = start
        self.prefers = list(prefers)

    def __call__(self, input_ids, scores):
        step = input_ids.size(1) - self.start
        forced = torch.full_like(scores, -torch.inf)
        for row, turn in enumerate(self.turns):
            wanted = turn[step] if step < len(turn) else turn[-1]
            forced[row, wanted] = scores[row, wanted]
        forced[:, self.prefers] += 9.0
        return forced


def scripted(model, write: Callable[[list[int]], list], prefers: Sequence[int] = ()):
    """
    Have `model.generate` write `write(context)` after each context. It is a method of a class, as a model's own is, so
    that rollouts keep what they have read.
    """

    class Scripted(type(model)):
        def generate(self, input_ids, attention_mask, logits_processor=None, **kwargs):
            contexts = [ids[mask.bool()].tolist() for ids, mask in zip(input_ids, attention_mask, strict=True)]
            script = Script([write(context) for context in contexts], input_ids.size(1), prefers)
            processors = LogitsProcessorList([script, *(logits_processor or [])])
            return super().generate(
                input_ids=input_ids, attention_mask=attention_mask, logits_processor=processors, **kwargs
            )

    Scripted.__name__ = type(model).__name__
    model.__class__ = Scripted
    return model


def asks_then_answers(model, processor, tags: bool = False, questions: int = 1, prefers: Sequence[int] = ()):
    """
    A model that asks for the weather of a city, whose first letter it chooses, reads it, and answers with two letters
    of its choice, so that it is unsure where the result ends. It asks `questions` times. The tokens that it `prefers`
    it would rather write than a letter.
    """
    tokenizer = processor.tokenizer if isinstance(processor, ProcessorMixin) else processor

    def ids(text: str) -> list:
        return tokenizer.encode(text, add_special_tokens=False)

    letters = [*(ids(letter)[0] for letter in "abcdefgh"), *prefers]
    called = "<weather>X</weather>" if tags else call_text(processor, "X")
    (chosen,) = ids("X")
    asking = [letters if token == chosen else token for token in ids(called)]
    end = tokenizer.eos_token if tags else thought_text(processor) + end_text(processor)
    answering = [letters, letters, *ids(end)]
    told = ids("sun in ")

    def write(context: list[int]) -> list:
        known = sum(context[place : place + len(told)] == told for place in range(len(context)))
        return asking if known < questions else answering

    return scripted(model, write, prefers)


def reward(completions, **kwargs):
    """Varies within a group, whatever a protocol makes of a completion."""
    texts = [re.sub(" at 0x[0-9A-F]+", "", str(completion), flags=re.I) for completion in completions]
    return [float(sum(map(ord, text)) % 7) for text in texts]


def trainer_of(
    family,
    folder,
    rows=ROWS,
    trainer=ARPOTrainer,
    config=ARPOConfig,
    tools=(weather,),
    lora=None,
    questions=1,
    environment_factory=None,
    prefers=(),
    **own,
):
    """A trainer whose model asks for the weather and answers. Its rollouts fork twice, unless `own` says otherwise."""
    model, processor = (build_text if family in TEXT_MODELS else build)(family)
    asks_then_answers(model, processor, tags=own.get("tool_protocol") == "tags", questions=questions, prefers=prefers)
    settings = {
        "num_generations": 4,
        "per_device_train_batch_size": 4,
        "max_completion_length": 220,
        "max_steps": 1,
        "learning_rate": 0.1,
        "logging_steps": 1,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    if config is ARPOConfig:
        settings |= {"num_initial_generations": 2, "branch_rule": "threshold", "branch_threshold": 1e-4}
        settings |= {"log_rollouts": True}
    return trainer(
        model,
        reward,
        config(str(folder), **{**settings, **own}),
        Dataset.from_list(rows),
        processing_class=processor,
        tools=list(tools),
        environment_factory=environment_factory,
        peft_config=lora,
    )


def records(folder: Path) -> list[dict]:
    return read_file(folder / "rollouts" / "step-000000.jsonl.gz")[0]
