"""Entropies, limits and stop strings inside a real `generate`; what vLLM answers (`vllm_engine/` has the engine
itself).
"""

from collections import Counter
from contextlib import nullcontext
from math import nan
from types import SimpleNamespace

import pytest
import tiny
import torch
from transformers import GenerationConfig

from arpo_trl.rollout.engines import Sample
from arpo_trl.rollout.engines.prefix_cache import PrefixCache
from arpo_trl.rollout.engines.replaced import generate_with
from arpo_trl.rollout.engines.transformers import recorded_generation, recorded_samples, stop_string_criteria
from arpo_trl.rollout.engines.vllm import Asked, _settings, server_by_row, top_k_samples, vllm_settings
from arpo_trl.rollout.engines.vllm_images import check_read, forget_images, server_reads_images
from arpo_trl.rollout.entropy import top_k_entropy


@pytest.fixture(scope="module")
def model(tokenizer):
    return tiny.build_model(tokenizer, seed=1).eval()


def generate(model, tokenizer, contexts, limits, window=6, temperature=0.7, stop_strings=(), **settings):
    torch.manual_seed(0)
    length = max(map(len, contexts))
    pad = tokenizer.pad_token_id
    input_ids = torch.tensor([[pad] * (length - len(ids)) + ids for ids in contexts])
    config = GenerationConfig(
        do_sample=True,
        max_new_tokens=max(limits),
        temperature=temperature,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=pad,
        **settings,
    )
    criteria = stop_string_criteria(tokenizer, stop_strings)
    with recorded_generation(model, limits, criteria, window, temperature) as (recorder, stops):
        output = model.generate(input_ids, attention_mask=(input_ids != pad).long(), generation_config=config)
    ids = []
    for row in output[:, length:].tolist():
        end = row.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in row else len(row)
        ids.append(row[:end])
    return recorded_samples(ids, recorder, stops), recorder


def test_entropies_are_those_of_a_forward_pass(model, tokenizer):
    contexts = [tokenizer.encode("one"), tokenizer.encode("two and three")]
    samples, recorder = generate(model, tokenizer, contexts, [12, 12], top_k=5, top_p=0.5)
    for context, sample in zip(contexts, samples, strict=True):
        logits = model(torch.tensor([context + sample.ids])).logits[0, len(context) - 1 : -1]
        logprobs = torch.log_softmax(logits.float() / 0.7, dim=-1)  # before top-k and top-p
        exact = -(logprobs.exp() * logprobs).sum(-1)[:6]
        assert sample.entropies == pytest.approx(exact.tolist(), abs=1e-4)
    assert len(recorder._columns) == 6, "memory is B × k: nothing is kept beyond the window"


def test_each_row_ends_at_its_own_limit(model, tokenizer):
    samples, _ = generate(model, tokenizer, [[5], [6], [7]], [3, 10, 1])
    assert [len(sample.ids) for sample in samples] == [3, 10, 1]
    assert [len(sample.entropies) for sample in samples] == [3, 6, 1]


def test_recording_does_not_change_what_is_sampled(model, tokenizer):
    samples, _ = generate(model, tokenizer, [[5], [6]], [10, 10])
    torch.manual_seed(0)
    plain = model.generate(
        torch.tensor([[5], [6]]),
        do_sample=True,
        temperature=0.7,
        max_new_tokens=10,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    assert [sample.ids for sample in samples] == plain[:, 1:].tolist()
    assert "generate" not in vars(model), "the model is left as it was"


def test_a_stop_string_ends_a_row_and_belongs_to_it(model, tokenizer):
    stop = tokenizer.decode([9])  # a token that an untrained model samples soon
    samples, _ = generate(model, tokenizer, [[5]] * 16, [200] * 16, temperature=3.0, stop_strings=[stop])
    ended = [sample for sample in samples if 9 in sample.ids]
    assert ended, "no row sampled the stop string; the test shows nothing"
    assert all(sample.ids.index(9) == len(sample.ids) - 1 for sample in ended)


def test_the_sampled_token_is_looked_up_among_the_top_k():
    # Rank 1 is token 7; token 4 was sampled, from outside the top 2
    logprobs, tokens = [[[-0.3, -1.6, -4.0]]], [[[7, 2, 4]]]
    (sample,) = top_k_samples([[4]], logprobs, tokens, top_k=2, window=20, vocab_size=100)
    assert sample.ids == [4] and sample.logprobs == [-4.0]
    assert sample.entropies == [top_k_entropy([-0.3, -1.6], 100)]


def test_what_vllm_could_not_score_has_no_entropy_and_no_correction():
    logprobs = [[[None, None], [-0.5, -1.0]], [], None, [[-0.1, -2.0]]]
    tokens = [[[7, 2], [7, 2]], [], None, [[3, 4]]]
    rows = top_k_samples([[7, 2], [], [5], [9]], logprobs, tokens, top_k=2, window=20, vocab_size=100)
    assert [row.ids for row in rows] == [[7, 2], [], [5], [9]]
    assert [row.logprobs for row in rows] == [pytest.approx(x, nan_ok=True) for x in ([nan, -1.0], [], [nan], [nan])]
    scored, told = top_k_entropy([-0.5, -1.0], 100), top_k_entropy([-0.1, -2.0], 100)
    assert [row.entropies for row in rows] == [[scored], [], [], [told]], "nothing is read from what is not known"
    (row,) = top_k_samples([[7]], None, None, top_k=2, window=20, vocab_size=100)
    assert row.ids == [7] and row.entropies == [] and row.logprobs == pytest.approx([nan], nan_ok=True)


class StandInServer:
    """TRL's client and the server behind it: answers `max_tokens` tokens, the first of them the prompt's first."""

    base_url = "http://standin"

    def __init__(self, metrics=""):
        self.requests, self.session, self.metrics = [], self, metrics

    def generate(self, prompts, max_tokens, **kwargs):
        self.requests.append((len(prompts), max_tokens, kwargs.get("logprobs")))
        told = None if max_tokens == 1 else [[[-0.5]] * max_tokens] * len(prompts)
        ids = [prompt[:1] * max_tokens for prompt in prompts]
        return {"prompt_ids": prompts, "completion_ids": ids, "logprobs": told, "logprob_token_ids": told}

    def get(self, url):
        assert url == "http://standin/metrics"
        return SimpleNamespace(ok=bool(self.metrics), text=self.metrics)


def test_a_server_is_asked_once_for_rows_that_ask_the_same_and_answers_in_order():
    client = StandInServer()
    engine = SimpleNamespace(mode="server", vllm_client=client, logprobs=7, generation_kwargs={})
    asked = [Asked(3, 20), Asked(1, 20), Asked(3, 20), Asked(2, 20), Asked(2, 0)]
    with vllm_settings(engine, {"stop": ["x"]}, asked, cache := Counter()):
        assert engine.logprobs == 0 and engine.generation_kwargs == {"stop": ["x"]}
        answer = client.generate(prompts=[[10], [11], [12], [13], [14]], max_tokens=99, n=1)
    assert sorted(client.requests) == [(1, 1, 20), (1, 2, 0), (1, 2, 20), (2, 3, 20)]
    assert answer["completion_ids"] == [[10] * 3, [11], [12] * 3, [13] * 2, [14] * 2]
    assert answer["logprobs"] == [[[-0.5]] * 3, None, [[-0.5]] * 3, [[-0.5]] * 2, [[-0.5]] * 2]
    assert engine.logprobs == 7 and engine.generation_kwargs == {}
    client.generate(prompts=[[10]], max_tokens=99)
    assert client.requests[-1] == (1, 99, None), "the client is left as it was"
    assert not cache, "a server without metrics tells nothing of its cache"


def test_the_servers_prefix_cache_is_read_from_its_counters():
    lines = 'vllm:prefix_cache_queries_total{{engine="0"}} {}\nvllm:prefix_cache_hits_total{{engine="0"}} {}\n'
    lines += 'vllm:external_prefix_cache_hits_total{{engine="0"}} 7.0\nvllm:prefix_cache_hits_total{{engine="1"}} 8.0'
    client = StandInServer(lines.format("100.0", "20.0"))
    engine = SimpleNamespace(mode="server", vllm_client=client, logprobs=0, generation_kwargs={})
    with vllm_settings(engine, {}, [], cache := Counter()):
        client.metrics = lines.format("1.6e2", "50.0")
    assert cache == {"prefix_cache_queries": 60, "prefix_cache_hits": 30}


def test_each_request_to_a_server_has_the_images_of_its_rows():
    asked = []

    class Client:
        session = base_url = None

        def generate(self, prompts, max_tokens, logprobs, features=None):
            asked.append((prompts, max_tokens, features))
            return {"completion_ids": [[9]] * len(prompts)}

    client = Client()
    with generate_with(client, server_by_row(client.generate, [Asked(5, 0), Asked(3, 0), Asked(5, 0)])):
        client.generate(prompts=["a", "b", "c"], features=["A", None, "C"], max_tokens=99, logprobs=0)
        client.generate(prompts=["a", "b", "c"], features=None, max_tokens=99, logprobs=0)
    assert sorted(asked[:2], key=lambda each: -len(each[0])) == [(["a", "c"], 5, ["A", "C"]), (["b"], 3, [None])]
    assert all(features is None for _, _, features in asked[2:])


NO_IMAGES, IMAGES = (SimpleNamespace(column_names=names) for names in (["prompt"], ["prompt", "image"]))


@pytest.mark.parametrize(
    "data, status, taken",
    [
        ((IMAGES, None), 405, True),
        ((NO_IMAGES, None), 405, True),
        ((NO_IMAGES, {"held out": NO_IMAGES}), 404, False),
        ((IMAGES, None), 404, None),
        ((NO_IMAGES, {"held out": IMAGES}), 404, None),
        ((None, IMAGES), 404, None),
    ],
)
def test_a_server_that_takes_no_images_is_refused_where_the_data_have_some(data, status, taken):
    session = SimpleNamespace(get=lambda url: SimpleNamespace(status_code=status))
    generation = SimpleNamespace(vllm_client=SimpleNamespace(session=session, base_url="http://server"))
    trainer = SimpleNamespace(vllm_generation=generation, train_dataset=data[0], eval_dataset=data[1])
    trainer.vllm_mode, trainer.args = "server", SimpleNamespace(vllm_server_base_url="http://server")
    trainer.accelerator = SimpleNamespace(is_main_process=True, gather=lambda told: told, device="cpu")
    with pytest.raises(ValueError, match="http://server.*--enable-scale-out") if taken is None else nullcontext():
        assert server_reads_images(trainer) is taken
    if status == 404:
        trainer.accelerator.is_main_process = False  # it has no client, and is told the same
        trainer.accelerator.gather, trainer.vllm_generation = lambda told: told * 0, None
        with pytest.raises(ValueError, match="takes none") if taken is None else nullcontext():
            assert server_reads_images(trainer) is taken


def test_images_are_forgotten_with_the_weights_they_were_seen_through():
    forgotten = []
    llm = SimpleNamespace(llm_engine=SimpleNamespace(reset_encoder_cache=lambda: forgotten.append("here")))
    forget_images(SimpleNamespace(mode="colocate", llm=llm))
    session = SimpleNamespace(
        post=lambda url: forgotten.append(url) or SimpleNamespace(ok=len(forgotten) < 3, status_code=404)
    )
    server = SimpleNamespace(mode="server", vllm_client=SimpleNamespace(session=session, base_url="http://server"))
    forget_images(server)
    assert forgotten == ["here", "http://server/reset_encoder_cache"]
    with pytest.raises(RuntimeError, match="answers 404"):
        forget_images(server)


def test_a_model_does_not_write_the_token_of_an_image_itself():
    protocol, reader = SimpleNamespace(stop_strings=[]), SimpleNamespace(never_sampled=frozenset({7}))
    generation = SimpleNamespace(generation_kwargs={"logit_bias": {3: 1.0}, "max_tokens": 5})
    trainer = SimpleNamespace(vllm_generation=generation, _protocol=protocol, _image_reader=reader)
    assert _settings(trainer) == {"logit_bias": {7: -100.0, 3: 1.0}}


def test_an_engine_that_reads_an_image_as_other_tokens_is_refused():
    check_read([[1, 2], [3]], [[1, 2], [4]], [["image"], []])
    check_read([[3]], [[4]], ())
    with pytest.raises(ValueError, match="as 3 tokens, and the processor has written 2.* `use_vllm=False`"):
        check_read([[1, 2, 2]], [[1, 2]], [["image"]])


class Engine:
    def generate(self, **kwargs):
        return "the class's"


def test_what_a_library_put_on_an_engine_stands_there_again():
    engine = Engine()
    with generate_with(engine, lambda: "ours"):
        assert engine.generate() == "ours"
    assert engine.generate() == "the class's" and vars(engine) == {}
    engine.generate = patched = lambda: "a library's"
    with pytest.raises(KeyboardInterrupt), generate_with(engine, lambda: "ours"):
        raise KeyboardInterrupt
    assert engine.generate is patched


def test_a_generate_that_calls_no_logits_processor_tells_no_entropies(model, tokenizer, monkeypatch):
    asked = []

    def replaced(input_ids, **kwargs):
        asked.append(set(kwargs))
        return torch.cat([input_ids, torch.tensor([[5, 6, 7]] * len(input_ids))], dim=1)

    monkeypatch.setattr(model, "generate", replaced)
    with recorded_generation(model, [2, 9], None, 6, 1.0, PrefixCache()) as (recorder, stops):
        output = model.generate(input_ids=torch.tensor([[8, 9, 9], [8, 9, 8]]))
    assert recorded_samples(output[:, 3:].tolist(), recorder, stops) == [Sample([5, 6], []), Sample([5, 6, 7], [])]
    assert asked == [{"logits_processor", "stopping_criteria"}], "it need not know of a cache"
    assert model.generate is replaced
