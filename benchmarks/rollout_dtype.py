"""
CPU time of a rollout's segments in float32, with autocast, and with a copy of the weights in bfloat16, in one run.

    python benchmarks/rollout_dtype.py
    python benchmarks/rollout_dtype.py --hidden 576 --layers 30 --repeats 2

The model has the shape of SmolLM2-135M and random weights; 16 rows of one prompt of 40 tokens sample 64 tokens, read a
result of 40 and sample 64 more, through the trainer's engine. The sides take turns. A second table has the attention
of one query a row in a layer of this model: torch's in both data types, and what a copy on a CPU does instead. A third
has that together with the token's keys and values put behind those of 230 tokens: in transformers' layer of a cache,
and in ours.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import DynamicLayer

from arpo_trl.rollout.engines.growing_layers import GrowingLayer
from arpo_trl.rollout.engines.transformers import TransformersEngine, generate_ids
from arpo_trl.rollout.engines.weights_copy import one_query_attention

ROWS, PROMPT, SEGMENT, RESULT = 16, 40, 64, 40


def seconds(model: LlamaForCausalLM, dtype: torch.dtype | None, autocast: bool) -> float:
    """CPU seconds of two segments, the copy of the weights included."""
    settings = GenerationConfig(max_new_tokens=SEGMENT, do_sample=True, top_k=0, eos_token_id=[1], pad_token_id=0)

    def generate(contexts: list[list[int]], images: Sequence[Sequence[Any]]) -> list[list[int]]:
        with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
            return generate_ids(model, contexts, settings)

    engine = TransformersEngine(lambda: model, generate, None, 20, 1.0, keeps=True, idle_token=1, dtype=dtype)
    contexts = [list(range(2, 2 + PROMPT)) for _ in range(ROWS)]
    started = time.process_time()
    with engine.rollout():
        samples = engine.sample(contexts, [SEGMENT] * ROWS)
        result = list(range(100, 100 + RESULT))
        contexts = [context + sample.ids + result for context, sample in zip(contexts, samples, strict=True)]
        engine.sample(contexts, [SEGMENT] * ROWS)
    return time.process_time() - started


def attention_milliseconds(context: int = 250, repeats: int = 50) -> dict[str, float]:
    """CPU milliseconds of the attention of `ROWS` single queries to `context` keys each."""
    query, key = torch.randn(ROWS, 9, 1, 64), torch.randn(ROWS, 3, context, 64)
    half_query, half_key = query.bfloat16(), key.bfloat16()
    ways = {
        "sdpa, float32": lambda: scaled_dot_product_attention(query, key, key, enable_gqa=True),
        "sdpa, bfloat16": lambda: scaled_dot_product_attention(half_query, half_key, half_key, enable_gqa=True),
        "ours, bfloat16": lambda: one_query_attention(torch.nn.Module(), half_query, half_key, half_key, None),
    }
    times = {}
    for name, way in ways.items():
        way()
        started = time.process_time()
        for _ in range(repeats):
            way()
        times[name] = (time.process_time() - started) / repeats * 1e3
    return times


def token_milliseconds(rows: int, dtype: torch.dtype, context: int = 230, layers: int = 10) -> dict[str, float]:
    """Least CPU milliseconds of three that one layer takes to put a token behind its context and to attend to all."""
    query = torch.randn(rows, 9, 1, 64, dtype=dtype)
    token, held = torch.randn(rows, 3, 1, 64, dtype=dtype), torch.randn(rows, 3, context, 64, dtype=dtype)
    times = {}
    for kind in (DynamicLayer, GrowingLayer):
        cache = [kind() for _ in range(layers)]
        for layer in cache:
            layer.update(held.clone(), held.clone())
        taken = []
        for _ in range(3):
            started = time.process_time()
            for layer in cache:
                keys, values = layer.update(token, token)
                if dtype == torch.bfloat16:
                    one_query_attention(torch.nn.Module(), query, keys, values, None)
                else:
                    scaled_dot_product_attention(query, keys, values, enable_gqa=True)
            taken.append((time.process_time() - started) / layers * 1e3)
        times[kind.__name__] = min(taken)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=2)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=arguments.hidden,
        intermediate_size=arguments.hidden * 8 // 3,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.hidden // 64,
        num_key_value_heads=arguments.hidden // 192,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    sides = {"float32": (None, False), "autocast": (None, True), "bfloat16 copy": (torch.bfloat16, False)}
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(arguments.repeats):
        for name, side in sides.items():
            times[name].append(seconds(model, *side))
    base = statistics.median(times["float32"])
    for name, milliseconds in attention_milliseconds().items():
        print(f"{name:>14}: {milliseconds:6.2f} ms of CPU time")
    for dtype in (torch.bfloat16, torch.float32):
        for rows in (16, 50):
            told = token_milliseconds(rows, dtype)
            print(f"{dtype}, {rows} rows: " + ", ".join(f"{name} {taken:.2f} ms" for name, taken in told.items()))
    for name, taken in times.items():
        print(f"{name:>14}: {statistics.median(taken):6.1f} s of CPU time, {base / statistics.median(taken):.2f}×")


if __name__ == "__main__":
    main()
