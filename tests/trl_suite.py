"""Run TRL's own tests of `GRPOTrainer` with `ARPOTrainer` in its place, and compare test by test.

    python tests/trl_suite.py [--folder FOLDER] PATH_TO_TRL_CHECKOUT [arguments of pytest, such as -k EXPRESSION]

`tests/test_grpo_trainer.py` of the checkout runs twice: with TRL's classes, then with ours and
`num_initial_generations == num_generations`, which is GRPO. The script ends with an error if a test passes with TRL's
class and not with ours.

That file loads small models and data from the Hub. Here stand local ones in their place: random weights of the same
families, tokenizers that give the tokens written in the tests their text, and TRL's chat templates. They are built
once, in `FOLDER`, which is laid out as a cache of the Hub. The vision models need torchvision, the tests with tools
jmespath.
"""

import argparse
import importlib
import importlib.resources
import json
import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ORGANIZATION = "trl-internal-testing"
REVISION = "0" * 40
# Beginnings of the lines of the Zen of Python, which one of the tests expects in this order
SENTENCES = [
    *("Beautiful is better than", "Explicit is", "Simple is better", "Complex", "Flat is better than"),
    *("Sparse is better", "Readability", "Special cases aren't special", "Although practicality beats"),
    *("Errors should never", "Unless explicitly", "In the face of ambiguity, refuse", "There should be one"),
    *("Although that way may not", "Now is", "Although never is", "If the implementation is hard"),
]

# What the tests' tokens say, beyond single bytes: id → text, in the vocabularies of Qwen2.5 and 3, and of Qwen3.5
# fmt: off
TEXTS = {
    293: " b", 314: " {", 330: ' "', 397: ">\n", 411: "out", 450: "de", 497: '",', 522: "</", 606: "name", 788: '":',
    894: " any", 927: "sh", 944: "'t", 1318: "text", 1414: " know", 1513: " don", 2765: " won", 4913: '{"',
    5212: ' {"', 5392: " tool", 6023: "hi", 6659: "call", 7692: "async", 9520: "step", 11248: "}}\n",
    13477: "crement", 14172: "tool", 16252: " increment", 16370: "arguments", 17453: "Done", 22785: "_tool",
    35744: "increment", 64648: "multiply", 93054: "_multiply", 95642: '"}}\n',
    510: "</", 866: " any", 914: "'t", 1366: " know", 1459: " don", 1628: "function", 5224: " tool", 13744: "=s",
    16936: "Done", 22076: "_tool", 30091: "creenshot",
}
# fmt: on
FIRST_SPECIAL = (151643, 248044)  # ids of `<|endoftext|>`, which `QWEN_SPECIAL` begins with
# fmt: off
QWEN_SPECIAL = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>", "<tool_call>", "</tool_call>",
]
# fmt: on
QWEN_ORDINARY = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"]


def tokenizer(template: str, eos: str, pad: str, special: list[str], texts: list[str], **names: str) -> Any:
    """A tokenizer of bytes, of `texts`, which only decode, and of special tokens, with ids in this order."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = bytes_to_unicode()
    entries = [*letters.values(), *("".join(letters[byte] for byte in text.encode()) for text in texts), *special]
    base = Tokenizer(models.BPE({text: index for index, text in enumerate(entries)}, []))
    base.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    base.decoder = decoders.ByteLevel()
    base.add_special_tokens([text for text in special if text not in QWEN_ORDINARY])
    base.add_tokens([text for text in special if text in QWEN_ORDINARY])
    made = PreTrainedTokenizerFast(
        tokenizer_object=base, eos_token=eos, pad_token=pad, padding_side="left", extra_special_tokens=names
    )
    made.chat_template = (importlib.resources.files("trl") / "chat_templates" / f"{template}.jinja").read_text()
    return made


def distinct_texts() -> list[str]:
    return list(dict.fromkeys(TEXTS.values()))


def qwen_tokenizer(template: str) -> Any:
    names = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
    names |= {"vision_start_token": "<|vision_start|>", "vision_end_token": "<|vision_end|>"}
    special = [*QWEN_SPECIAL, *QWEN_ORDINARY[2:]]
    return tokenizer(template, "<|im_end|>", "<|endoftext|>", special, distinct_texts(), **names)


def with_small_ids(source: str) -> str:
    """The source of TRL's tests with the token ids of [`qwen_tokenizer`], whose vocabulary is 400 times smaller."""
    texts = distinct_texts()
    ids = {id: 256 + texts.index(text) for id, text in TEXTS.items()}
    for first in FIRST_SPECIAL:
        ids |= {first + index: 256 + len(texts) + index for index in range(len(QWEN_SPECIAL))}

    def renumbered(match: re.Match) -> str:
        return re.sub(r"\d+", lambda number: str(ids.get(int(number[0]), number[0])), match[0])

    return re.sub(r"\[\d+(?:, \d+)+\]", renumbered, source)


def plain_tokenizer(template: str, eos: str, *special: str, **names: str) -> Any:
    """`special` holds the tokens that the template writes."""
    return tokenizer(template, eos, "<pad>", ["<pad>", "<bos>", eos, *special], [], **names)


SMALL = {
    "hidden_size": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "intermediate_size": 32,
}
MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


def ids_of(tokenizer: Any) -> dict[str, int]:
    return {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}


def text_models() -> dict[str, Callable[[], tuple[Any, Any]]]:
    """Name → what makes the model and its tokenizer."""
    import transformers as tf

    def made(family: str, head: str, tokens: Any, **settings: Any) -> tuple[Any, Any]:
        config = getattr(tf, f"{family}Config")(**{**SMALL, "vocab_size": len(tokens), **ids_of(tokens), **settings})
        return getattr(tf, f"{family}For{head}")(config), tokens

    def remote() -> tuple[Any, Any]:
        return made("Llama", "CausalLM", plain_tokenizer("llama3_2", "<|eot_id|>"))

    causal, scoring = "CausalLM", "SequenceClassification"
    return {
        "Qwen2ForCausalLM-2.5": lambda: made("Qwen2", causal, qwen_tokenizer("qwen2_5")),
        "Qwen3ForCausalLM": lambda: made("Qwen3", causal, qwen_tokenizer("qwen3"), head_dim=8),
        "Qwen3MoeForCausalLM": lambda: made("Qwen3Moe", causal, qwen_tokenizer("qwen3"), head_dim=8, **MIXTURE),
        "Qwen2ForSequenceClassification-2.5": lambda: made("Qwen2", scoring, qwen_tokenizer("qwen2_5"), num_labels=1),
        "Qwen3ForSequenceClassification": lambda: made("Qwen3", scoring, qwen_tokenizer("qwen3"), num_labels=1),
        "LlamaForSequenceClassification-3.2": lambda: made(
            "Llama", scoring, plain_tokenizer("llama3_2", "<|eot_id|>"), num_labels=1
        ),
        "LlamaForCausalLM-3.2": lambda: made("Llama", causal, plain_tokenizer("llama3_2", "<|eot_id|>")),
        "RemoteForCausalLM": remote,
        "Gemma2ForCausalLM": lambda: made("Gemma2", causal, plain_tokenizer("gemma", "<end_of_turn>"), head_dim=8),
        "Cohere2ForCausalLM": lambda: made("Cohere2", causal, plain_tokenizer("cohere2", "<|END_OF_TURN_TOKEN|>")),
        "GptOssForCausalLM": lambda: made(
            "GptOss", causal, plain_tokenizer("gptoss", "<|return|>"), num_local_experts=4, num_experts_per_tok=2
        ),
        "Glm4MoeForCausalLM": lambda: made(
            "Glm4Moe",
            causal,
            plain_tokenizer("glm4moe", "<|user|>"),
            moe_intermediate_size=32,
            head_dim=2,
            n_routed_experts=4,
            num_experts_per_tok=2,
            use_qk_norm=True,
            attention_bias=True,
        ),
        "NemotronHForCausalLM-nano": lambda: made(
            "NemotronH",
            causal,
            plain_tokenizer("nemotron_3_nano", "<|im_end|>"),
            hidden_size=16,
            num_hidden_layers=3,
            layers_block_type=["mamba", "attention", "moe"],
            mamba_num_heads=8,
            mamba_head_dim=4,
            mamba_n_groups=1,
            ssm_state_size=16,
            n_routed_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=32,
            moe_shared_expert_intermediate_size=32,
        ),
    }


def qwen_tokens(tokens: Any) -> dict[str, int]:
    names = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"}
    names |= {"vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"}
    return {name: tokens.convert_tokens_to_ids(token) for name, token in names.items()}


def qwen3_5_settings(tokens: Any, **mixture: Any) -> dict[str, Any]:
    """Settings of a `Qwen3_5Config`."""
    text = {**SMALL, "hidden_size": 16, "vocab_size": len(tokens), "head_dim": 16, **ids_of(tokens), **mixture}
    text["layer_types"] = ["linear_attention", "full_attention"]
    text |= {"linear_num_key_heads": 2, "linear_num_value_heads": 2}
    text |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8}
    vision = {"hidden_size": 16, "depth": 2, "num_heads": 4, "intermediate_size": 32, "out_hidden_size": 16}
    return {"text_config": text, "vision_config": vision, **qwen_tokens(tokens)}


def has_torchvision() -> bool:
    import transformers as tf

    return tf.utils.is_torchvision_available()


def vision_models() -> dict[str, Callable[[], tuple[Any, Any]]]:
    """Name → what makes the model and its processor."""
    import transformers as tf

    text = {**SMALL, "hidden_size": 16}

    def video_processor(name: str) -> Any:
        """The only part of a processor that there is not without torchvision."""
        return getattr(tf, name)() if has_torchvision() else None

    def qwen_image_processor() -> Any:
        return tf.Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=64 * 64)

    def qwen_vl(family: str, vision: dict) -> tuple[Any, Any]:
        tokens = qwen_tokenizer("qwen2_5_vl")
        rope = {"type": "default", "mrope_section": [1, 1], "rope_type": "default", "rope_theta": 1e6}
        settings = {**text, "vocab_size": len(tokens), "rope_parameters": rope, **ids_of(tokens)}
        config = getattr(tf, f"{family}Config")(
            text_config=settings, vision_config={"depth": 2, "num_heads": 4, **vision}, **qwen_tokens(tokens)
        )
        processor = getattr(tf, f"{family}Processor")(
            qwen_image_processor(),
            tokens,
            video_processor("Qwen2VLVideoProcessor"),
            chat_template=tokens.chat_template,
        )
        return getattr(tf, f"{family}ForConditionalGeneration")(config), processor

    def qwen3_5(family: str, template: str, **mixture: Any) -> tuple[Any, Any]:
        tokens = qwen_tokenizer(template)
        config = getattr(tf, f"{family}Config")(**qwen3_5_settings(tokens, **mixture))
        return getattr(tf, f"{family}ForConditionalGeneration")(config), qwen3_processor(tokens)

    def qwen3_processor(tokens: Any) -> Any:
        images = tf.Qwen2VLImageProcessor(patch_size=16, min_pixels=32 * 32, max_pixels=64 * 64)
        videos = video_processor("Qwen3VLVideoProcessor")
        return tf.Qwen3VLProcessor(images, tokens, videos, chat_template=tokens.chat_template)

    def qwen3_vl() -> tuple[Any, Any]:
        tokens = qwen_tokenizer("qwen3_vl")
        rope = {"mrope_interleaved": True, "mrope_section": [2, 1, 1], "rope_type": "default", "rope_theta": 1e6}
        settings = {**text, "vocab_size": len(tokens), "head_dim": 8, "rope_parameters": rope, **ids_of(tokens)}
        vision = {"hidden_size": 16, "depth": 2, "num_heads": 4, "intermediate_size": 32, "out_hidden_size": 16}
        config = tf.Qwen3VLConfig(
            text_config=settings, vision_config={**vision, "deepstack_visual_indexes": [0]}, **qwen_tokens(tokens)
        )
        return tf.Qwen3VLForConditionalGeneration(config), qwen3_processor(tokens)

    def gemma3() -> tuple[Any, Any]:
        tokens = plain_tokenizer(
            "gemma3",
            "<end_of_turn>",
            *("<start_of_turn>", "<start_of_image>", "<end_of_image>", "<image_soft_token>"),
            boi_token="<start_of_image>",
            eoi_token="<end_of_image>",
            image_token="<image_soft_token>",
        )
        config = tf.Gemma3Config(
            text_config={**text, "vocab_size": len(tokens), "head_dim": 8, **ids_of(tokens)},
            vision_config={**text, "image_size": 28, "patch_size": 7, "vision_use_head": False},
            mm_tokens_per_image=4,
            boi_token_index=tokens.convert_tokens_to_ids("<start_of_image>"),
            eoi_token_index=tokens.convert_tokens_to_ids("<end_of_image>"),
            image_token_index=tokens.convert_tokens_to_ids("<image_soft_token>"),
        )
        images = tf.Gemma3ImageProcessor(size={"height": 28, "width": 28})
        processor = tf.Gemma3Processor(images, tokens, chat_template=tokens.chat_template, image_seq_length=4)
        return tf.Gemma3ForConditionalGeneration(config), processor

    def gemma4() -> tuple[Any, Any]:
        named = {"boi_token": "<|image>", "eoi_token": "<image|>", "image_token": "<|image|>"}
        named |= {"boa_token": "<|audio>", "eoa_token": "<audio|>", "audio_token": "<|audio|>"}
        marks = ["<|turn>", "<turn|>", "<|tool>", "<tool|>", "<|tool_call>", "<tool_call|>", "<|tool_response>"]
        marks += ["<tool_response|>", '<|"|>', "<|channel>", "<channel|>", "<|think|>", "<|video|>"]
        tokens = plain_tokenizer("gemma4_v5", "<eos>", *marks, *named.values(), **named)
        settings = {**text, "vocab_size": len(tokens), "head_dim": 8, "global_head_dim": 8, **ids_of(tokens)}
        settings |= {"layer_types": ["sliding_attention", "full_attention"], "num_kv_shared_layers": 0}
        settings |= {"hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": len(tokens)}
        vision = {**text, "head_dim": 8, "global_head_dim": 8, "position_embedding_size": 630}
        config = tf.Gemma4Config(
            text_config=settings,
            vision_config={**vision, "default_output_length": 70},
            audio_config=None,
            image_token_id=tokens.convert_tokens_to_ids("<|image|>"),
            video_token_id=tokens.convert_tokens_to_ids("<|video|>"),
            audio_token_id=tokens.convert_tokens_to_ids("<|audio|>"),
            boi_token_id=tokens.convert_tokens_to_ids("<|image>"),
            eoi_token_id=tokens.convert_tokens_to_ids("<image|>"),
        )
        processor = tf.Gemma4Processor(
            tf.Gemma4AudioFeatureExtractor(),
            tf.Gemma4ImageProcessor(max_soft_tokens=70, image_seq_length=70),
            tokens,
            video_processor("Gemma4VideoProcessor"),
            chat_template=tokens.chat_template,
            image_seq_length=70,
        )
        model = tf.Gemma4ForConditionalGeneration(config)
        ends = tokens.convert_tokens_to_ids(["<eos>", "<turn|>", "<|tool_response>"])
        model.generation_config.eos_token_id = ends
        return model, processor

    def llava(family: str) -> tuple[Any, Any]:
        tokens = plain_tokenizer("llava_next", "</s>", "<image>", image_token="<image>")
        image = tokens.convert_tokens_to_ids("<image>")
        vision = {**text, "model_type": "clip_vision_model", "image_size": 28, "patch_size": 14, "projection_dim": 16}
        size = {"shortest_edge": 28}
        settings = {**text, "model_type": "mistral", "vocab_size": len(tokens), **ids_of(tokens)}
        shared = {"crop_size": {"height": 28, "width": 28}, "size": size}
        pinpoints = {"image_grid_pinpoints": [[28, 56], [56, 28], [56, 56]]} if family == "LlavaNext" else {}
        config = getattr(tf, f"{family}Config")(
            text_config=settings, vision_config=vision, image_token_index=image, image_seq_length=4, **pinpoints
        )
        images = tf.LlavaNextImageProcessor(**shared, **pinpoints) if pinpoints else tf.CLIPImageProcessor(**shared)
        processor = getattr(tf, f"{family}Processor")(
            images,
            tokens,
            patch_size=14,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template=tokens.chat_template,
        )
        return getattr(tf, f"{family}ForConditionalGeneration")(config), processor

    def idefics(family: str, template: str) -> tuple[Any, Any]:
        """Splits an image into up to nine tiles, and has the whole of it as one more."""
        marks = ["<fake_token_around_image>", "<global-img>", "<image>"]
        marks += [f"<row_{row}_col_{column}>" for row in (1, 2, 3) for column in (1, 2, 3)]
        tokens = plain_tokenizer(template, "<end_of_utterance>", *marks, image_token="<image>")
        config = getattr(tf, f"{family}Config")(
            text_config={**text, "model_type": "llama", "vocab_size": len(tokens), **ids_of(tokens)},
            vision_config={**text, "image_size": 28, "patch_size": 7},
            scale_factor=2,
            image_token_id=tokens.convert_tokens_to_ids("<image>"),
        )
        images = getattr(tf, f"{family}ImageProcessor")(size={"longest_edge": 84}, max_image_size={"longest_edge": 28})
        parts = [images, tokens]
        if family == "SmolVLM":
            words = importlib.import_module("transformers.models.smolvlm.processing_smolvlm")
            words.num2words = words.num2words or str  # counts the frames of videos alone
            # Its template asks how many frames of a video there may be, also where there is none
            parts.append(video_processor("SmolVLMVideoProcessor") or SimpleNamespace(num_frames=1, fps=1, size=None))
        processor = getattr(tf, f"{family}Processor")(*parts, image_seq_len=4, chat_template=tokens.chat_template)
        return getattr(tf, f"{family}ForConditionalGeneration")(config), processor

    def lfm2_vl() -> tuple[Any, Any]:
        marks = ["<|im_start|>", "<|image_start|>", "<|image_end|>", "<|img_thumbnail|>", "<image>"]
        marks += ["<|tool_call_start|>", "<|tool_call_end|>"]
        marks += [f"<|img_row_{row}_col_{column}|>" for row in (1, 2) for column in (1, 2)]
        tokens = plain_tokenizer("lfm2_2_5_vl", "<|im_end|>", *marks, image_token="<image>")
        config = tf.Lfm2VlConfig(
            text_config={
                **text,
                "vocab_size": len(tokens),
                "layer_types": ["conv", "full_attention"],
                "block_auto_adjust_ff_dim": False,
                **ids_of(tokens),
            },
            vision_config={**text, "model_type": "siglip2_vision_model", "patch_size": 8, "num_patches": 64},
            image_token_id=tokens.convert_tokens_to_ids("<image>"),
            projector_hidden_size=16,
            downsample_factor=2,
        )
        images = tf.Lfm2VlImageProcessor(
            tile_size=32, encoder_patch_size=8, min_image_tokens=2, max_image_tokens=4, max_num_patches=64, max_tiles=4
        )
        processor = tf.Lfm2VlProcessor(images, tokens, chat_template=tokens.chat_template)
        return tf.Lfm2VlForConditionalGeneration(config), processor

    experts = {**MIXTURE, "shared_expert_intermediate_size": 32}
    qwen2_5_vision = {"hidden_size": 16, "out_hidden_size": 16, "fullatt_block_indexes": [1], "intermediate_size": 32}
    return {
        "Qwen2VLForConditionalGeneration": lambda: qwen_vl("Qwen2VL", {"hidden_size": 16, "embed_dim": 64}),
        "Qwen2_5_VLForConditionalGeneration": lambda: qwen_vl("Qwen2_5_VL", qwen2_5_vision),
        "Qwen3VLForConditionalGeneration": qwen3_vl,
        "Qwen3_5ForConditionalGeneration": lambda: qwen3_5("Qwen3_5", "qwen3_5_think"),
        "Qwen3_5ForConditionalGeneration-NoThink": lambda: qwen3_5("Qwen3_5", "qwen3_5_nothink"),
        "Qwen3_5ForConditionalGeneration-3.6": lambda: qwen3_5("Qwen3_5", "qwen3_6"),
        "Qwen3_5ForConditionalGeneration-3.8": lambda: qwen3_5("Qwen3_5", "qwen3_8"),
        "Qwen3_5MoeForConditionalGeneration-3.6": lambda: qwen3_5("Qwen3_5Moe", "qwen3_6", **experts),
        "Gemma3ForConditionalGeneration": gemma3,
        "Gemma4ForConditionalGeneration": gemma4,
        "Idefics3ForConditionalGeneration": lambda: idefics("Idefics3", "idefics3"),
        "SmolVLMForConditionalGeneration": lambda: idefics("SmolVLM", "smolvlm"),
        **({"Lfm2VlForConditionalGeneration": lfm2_vl} if has_torchvision() else {}),
        "LlavaForConditionalGeneration": lambda: llava("Llava"),
        "LlavaNextForConditionalGeneration": lambda: llava("LlavaNext"),
    }


REMOTE_CODE = """from transformers import LlamaConfig, LlamaForCausalLM


class RemoteConfig(LlamaConfig):
    model_type = "remote"


class RemoteForCausalLM(LlamaForCausalLM):
    config_class = RemoteConfig
"""


def save_remote_code(folder: Path) -> None:
    """Make the checkpoint one whose classes are in its own folder."""
    (folder / "remote.py").write_text(REMOTE_CODE)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config |= {"model_type": "remote", "architectures": ["RemoteForCausalLM"]}
    config["auto_map"] = {"AutoConfig": "remote.RemoteConfig", "AutoModelForCausalLM": "remote.RemoteForCausalLM"}
    path.write_text(json.dumps(config))


def build(folder: Path) -> None:
    """Build the models that `folder` lacks."""
    import torch

    for name, make in {**text_models(), **vision_models()}.items():
        repository = folder / "hub" / f"models--{ORGANIZATION}--tiny-{name}"
        if (repository / "refs" / "main").exists():
            continue
        torch.manual_seed(0)
        model, processor = make()
        snapshot = repository / "snapshots" / REVISION
        model.save_pretrained(snapshot)
        processor.save_pretrained(snapshot)
        if name.startswith("Remote"):
            save_remote_code(snapshot)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(REVISION)
        print(f"built {name}")


def data(path: str, name: str | None = None, split: str | None = None, streaming: bool = False) -> Any:
    """What stands in for `datasets.load_dataset` in TRL's tests."""
    import numpy
    from datasets import Dataset, DatasetDict, Features, Image, IterableDatasetDict, List, Value

    kind = path.rpartition("/")[2]
    conversational = name is not None and name.startswith("conversational")
    prompts = [[{"role": "user", "content": text}] if conversational else text for text in SENTENCES]
    columns: dict[str, list] = {"prompt": prompts}
    features = None
    if kind.startswith("zen-"):
        generator = numpy.random.default_rng(0)
        count = 2 if "multi" in kind else 1
        images = [
            [generator.integers(0, 255, (48 + 8 * (row % 2), 40, 3), dtype=numpy.uint8) for _ in range(count)]
            for row in range(len(prompts))
        ]
        columns |= {"images": images} if count > 1 else {"image": [pictures[0] for pictures in images]}
        message = {"role": Value("string"), "content": Value("string")}
        features = Features(
            {"prompt": List(message), **({"images": List(Image())} if count > 1 else {"image": Image()})}
        )
    splits = DatasetDict()
    for part, rows in (("train", slice(None)), ("test", slice(2))):
        values = {column: entries[rows] for column, entries in columns.items()}
        splits[part] = Dataset.from_dict(values, features=features)
    chosen = IterableDatasetDict({part: rows.to_iterable_dataset() for part, rows in splits.items()})
    return (chosen if streaming else splits)[split] if split else chosen if streaming else splits


class Plugin:
    """Of pytest: TRL's test file with data that stands in and, with `ours`, with our classes."""

    def __init__(self, ours: bool):
        self.ours = ours

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        from arpo_trl import ARPOConfig, ARPOTrainer

        def config(*args: Any, **kwargs: Any) -> ARPOConfig:
            generations = kwargs.get("num_generations", 8)
            return ARPOConfig(
                *args, **{"num_generations": generations, "num_initial_generations": generations, **kwargs}
            )

        class Trainer(ARPOTrainer):
            def __init__(self, model: Any = None, reward_funcs: Any = None, args: Any = None, **kwargs: Any) -> None:
                super().__init__(model, reward_funcs, args or config("out"), **kwargs)

        for module in {item.module for item in items}:
            module.load_dataset = data
            if self.ours:
                module.GRPOConfig, module.GRPOTrainer = config, Trainer


def run(checkout: Path, folder: Path, ours: bool, arguments: list[str]) -> dict[str, str]:
    """Run the file in a process of its own; the outcome of each test."""
    report = folder / f"{'ours' if ours else 'trl'}.xml"
    report.unlink(missing_ok=True)
    command = [sys.executable, __file__, "--folder", str(folder), "--one", "ours" if ours else "trl", str(checkout)]
    subprocess.run([*command, *arguments], check=False)
    outcomes = {}
    for case in ElementTree.parse(report).iter("testcase"):
        kinds = [child.tag for child in case if child.tag in ("failure", "error", "skipped")]
        outcomes[f"{case.get('classname')}::{case.get('name')}"] = kinds[0] if kinds else "passed"
    return outcomes


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("checkout", type=Path, help="a checkout of TRL, at the version that is installed")
    parser.add_argument("--folder", type=Path, default=Path("trl-suite"), help="where models and reports are kept")
    parser.add_argument("--one", choices=("trl", "ours"), help="run the file once and stop")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="arguments for pytest")
    options = parser.parse_args()
    checkout, folder = options.checkout.resolve(), options.folder.resolve()
    os.environ |= {"HF_HUB_CACHE": str(folder / "hub"), "HF_HUB_OFFLINE": "1"}  # read when transformers is imported
    if options.one is None:
        folder.mkdir(parents=True, exist_ok=True)
        build(folder)
        outcomes = [run(checkout, folder, ours, options.arguments) for ours in (False, True)]
        worse = [test for test, outcome in outcomes[0].items() if outcome == "passed" != outcomes[1].get(test)]
        for title, counted in zip(("TRL's class", "ours"), outcomes, strict=True):
            kinds = sorted(set(counted.values()))
            print(f"{title}: " + ", ".join(f"{list(counted.values()).count(kind)} {kind}" for kind in kinds))
        print(f"{len(worse)} pass with TRL's class and not with ours", *worse, sep="\n  ")
        return bool(worse)
    import pytest

    tests = folder / "tests"
    tests.mkdir(exist_ok=True)
    for source in (checkout / "tests").glob("*.py"):
        shutil.copy(source, tests)
    path = tests / "test_grpo_trainer.py"
    path.write_text(with_small_ids(path.read_text()))
    report = folder / f"{options.one}.xml"
    return pytest.main(
        [
            str(path),
            *("-p", "no:cacheprovider", "-q", f"--junitxml={report}", f"--rootdir={folder}"),
            *options.arguments,
        ],
        plugins=[Plugin(options.one == "ours")],
    )


if __name__ == "__main__":
    sys.exit(main())
