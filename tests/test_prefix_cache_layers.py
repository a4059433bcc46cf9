"""
The prefix cache with every kind of layer: windows, recurrent and convolution states, layers without, and mixtures.
"""

import random

import hybrid_models
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peak_bytes import PeakBytes
from peft import LoraConfig, get_peft_model
from test_prefix_cache import GREEDY, padded, read
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    GenerationConfig,
    MambaConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    StoppingCriteriaList,
)
from transformers.cache_utils import DynamicIndexedLayer

from arpo_trl.rollout.engines import TransformersEngine, cache_layers, prefix_cache
from arpo_trl.rollout.engines.cache_layers import parts_to_read
from arpo_trl.rollout.engines.prefix_cache import PrefixCache, cache_obstacle, known_prefixes
from arpo_trl.rollout.engines.transformers import RowStops, generate_ids

SAMPLED = GenerationConfig(do_sample=True, temperature=0.7, top_k=0, max_new_tokens=9, pad_token_id=0, eos_token_id=1)
FAMILIES = [*hybrid_models.configs(), *hybrid_models.multimodal_configs(), "adapter"]
MODELS: dict = {}


def model_of(family):
    if family in MODELS:
        return MODELS[family]
    MODELS[family] = hybrid_models.build("qwen3_5" if family == "adapter" else family)
    if family == "adapter":
        settings = LoraConfig(task_type="CAUSAL_LM", target_modules=["in_proj_qkv", "q_proj"], init_lora_weights=False)
        MODELS[family] = get_peft_model(MODELS[family], settings).eval()
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
    for seed in range(3):
        Rollout(model_of(family), seed, config).run(5)


def test_every_kind_of_layer_is_there():
    kinds = {
        type(layer).__name__
        for config in hybrid_models.configs().values()
        for layer in DynamicCache(config=config).layers
    }
    assert kinds == {layer.__name__ for layer in cache_layers._KNOWN}


@torch.no_grad()
def test_rows_of_many_lengths_go_on_from_their_states():
    rollout = Rollout(model_of("qwen3_5"), 0, GREEDY)
    contexts = [rollout.tokens(20, 20) for _ in range(8)]
    segments = rollout.wave(contexts)
    contexts = [c + s + rollout.tokens(n, n) for n, (c, s) in enumerate(zip(contexts, segments, strict=True), 1)]
    forwards = []
    hook = rollout.model.register_forward_hook(
        lambda module, args, kwargs, output: forwards.append(1), with_kwargs=True
    )
    ids, mask = padded(contexts)
    one = GenerationConfig(do_sample=False, max_new_tokens=1, pad_token_id=0)
    rollout.cache.generate(rollout.model, rollout.model.generate, ids, mask, one)
    hook.remove()
    assert len(forwards) <= 5 + 1, "eight lengths of up to nine tokens: four powers of two, and one token is sampled"


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 40)), min_size=1, max_size=9), st.booleans())
def test_each_row_is_read_once_and_in_order(rows, recurrent):
    known = [before for before, _ in rows]
    lengths = [before + rest for before, rest in rows]
    width = max(lengths) + 3
    read_up_to = [width - rest for _, rest in rows]
    parts = parts_to_read(lengths, known, width, recurrent)
    for part in parts:
        assert len(set(part.rows)) == len(part.rows) > 0
        for row, end in zip(part.rows, part.ends, strict=True):
            padding = read_up_to[row] - (end - part.new)
            assert padding == 0 if recurrent and known[row] else padding >= 0
            assert part.seen >= lengths[row] - (width - end), "a row sees all that it has read"
            read_up_to[row] = end
    assert read_up_to == [width] * len(rows)
    assert len(parts) <= 2 + max(rest for _, rest in rows).bit_length()


@given(st.data())
def test_known_prefixes_are_those_of_a_search(data):
    rows = st.lists(st.integers(0, 1), max_size=5).map(lambda ids: torch.tensor(ids, dtype=torch.long).numpy())
    contexts = data.draw(st.lists(rows, max_size=5))
    known = data.draw(st.lists(rows, max_size=5, unique_by=lambda row: row.tobytes()))
    wanted = [
        sorted(
            (k for k, row in enumerate(known) if context[: len(row)].tolist() == row.tolist()),
            key=lambda k: len(known[k]),
        )
        for context in contexts
    ]
    assert known_prefixes(contexts, known) == wanted


@torch.no_grad()
def peak_in_caches(model, counts, waves=3, rows=6):
    """The peak of a rollout of rows that share nothing, in units of the cache that the last `generate` leaves."""
    rng = random.Random(0)
    config = GenerationConfig(do_sample=False, max_new_tokens=16, pad_token_id=0)
    cache = PrefixCache()
    contexts = [[rng.randint(3, 49) for _ in range(60)] for _ in range(rows)]
    with PeakBytes(counts) as bytes_held:
        for _ in range(waves):
            ids, mask = padded(contexts)
            output = cache.generate(model, model.generate, ids, mask, config).tolist()
            contexts = [row + [rng.randint(3, 49) for _ in range(12)] for row in output]
    return bytes_held.peak, cache


HEAD_DIM = 24  # nothing else has it


@pytest.mark.parametrize("family", ["qwen3", "gpt_oss"])
def test_a_rollout_holds_one_cache(family):
    shape = {"head_dim": HEAD_DIM, "num_attention_heads": 6, "num_key_value_heads": 3}
    if family == "qwen3":
        config = Qwen3Config(vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=20, **shape)
    else:
        config = hybrid_models.configs()[family]
        config.update({"num_hidden_layers": 20, "layer_types": config.layer_types * 5, **shape})
    model = AutoModelForCausalLM.from_config(config).eval()
    peak, cache = peak_in_caches(model, lambda tensor: tensor.dim() == 4 and tensor.shape[1::2] == (3, HEAD_DIM))
    kept = sum(part.nbytes for layer in cache._blocks[-1].layers for part in layer)
    assert kept == 20 * 2 * 6 * 3 * (60 + 3 * 16 + 2 * 12 - 1) * HEAD_DIM * 4
    assert kept <= peak <= 1.1 * kept


def test_states_stand_where_they_are_needed():
    config = hybrid_models.configs()["qwen3_5"]
    config.update({"num_hidden_layers": 8, "layer_types": config.layer_types * 2, "linear_value_head_dim": HEAD_DIM})
    model = AutoModelForCausalLM.from_config(config).eval()
    states = (4, config.linear_key_head_dim, HEAD_DIM)
    one = 6 * 6 * 4 * config.linear_key_head_dim * HEAD_DIM * 4

    def counts(tensor):
        return tensor.dim() == 4 and tuple(tensor.shape[1:]) == states

    with PeakBytes(counts) as plain, torch.no_grad():
        model.generate(torch.full((6, 60), 3), max_new_tokens=2, do_sample=False, pad_token_id=0)
    peak, cache = peak_in_caches(model, counts)
    # Of each row also its prompt, where its segment began and where it ended
    assert peak <= plain.peak + 3 * one
    assert len(cache._places) == 3 * 6


def test_states_in_the_middle_of_a_row_are_kept_where_forks_may_leave_there():
    rollouts = [Rollout(model_of("lfm2"), seed, GREEDY) for seed in (0, 1)]
    tokens = []
    for rollout in rollouts:
        context = first = rollout.tokens(30, 30)
        starts = []
        for _ in range(3):
            starts.append(context)
            context = context + rollout.wave([context])[0] + rollout.tokens(5, 5)
        before = read(rollout.cache)
        rollout.wave([starts[1], first])
        tokens.append(read(rollout.cache) - before)
    assert tokens[0] == 2, "the last token of each"
    assert tokens[1] > 2, "the middle is read again from the prompt"


@pytest.mark.parametrize("kind", ["mamba", "indexed"])
def test_other_layers_start_anew(kind, monkeypatch):
    if kind == "mamba":
        model = AutoModelForCausalLM.from_config(
            MambaConfig(
                vocab_size=50, hidden_size=32, state_size=4, num_hidden_layers=2, pad_token_id=0, eos_token_id=1
            )
        ).eval()
    else:
        model = hybrid_models.build("mistral")
        monkeypatch.setattr(cache_layers, "_layers", lambda config: [DynamicIndexedLayer()])
    assert cache_obstacle(model, GREEDY)
    rollout = Rollout(model, 1, GREEDY)
    rollout.wave([[5, 6, 7] * 5, [8, 9] * 5])
    assert not rollout.cache.lookups


def test_rows_with_images_start_anew():
    model = model_of("qwen3_5")
    ids, mask = padded([[5, 6, 7, 8]])
    cache = PrefixCache()

    def generate(input_ids, **inputs):
        assert "pixel_values" not in inputs or cache_layers.CACHE not in inputs
        return torch.cat([input_ids, input_ids], dim=1)

    cache.generate(model, generate, ids, mask, GREEDY, pixel_values=torch.ones(1), logits_processor=[])
    assert not cache.lookups


def test_a_mixture_that_asks_for_router_logits_rolls_out_prompts_of_several_lengths():
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=32,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        output_router_logits=True,
    )
    model = Qwen3MoeForCausalLM(config).eval()
    generation_config = GenerationConfig(do_sample=False, max_new_tokens=4, pad_token_id=0, eos_token_id=[1])
    contexts = [[5, 6, 7, 8, 9], [4, 3]]
    samples = []
    for keeps in (True, False):
        engine = TransformersEngine(
            lambda: model,
            lambda contexts, images: generate_ids(model, contexts, generation_config),
            None,
            2,
            1.0,
            keeps=keeps,
            idle_token=1,
        )
        with engine.rollout():
            samples.append([sample.ids for sample in engine.sample(contexts, [4, 4])])
    assert samples[0] == samples[1]
    assert model.config.output_router_logits, "training still asks for them"


def test_an_engine_goes_on_from_the_states_at_which_its_rows_ended():
    model = model_of("qwen3_5")
    generation_config = GenerationConfig(do_sample=False, max_new_tokens=9, pad_token_id=0, eos_token_id=[1])
    engine = TransformersEngine(
        lambda: model,
        lambda contexts, images: generate_ids(model, contexts, generation_config),
        None,
        2,
        1.0,
        keeps=True,
        idle_token=1,
    )
    contexts = [[5, 6, 7, 8, 9], [4, 3]]
    with engine.rollout():
        samples = engine.sample(contexts, [2, 7])
        contexts = [context + sample.ids + [11, 12, 13] for context, sample in zip(contexts, samples, strict=True)]
        before = read(engine._cache)
        engine.sample(contexts, [2, 2])
        # Three tokens of the result, and the last one of the segment, which had been sampled but not read
        assert read(engine._cache) - before == 2 * 4
