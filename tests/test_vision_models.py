"""Vision-language models with a `generate` of their own, which calls no logits processor, and without tools."""

import torch
import trl_suite
from datasets import Dataset
from PIL import Image
from transformers import ProcessorMixin, Qwen3_5Config, Qwen3_5ForConditionalGeneration, Qwen3VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from trl import GRPOConfig, GRPOTrainer

from arpo_trl import ARPOConfig, ARPOTrainer
from arpo_trl.viewer.records import read_file


def screenshot() -> list:
    """
    Take a picture.

    Returns:
        The picture.
    """
    return [{"type": "image", "image": Image.new("RGB", (64, 64), "red")}, {"type": "text", "text": "Here it is."}]


def build(monkeypatch):
    # Processors of videos need torchvision, and no test has a video
    monkeypatch.setattr(ProcessorMixin, "check_argument_for_proper_class", lambda *args: None)
    tokens = trl_suite.qwen_tokenizer("qwen3_5_nothink")
    images = Qwen2VLImageProcessorPil(patch_size=16, min_pixels=32 * 32, max_pixels=64 * 64)
    processor = Qwen3VLProcessor(images, tokens, None, chat_template=tokens.chat_template)
    torch.manual_seed(0)
    model = Qwen3_5ForConditionalGeneration(Qwen3_5Config(**trl_suite.qwen3_5_settings(tokens)))
    return model, processor


def train(trainer_class, config_class, folder, monkeypatch, rows, reward, tools=None, generate=None, **settings):
    model, processor = build(monkeypatch)
    if generate is not None:
        model.generate = generate(processor.tokenizer)
    args = config_class(
        str(folder),
        num_generations=2,
        per_device_train_batch_size=2,
        max_completion_length=128,
        max_steps=1,
        learning_rate=0.1,
        bf16=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        **settings,
    )
    trainer = trainer_class(
        model, reward, args, Dataset.from_list(rows), processing_class=processor, **({"tools": tools} if tools else {})
    )
    trainer.train()
    return trainer


def calls_then_answers(tokenizer):
    """A `generate` that has the first of two rows take a picture, and calls no logits processor."""

    def generate(input_ids, **kwargs):
        call = "<tool_call>\n<function=screenshot>\n</function>\n</tool_call><|im_end|>"
        texts = [call, "No.<|im_end|>"] if len(input_ids) == 2 else ["Red.<|im_end|>"]
        rows = [tokenizer.encode(text) for text in texts]
        width = max(map(len, rows))
        padded = [row + [tokenizer.pad_token_id] * (width - len(row)) for row in rows]
        return torch.cat([input_ids, torch.tensor(padded)], dim=1)

    return generate


PROMPT = [{"prompt": [{"role": "user", "content": "What is on the screen?"}]}] * 2


def test_a_tool_may_answer_with_an_image(tmp_path, monkeypatch):
    seen = {}

    def reward(completions, tool_calls=None, model_text=None, **kwargs):
        seen.update(completions=completions, tool_calls=tool_calls, model_text=model_text)
        return [1.0, 0.0]

    ours = {"num_initial_generations": 2, "log_rollouts": True, "prefix_sharing": False}
    arpo = train(
        *(ARPOTrainer, ARPOConfig, tmp_path, monkeypatch, PROMPT, reward, [screenshot], calls_then_answers),
        **ours,
    )
    assert [[message["role"] for message in messages] for messages in seen["completions"]] == [
        ["assistant", "tool", "assistant"],
        ["assistant"],
    ]
    ((call,), none) = seen["tool_calls"]
    assert (call["name"], call["arguments"], call["error"], call["shared"]) == ("screenshot", {}, None, False)
    assert [block["type"] for block in call["result"]] == ["image", "text"]
    assert call["result"][0]["image"].size == (64, 64)
    assert none == [] and "Red." in seen["model_text"][0] and "Here it is." not in seen["model_text"][0]
    (first, second), _ = read_file(tmp_path / "rollouts" / "step-000000.jsonl.gz")
    assert [len(first["segments"]), len(second["segments"])] == [2, 1]
    for segment in first["segments"]:
        assert set(first["tool_mask"][segment["start"] : segment["end"]]) == {1}

    grpo = train(GRPOTrainer, GRPOConfig, tmp_path, monkeypatch, PROMPT, reward, [screenshot], calls_then_answers)
    stock, own = grpo.state.log_history[0], arpo.state.log_history[0]
    assert stock["tools/call_frequency"] == own["tools/call_frequency"] == 0.5
    same = {name for name in stock if "time" not in name and "per_second" not in name}
    assert {name: own[name] for name in same} == {name: stock[name] for name in same}
    for left, right in zip(arpo.model.parameters(), grpo.model.parameters(), strict=True):
        assert torch.equal(left, right)


def test_images_in_the_prompt_and_no_tools(tmp_path, monkeypatch):
    rows = [
        {"prompt": [{"role": "user", "content": "What is this?"}], "image": Image.new("RGB", (64, 48), color)}
        for color in ("red", "blue")
    ]
    asked = []

    def reward(completions, **kwargs):
        asked.append({"tool_calls", "model_text"} & set(kwargs))
        return [1.0, 0.0]

    settings = {"num_initial_generations": 2, "prefix_sharing": False}
    trainer = train(ARPOTrainer, ARPOConfig, tmp_path, monkeypatch, rows, reward, **settings)
    assert asked == [set()], "without tools reward functions get what TRL gives them"
    assert trainer.state.log_history[-1]["train_loss"] is not None
