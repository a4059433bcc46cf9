"""
CPU time of a rollout's segments in float32, with autocast, and with a copy of the weights in bfloat16, in one run.

    python benchmarks/rollout_dtype.py
    python benchmarks/rollout_dtype.py --hidden 576 --layers 30 --repeats 2

The model has the shape of SmolLM2-135M and random weights; 16 rows of one prompt of 40 tokens sample 64 tokens, read a
result of 40 and sample 64 more, through the trainer's engine. The sides take turns. A second table has the attention
of one query a row in a layer of this model: torch's in both data types, and what a copy on a CPU does instead.
"""

import argparse
import statistics
import time
from contextlib import nullcontext

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from arpo_trl.rollout.engines.transformers import TransformersEngine, generate_ids
from arpo_trl.rollout.engines.weights_copy import one_query_attention

ROWS, PROMPT, SEGMENT, RESULT = 16, 40, 64, 40


def seconds(model: LlamaForCausalLM, dtype: torch.dtype | None, autocast: bool) -> float:
    """CPU seconds of two segments, the copy of the weights included."""
    settings = GenerationConfig(max_new_tokens=SEGMENT, do_sample=True, top_k=0, eos_token_id=[1], pad_token_id=0)

    def generate(contexts: list[list[int]]) -> list[list[int]]:
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
    for name, taken in times.items():
        print(f"{name:>14}: {statistics.median(taken):6.1f} s of CPU time, {base / statistics.median(taken):.2f}×")


if __name__ == "__main__":
    main()
