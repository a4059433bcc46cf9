"""
The prefix cache with every kind of layer: windows, recurrent and convolution states, layers without, and
mixtures.
"""

import random

import hybrid_models
import pytest
import torch
from test_prefix_cache import GREEDY, padded, read
from transformers import GenerationConfig, StoppingCriteriaList

from arpo_trl.rollout.engines import cache_layers, prefix_cache
from arpo_trl.rollout.engines.prefix_cache import PrefixCache
from arpo_trl.rollout.engines.transformers import RowStops

SAMPLED = GenerationConfig(do_sample=True, temperature=0.7, top_k=0, max_new_tokens=9, pad_token_id=0, eos_token_id=1)
FAMILIES = list(hybrid_models.configs())
MODELS: dict = {}


def model_of(family):
    if family not in MODELS:
        MODELS[family] = hybrid_models.build(family)
    return MODELS[family]


class Rollout:
    """Random waves of contexts, each sampled with the cache and by a plain `generate` of the same seed."""

    def __init__(self, model, seed, config):
        self.model, self.rng, self.config, self.seed = model, random.Random(seed), config, seed
        self.cache = PrefixCache(every_start=seed % 2 == 0)
        self.recurrent = cache_layers.is_recurrent(model.config)
        self.known: set[tuple] = set()  # prefixes from which a row can go on

    def tokens(self, low, high):
        return [self.rng.randint(3, 49) for _ in range(self.rng.randint(low, high))]

    def generate(self, generate, ids, mask, limits):
        torch.manual_seed(self.seed)
        criteria = StoppingCriteriaList([RowStops(limits)])
        return generate(input_ids=ids, attention_mask=mask, generation_config=self.config, stopping_criteria=criteria)[
            :, ids.size(1) :
        ].tolist()

    @torch.no_grad()
    def wave(self, contexts):
        """Check one wave; return the segments."""
        ids, mask = padded(contexts)
        limits = [self.rng.randint(1, 9) for _ in contexts]
        before = read(self.cache)
        cached = self.generate(
            lambda **inputs: self.cache.generate(self.model, self.model.generate, **inputs), ids, mask, limits
        )
        assert cached == self.generate(self.model.generate, ids, mask, limits)
        new = set()
        for context in contexts:
            prefixes = [tuple(context[:n]) for n in range(1, len(context))]
            new |= set(prefixes[max((n for n, prefix in enumerate(prefixes, 1) if prefix in self.known), default=0) :])
        if self.cache._every_start or not self.recurrent:
            assert read(self.cache) - before <= len(new) + len(contexts)
        segments = []
        for context, output, limit in zip(contexts, cached, limits, strict=True):
            segment = output[: min(limit, output.index(1) + 1 if 1 in output else limit)]
            segments.append(segment)
            whole = context + segment[:-1]  # the last token has not been read
            places = (len(context) - 1, len(whole)) if self.recurrent else range(1, len(whole) + 1)
            self.known |= {tuple(whole[:n]) for n in places}
        return segments

    def run(self, waves):
        system = self.tokens(20, 20)
        prompts = [system + self.tokens(3, 12) for _ in range(2)]
        rows = [(prompt, prompt) for prompt in prompts for _ in range(2)]
        outside = []
        for _ in range(waves):
            segments = self.wave([context for _, context in rows])
            returning, outside, following = outside, [], []
            for (prompt, context), segment in zip(rows, segments, strict=True):
                fate = self.rng.random()
                if fate < 0.45:
                    following.append((prompt, context + segment + self.tokens(1, 12)))
                elif fate < 0.7:  # its tool takes a wave more
                    outside.append((prompt, context + segment))
                if self.rng.random() < 0.3:
                    following.append((prompt, context))  # a fork leaves where this segment began
                if self.rng.random() < 0.15:
                    following.append((prompt, prompt))  # a supplement
            self.cache.keep([context for _, context in outside])
            rows = following + [(prompt, context + self.tokens(1, 12)) for prompt, context in returning]
            if not rows:
                rows, outside = [(prompt, context + self.tokens(1, 12)) for prompt, context in outside], []
            if not rows:
                return


@pytest.mark.parametrize("config", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("family", FAMILIES)
def test_random_waves_equal_plain_generate_and_read_nothing_twice(family, config, monkeypatch):
    monkeypatch.setattr(prefix_cache, "_MIN_STEM", 1)
    for seed in range(4):
        Rollout(model_of(family), seed, config).run(5)
