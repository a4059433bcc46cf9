"""A rollout reads no token twice, and samples what a plain `generate` samples."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from test_trainer_options import build, records
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from arpo_trl.rollout.engines import prefix_cache
from arpo_trl.rollout.engines.prefix_cache import PrefixCache, cache_obstacle, longest_prefixes, shared_stems

SHAPE = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
QWEN2 = {name: value for name, value in SHAPE.items() if name != "head_dim"}
FAMILIES = {
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**QWEN2)),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SHAPE)),
    "llama": (LlamaForCausalLM, LlamaConfig(**SHAPE)),
}
GREEDY = GenerationConfig(do_sample=False, max_new_tokens=9, pad_token_id=0, eos_token_id=1)


def build_model(family: str):
    torch.manual_seed(0)
    model_class, config = FAMILIES[family]
    return model_class(config).eval()


def padded(contexts):
    width = max(map(len, contexts))
    ids = torch.tensor([[0] * (width - len(context)) + context for context in contexts])
    mask = torch.tensor([[0] * (width - len(context)) + [1] * len(context) for context in contexts])
    return ids, mask


def read(cache):
    return cache.lookups["prefix_cache_queries"] - cache.lookups["prefix_cache_hits"]


class Rollout:
    """Waves of random forks, ends and supplements, each sampled with the cache and without."""

    def __init__(self, model, seed=0, generation_config=GREEDY):
        self.model, self.rng, self.config = model, random.Random(seed), generation_config
        self.cache = PrefixCache()
        self.read: set[tuple] = set()  # prefixes whose last token has been read
        self.width = 0

    def tokens(self, count):
        return [self.rng.randint(2, 49) for _ in range(count)]

    @torch.no_grad()
    def wave(self, contexts):
        """Check one wave; return what was sampled, and how many tokens were read and had to be."""
        ids, mask = padded(contexts)
        before = read(self.cache)
        cached = self.cache.generate(self.model, self.model.generate, ids, mask, self.config)
        plain = self.model.generate(input_ids=ids, attention_mask=mask, generation_config=self.config)
        assert torch.equal(cached, plain)
        new = {tuple(c[:n]) for c in contexts for n in range(1, len(c))} - self.read
        outputs = cached[:, ids.size(1) :].tolist()
        for context, output in zip(contexts, outputs, strict=True):
            whole = context + output
            self.read |= {tuple(whole[:n]) for n in range(1, len(whole))}  # the last one was not read
        return outputs, read(self.cache) - before, len(new) + len(contexts)

    def next_contexts(self, contexts, outputs):
        following = []
        for context, output in zip(contexts, outputs, strict=True):
            if self.rng.random() < 0.7:  # goes on after a tool result
                following.append(context + output[: self.rng.randint(1, 9)] + self.tokens(self.rng.randint(1, 12)))
            if self.rng.random() < 0.4:  # a fork leaves where this segment began
                following.append(list(context))
        return following or [contexts[0]]


@pytest.mark.filterwarnings("error::FutureWarning")  # transformers renamed the argument that takes a cache
@pytest.mark.parametrize("family", FAMILIES)
def test_waves_equal_plain_generate_and_read_nothing_twice(family, monkeypatch):
    monkeypatch.setattr(prefix_cache, "_MIN_STEM", 1)
    for seed in range(4):
        rollout = Rollout(build_model(family), seed)
        system = rollout.tokens(20)
        prompts = [system + rollout.tokens(n) for n in (3, 9, 9)]
        contexts = [prompt for prompt in prompts for _ in range(3)]
        for _ in range(5):
            outputs, tokens, needed = rollout.wave(contexts)
            assert tokens <= needed
            contexts = rollout.next_contexts(contexts, outputs)


def test_a_group_of_equal_prompts_is_read_once():
    rollout = Rollout(build_model("qwen3"))
    system = rollout.tokens(40)
    prompts = [system + rollout.tokens(30), system + rollout.tokens(20)]
    _, tokens, _ = rollout.wave([prompts[0]] * 8 + [prompts[1]] * 8)
    # 40 of the system prompt, 29 and 19 of the two, and the last token of each row, from which it samples
    assert tokens == 40 + 29 + 19 + 16


def test_a_supplement_finds_its_prompt_in_another_row():
    rollout = Rollout(build_model("qwen3"))
    prompt = rollout.tokens(30)
    outputs, _, _ = rollout.wave([prompt])
    result = rollout.tokens(7)
    rollout.wave([prompt + outputs[0] + result])
    _, tokens, _ = rollout.wave([prompt] * 4)
    assert tokens == 4


def test_contexts_named_for_later_are_kept():
    rollout = Rollout(build_model("qwen3"))
    first, second = rollout.tokens(30), rollout.tokens(25)
    outputs, _, _ = rollout.wave([first, second])
    slow = second + outputs[1]  # its tool takes two waves
    rollout.cache.keep([slow])
    outputs, _, _ = rollout.wave([first + outputs[0] + rollout.tokens(5)])
    _, tokens, _ = rollout.wave([slow + rollout.tokens(5)])
    assert tokens == 6, "its last token, which had been sampled but not read, and five of the result"
    rollout.cache.keep([])
    rollout.wave([first])
    _, tokens, _ = rollout.wave([second])
    assert tokens == 25, "what is not named is not kept: memory is that of one generate"


def test_an_adapter_takes_part():
    base = build_model("qwen3")
    before = Rollout(base).wave([[5, 6, 7, 8]])[0]
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj", "up_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    rollout = Rollout(model.eval())
    contexts = [[5, 6, 7, 8]]
    for _ in range(3):
        outputs, _, _ = rollout.wave(contexts)
        contexts = rollout.next_contexts(contexts, outputs)
    assert Rollout(model).wave([[5, 6, 7, 8]])[0] != before, "the adapter must change something, or nothing is shown"


@pytest.mark.parametrize(
    "model, config",
    [
        (build_model("qwen3"), GenerationConfig(**{**GREEDY.to_diff_dict(), "use_cache": False})),
        (build_model("qwen3"), GenerationConfig(**{**GREEDY.to_diff_dict(), "cache_implementation": "static"})),
        (build_model("qwen3"), GenerationConfig(**{**GREEDY.to_diff_dict(), "num_beams": 2})),
    ],
    ids=["no cache", "static", "beams"],
)
def test_other_caches_start_anew(model, config):
    assert cache_obstacle(model, config) is not None
    assert cache_obstacle(build_model("qwen3"), GREEDY) is None
    rollout = Rollout(model.eval(), generation_config=config)
    outputs, tokens, _ = rollout.wave([[5, 6, 7] * 5, [8, 9] * 5])
    rollout.wave([[5, 6, 7] * 5 + outputs[0]])
    assert tokens == 0


def test_stems_are_the_outermost_shared_prefixes():
    def row(text):
        return np.array([ord(character) for character in text])

    system, first, second = "s" * 20, "a" * 20, "b" * 20
    contexts = [
        row(text) for text in (system + first + "x", "lonely" * 9, system + second + "y", system + first + "z")
    ]
    assert [stem.tolist() for stem in shared_stems(contexts, [0, 0, 0, 0])] == [row(system).tolist()]
    assert [stem.tolist() for stem in shared_stems(contexts, [20, 0, 20, 20])] == [row(system + first).tolist()]
    assert shared_stems(contexts, [40, 0, 20, 40]) == []
    # The last token is left to `generate`, which needs its logits
    assert [len(stem) for stem in shared_stems([row(system)] * 3, [0, 0, 0])] == [19]


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_the_longest_known_prefix_is_found(data):
    rows = st.lists(st.integers(0, 2), min_size=1, max_size=8).map(lambda ids: np.array(ids))
    contexts, known = data.draw(st.lists(rows, max_size=6)), data.draw(st.lists(rows, max_size=6))

    def common(left, right):
        return next(
            (i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right))
        )

    for context, (index, length) in zip(contexts, longest_prefixes(contexts, known), strict=True):
        assert length == max((common(context, other) for other in known), default=0)
        assert (index == -1) if length == 0 else common(context, known[index]) == length


@pytest.mark.parametrize("protocol", ["chat_template", "tags"])
def test_a_training_run_rolls_out_the_same_with_and_without(agent_dirs, tokenizer, tmp_path, protocol):
    rollouts = []
    for sharing in (True, False):
        folder = tmp_path / str(sharing)
        trainer = build(
            agent_dirs, tokenizer, folder, protocol, prefix_sharing=sharing, learning_rate=0.0, seed=1, max_steps=2
        )
        trainer.train()
        assert trainer._engine._cache is None, "its memory is free for the training step"
        rollouts.append([(record["kind"], record["completion_ids"]) for record in records(folder)])
    assert rollouts[0] == rollouts[1]
    assert {"initial", "fork"} <= {kind for kind, _ in rollouts[0]}
