"""
Small models of today's families that vLLM's CPU engine runs, with random weights, and a protocol that these can speak:
a letter calls the tool.

Where the engine cannot run a family as it is, [`repair_lfm2`] and [`prepare_qwen3_5`] say why, and mend it for a test.
"""

import importlib.machinery
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hybrid_models
import multimodal
import tiny
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2VLImageProcessor, Qwen3VLProcessor
from transformers.utils import is_torchvision_available

from arpo_trl.protocols import TagsProtocol, Turn
from arpo_trl.tools import ToolCall

VOWELS = "aeiou"


class VowelProtocol(TagsProtocol):
    """A vowel ends a turn and calls `look`, which random weights write often; results are those of the tags."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.stop_strings = list(VOWELS)

    def parse(self, ids, context, tools):
        found = [letter for letter in self.tokenizer.decode(ids) if letter in VOWELS]
        return Turn(ids, [ToolCall("look", {"letter": found[0]})] if found else [])


def look(letter: str) -> list:
    """
    Show a letter.

    Args:
        letter: Which.
    """
    place = VOWELS.index(letter)
    picture = Image.new("RGB", (32 + 32 * (place % 2), 64), (50 * place, 90, 200 - 40 * place))
    return [{"type": "image", "image": picture}, {"type": "text", "text": f"That is {letter}."}]


def tell(letter: str) -> str:
    """
    Tell of a letter.

    Args:
        letter: Which.
    """
    return f"That is {letter}."


tell.__name__ = "look"  # the name that the model calls


def with_large_weights(model: Any, std: float) -> Any:
    """The model with weights so large that each layer changes what is sampled."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=std)
    return model


@torch.no_grad()
def never_writing(model: Any, token: int) -> Any:
    """The model, whose first channel is the same at each token of text, and says that `token` is not the next one."""
    model.get_input_embeddings().weight[:, 0] = 3.0
    for layer in model.model.language_model.layers:
        layer.self_attn.o_proj.weight[0] = layer.mlp.down_proj.weight[0] = 0.0
    model.lm_head.weight[:, 0] = 0.0
    model.lm_head.weight[token, 0] = -20.0
    return model


def build_qwen3_vl(folder: Path) -> None:
    """Save Qwen3-VL with heads of 32, which vLLM wants, and its processor without the part for videos."""
    model, processor = multimodal.build("Qwen3-VL")
    config = model.config
    config.text_config.update({"head_dim": 32, "hidden_size": 64, "intermediate_size": 128})
    config.text_config.rope_parameters["mrope_section"] = [8, 4, 4]
    config.vision_config.update({"hidden_size": 64, "num_heads": 2, "out_hidden_size": 64})
    model = with_large_weights(type(model)(config), std=0.1)
    never_writing(model, config.image_token_id).save_pretrained(folder)
    processor.tokenizer.save_pretrained(folder)
    processor.image_processor.save_pretrained(folder)


def qwen3_vl_processor(folder: str | Path, **kwargs: Any) -> Qwen3VLProcessor:
    """What [`build_qwen3_vl`] has saved."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    Qwen3VLProcessor.check_argument_for_proper_class = lambda *args: None
    images = Qwen2VLImageProcessor.from_pretrained(folder)
    processor = Qwen3VLProcessor(images, tokenizer, None, chat_template=tokenizer.chat_template)
    # What vLLM asks of videos before it knows that there are none
    size = {"shortest_edge": 32 * 32, "longest_edge": 64 * 64}
    processor.video_processor = types.SimpleNamespace(size=size, patch_size=16, merge_size=2, temporal_patch_size=2)
    vars(processor.video_processor).update({"fps": 2, "min_frames": 2, "max_frames": 2})
    processor.apply_chat_template = multimodal.as_tensors(processor.apply_chat_template)
    return processor


def build_text(family: str, folder: Path) -> None:
    """Save a model of `hybrid_models.py` with the tokenizer of `tiny.py`."""
    tokenizer = tiny.build_tokenizer()
    settings = {"vocab": len(tokenizer), "window": 16, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    config = hybrid_models.configs(hidden=256, **settings, eos_token_id=tokenizer.eos_token_id)[family]
    if family == "lfm2":  # as published checkpoints have it, in names that vLLM reads
        config.update({"tie_word_embeddings": True, "conv_dim": config.hidden_size, "block_dim": config.hidden_size})
    if family == "qwen3_5":  # the one size of a head that the CPU engine has kernels for
        config.update({"linear_key_head_dim": 128, "linear_value_head_dim": 128})
    with_large_weights(AutoModelForCausalLM.from_config(config), std=0.05).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def stand_in_for_torchvision() -> None:
    """
    Let vLLM import its multimodal models where there is no torchvision, of which they need no more than the names as
    long as no video is read.
    """
    if is_torchvision_available():
        return
    for name in ("torchvision", "torchvision.transforms", "torchvision.transforms.v2"):
        module = types.ModuleType(name)
        module.__path__ = []
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        sys.modules[name] = module
    sys.modules["torchvision.transforms.v2"].functional = None


def register(architecture: str, module: str) -> None:
    """Have vLLM take a model's class from this process: it would ask another one, which has no stand-in."""
    from importlib import import_module

    from vllm import ModelRegistry

    found = import_module(f"vllm.model_executor.models.{module}")
    ModelRegistry.register_model(architecture, getattr(found, architecture))


def repair_lfm2(monkeypatch: Any) -> None:
    """
    Have vLLM 0.31's CPU engine run LFM2. It packs convolutions for a kernel that takes a width of 4, where LFM2 has 3,
    and its kernel of rotary embeddings turns wrong what comes with a dimension for heads, as LFM2 hands it over.
    """
    from vllm import _custom_ops
    from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

    monkeypatch.delattr(_custom_ops, "causal_conv1d_weight_pack", raising=False)
    monkeypatch.setattr(RotaryEmbedding, "forward_cpu", RotaryEmbedding.forward_native)


def prepare_qwen3_5(monkeypatch: Any) -> None:
    """
    Have vLLM 0.31's CPU engine take new weights for Qwen3.5, whose convolutions it would else pack into a form that no
    weight push can write to.
    """
    stand_in_for_torchvision()
    import vllm.kernels.vllm_c  # noqa: F401  the libraries are chosen by what the processor can do

    register("Qwen3_5ForCausalLM", "qwen3_5")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)


def prepare_qwen3_vl(setattr: Callable = setattr) -> None:
    """Have vLLM run what [`build_qwen3_vl`] has saved."""
    stand_in_for_torchvision()
    register("Qwen3VLForConditionalGeneration", "qwen3_vl")
    setattr(Qwen3VLProcessor, "from_pretrained", staticmethod(qwen3_vl_processor))


NO_VIDEOS = {"limit_mm_per_prompt": {"video": 0}}
