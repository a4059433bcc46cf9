"""Write the tables of docs/scaling.md from the models' shapes and the formulas of the page.

    python docs/make_scaling.py

Nothing here is measured. What it does NOT count: fragmentation, CUDA's own memory, communication buffers.
"""

import re
from pathlib import Path
from typing import NamedTuple

PAGE = Path(__file__).parent / "scaling.md"
GIB = 2**30


class Shape(NamedTuple):
    """What a model's config.json says."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocab: int
    tied: bool = False
    head_dim: int = 128
    qkv_bias: bool = False
    qk_norm: bool = False


MODELS = {
    "Qwen2.5-3B": Shape(36, 2048, 11008, 16, 2, 151_936, tied=True, qkv_bias=True),
    "Qwen2.5-7B": Shape(28, 3584, 18944, 28, 4, 152_064, qkv_bias=True),
    "Llama-3.1-8B": Shape(32, 4096, 14336, 32, 8, 128_256),
    "Qwen3-8B": Shape(36, 4096, 12288, 32, 8, 151_936, qk_norm=True),
    "Qwen3-14B": Shape(40, 5120, 17408, 40, 8, 151_936, qk_norm=True),
}
RANK = 16  # of LoRA, on every linear layer of the blocks
COMPLETION, PROMPT, ROWS = 4096, 1536, 16  # the paper's lengths, one group


def linear_shapes(shape: Shape) -> list[tuple[int, int]]:
    """Inputs and outputs of the linear layers of one block: q, k, v, o, gate, up, down."""
    query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    attention = [(shape.hidden, query), (shape.hidden, key), (shape.hidden, key), (query, shape.hidden)]
    return attention + [(shape.hidden, shape.intermediate)] * 2 + [(shape.intermediate, shape.hidden)]


def linear_parameters(shape: Shape) -> int:
    """Weights of the linear layers of all blocks: what a 4-bit model quantizes."""
    return shape.layers * sum(inputs * outputs for inputs, outputs in linear_shapes(shape))


def parameters(shape: Shape) -> int:
    """All parameters."""
    bias = (shape.heads + 2 * shape.kv_heads) * shape.head_dim if shape.qkv_bias else 0
    norms = 2 * shape.hidden + (2 * shape.head_dim if shape.qk_norm else 0)
    embeddings = shape.vocab * shape.hidden * (1 if shape.tied else 2)
    return linear_parameters(shape) + shape.layers * (bias + norms) + shape.hidden + embeddings


def lora_parameters(shape: Shape, rank: int = RANK) -> int:
    """Parameters of A (inputs × rank) and B (rank × outputs) beside every linear layer."""
    return shape.layers * sum(rank * (inputs + outputs) for inputs, outputs in linear_shapes(shape))


def training_bytes(shape: Shape, method: str, gpus: int = 1) -> float:
    """Weights, gradients and optimizer states on each GPU."""
    whole, adapter = parameters(shape), lora_parameters(shape)
    if method == "mixed precision":  # float32 weights, gradients, two moments of Adam
        return 16 * whole
    if method == "bfloat16":  # all four in bfloat16
        return 8 * whole
    if method == "ZeRO-2":  # bfloat16 weights whole; gradients, float32 copy and moments shared out
        return 2 * whole + 14 * whole / gpus
    if method == "ZeRO-3":
        return 16 * whole / gpus
    if method == "LoRA":
        return 2 * whole + 16 * adapter
    quantized = linear_parameters(shape)  # QLoRA
    return (4 + 0.127) / 8 * quantized + 2 * (whole - quantized) + 16 * adapter


def kv_bytes(shape: Shape) -> int:
    """Bytes of keys and values of one token, in bfloat16."""
    return 2 * shape.layers * shape.kv_heads * shape.head_dim * 2


def checkpoint_bytes(shape: Shape, tokens: int) -> int:
    """What gradient checkpointing keeps: the input of each block, in bfloat16."""
    return 2 * shape.layers * shape.hidden * tokens


def block_bytes(shape: Shape, tokens: int) -> int:
    """
    What one block holds while it is computed again: about 8 vectors of `hidden`, 3 of `intermediate`, in bfloat16.
    """
    return 2 * (8 * shape.hidden + 3 * shape.intermediate) * tokens


def tables() -> dict[str, str]:
    """The tables of the page by name."""
    methods = ["mixed precision", "bfloat16", "LoRA", "QLoRA"]
    state = ["| model | parameters | " + " | ".join(methods) + " | ZeRO-2, 8 GPUs | ZeRO-3 or FSDP2, 8 GPUs |"]
    state.append("|---" * (len(methods) + 4) + "|")
    tokens = [
        "| model | KV of a token | KV of a group | checkpoints of a row | one block of a row |",
        "|---|---|---|---|---|",
    ]
    row = PROMPT + COMPLETION
    for name, shape in MODELS.items():
        cells = [training_bytes(shape, method) for method in methods]
        cells += [training_bytes(shape, method, 8) for method in ("ZeRO-2", "ZeRO-3")]
        sizes = " | ".join(f"{cell / GIB:.1f}" for cell in cells)
        state.append(f"| {name} | {parameters(shape) / 1e9:.2f} B | {sizes} |")
        group, kept, block = kv_bytes(shape) * row * ROWS, checkpoint_bytes(shape, row), block_bytes(shape, row)
        sizes = " | ".join(f"{size / GIB:.2f}" for size in (group, kept, block))
        tokens.append(f"| {name} | {kv_bytes(shape) // 1024} KiB | {sizes} |")
    return {"state": "\n".join(state), "tokens": "\n".join(tokens)}


def page() -> str:
    """The page with its tables as they should be."""
    text = PAGE.read_text(encoding="utf-8")
    for name, table in tables().items():
        text = re.sub(rf"(<!-- table: {name} -->\n).*?(?=\n\n|\Z)", rf"\g<1>{table}", text, flags=re.DOTALL)
    return text


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
