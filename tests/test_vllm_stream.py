"""Segments that vLLM samples each for itself, with stand-ins for the engine and for the server."""

import json
import socket
import threading
from types import SimpleNamespace

import pytest
from loopback import Loopback, http

from arpo_trl.rollout.engines import Sample
from arpo_trl.rollout.engines.vllm import VLLMEngine
from arpo_trl.rollout.engines.vllm_stream import LLMStream, ServerStream, sampling_settings

SECONDS = 20  # after which a test gives up


def vllm_engine() -> VLLMEngine:
    return VLLMEngine(lambda *asked: pytest.fail("no batch is asked for"), 100, 1000, top_k=2, entropy_window=20)


class StandInLLM:
    """An engine whose requests take as many steps as they have tokens; it samples the context's first token."""

    def __init__(self):
        self.llm_engine = self
        self.requests: dict[str, list] = {}
        self.aborted: list[str] = []
        self.active: list[int] = []  # requests at each step

    def add_request(self, name, prompt, parameters):
        assert name not in self.requests
        self.requests[name] = [prompt["prompt_token_ids"], parameters, []]

    def step(self):
        self.active.append(len(self.requests))
        outputs = []
        for name, (context, limit, ids) in list(self.requests.items()):
            ids.append(context[0])
            told = {context[0]: SimpleNamespace(rank=1, logprob=-0.5), 7: SimpleNamespace(rank=2, logprob=-1.5)}
            output = SimpleNamespace(token_ids=ids, logprobs=[told] * len(ids))
            finished = len(ids) == limit
            outputs.append(
                SimpleNamespace(
                    request_id=name, finished=finished, outputs=[output], prompt_token_ids=context, num_cached_tokens=1
                )
            )
            if finished:
                del self.requests[name]
        return outputs

    def abort_request(self, names):
        self.aborted += names


def test_a_request_is_added_while_others_are_sampled():
    llm, engine = StandInLLM(), vllm_engine()
    stream = LLMStream(llm, engine, lambda limit, top_k: limit)
    assert not stream.step(list), "nothing to do"
    first = stream.start([10, 11], 3)
    assert stream.step(list) and not first.done()
    second = stream.start([20], 1)
    assert stream.step(list) and second.done() and not first.done()
    assert stream.step(list) and first.done() and not stream.step(list)
    assert llm.active == [1, 2, 1]
    sample = first.result()
    assert (sample.ids, sample.logprobs, len(sample.entropies)) == ([10] * 3, [-0.5] * 3, 3)
    assert engine.lookups == {"prefix_cache_queries": 3, "prefix_cache_hits": 2}


def test_the_rest_is_aborted_and_a_limit_keeps_to_the_context():
    llm = StandInLLM()
    stream = LLMStream(llm, vllm_engine(), lambda limit, top_k: limit)
    ended, open_ = stream.start([10], 1), stream.start([20] * 98, 50)
    stream.step(list)
    assert list(llm.requests.values())[0][1] == 2, "of a context of 100 tokens two are left"
    stream.close()
    assert ended.done() and not open_.done() and llm.aborted == list(llm.requests)
    assert not stream.step(list)


def choice(body: bytes) -> bytes:
    asked = json.loads(body)
    ids = asked["prompt"][0][:1] * asked["max_tokens"]
    names = [f"token_id:{token}" for token in ids]
    told = {"tokens": names, "token_logprobs": [-0.5] * len(ids), "top_logprobs": [{name: -0.5} for name in names]}
    return http(json.dumps({"choices": [{"token_ids": ids, "logprobs": told}]}))


def test_a_server_has_all_segments_at_once():
    together = threading.Barrier(30)  # more than a pool of TRL's client would send in threads of few cores

    def answer(connection: socket.socket, request):
        together.wait(SECONDS)
        connection.sendall(choice(request.body))

    with Loopback({"/v1/completions": answer}) as server:
        stream = ServerStream(server.url, vllm_engine(), {"model": "m"})
        assert not stream.step(list), "this thread has nothing to do"
        futures = [stream.start([10 + row], 1 + row % 3) for row in range(30)]
        samples = [future.result(SECONDS) for future in futures]
        stream.close()
    assert [sample.ids for sample in samples] == [[10 + row] * (1 + row % 3) for row in range(30)]
    assert samples[2].logprobs == [-0.5] * 3 and len(samples[2].entropies) == 3
    asked = [json.loads(request.body) for request in server.requests]
    assert all(body["model"] == "m" and body["logprobs"] == 2 for body in asked)


def test_a_server_learns_that_a_segment_is_not_wanted_any_more():
    arrived, gone = threading.Event(), threading.Event()

    def answer(connection: socket.socket, request):
        arrived.set()
        connection.settimeout(SECONDS)
        if connection.recv(1) == b"":  # the other side has closed the connection
            gone.set()

    with Loopback({"/v1/completions": answer}) as server:
        stream = ServerStream(server.url, vllm_engine(), {})
        future = stream.start([10], 5)
        assert arrived.wait(SECONDS)
        stream.close()
        assert gone.wait(SECONDS) and future.cancelled()


def test_a_busy_server_is_asked_again_and_a_refusal_is_told():
    answers = iter([http("overloaded", "503 Service Unavailable")])

    def answer(connection: socket.socket, request):
        connection.sendall(next(answers, None) or choice(request.body))

    with Loopback({"/v1/completions": answer}) as server:
        stream = ServerStream(server.url, vllm_engine(), {})
        assert stream.start([10], 2).result(SECONDS).ids == [10, 10] and len(server.requests) == 2
        server.answers["/v1/completions"] = http("logprobs may be 20 at most", "400 Bad Request")
        with pytest.raises(Exception, match="answered 400: logprobs may be 20 at most"):
            stream.start([10], 2).result(SECONDS)
        stream.close()


def test_what_is_asked_for_is_what_trl_asks_for():
    generation = SimpleNamespace(
        repetition_penalty=1.1, temperature=0.8, top_p=0.9, top_k=40, min_p=None, structured_outputs_regex=None,
        generation_kwargs={"presence_penalty": 0.5},
    )  # fmt: skip
    protocol = SimpleNamespace(stop_strings=["</a>"])
    trainer = SimpleNamespace(vllm_generation=generation, _protocol=protocol, _image_reader=None)
    assert sampling_settings(trainer) == {
        "repetition_penalty": 1.1, "temperature": 0.8, "top_p": 0.9, "top_k": 40, "min_p": 0.0, "n": 1,
        "presence_penalty": 0.5, "stop": ["</a>"], "include_stop_str_in_output": True, "skip_special_tokens": False,
    }  # fmt: skip


class InParts(VLLMEngine):
    """Asks for a segment in two parts, the second one without more than the sampled token's log-probability."""

    def segment(self, context, limit, stops):
        first = yield context, 2, self.top_k
        second = yield context + first.ids, limit - 2, 0
        return Sample(first.ids + second.ids, first.entropies, first.logprobs + second.logprobs)


def test_a_segment_may_be_several_requests():
    asked = []
    llm, engine = StandInLLM(), InParts(lambda *asked: None, 100, 1000, top_k=2, entropy_window=20)
    stream = LLMStream(llm, engine, lambda limit, top_k: asked.append((limit, top_k)) or limit)
    future = stream.start([10, 11], 5)
    while stream.step(list):
        pass
    assert future.result().ids == [10] * 5 and asked == [(2, 2), (3, 0)]
    assert engine.lookups["prefix_cache_queries"] == 2, "the context is read once"
    with Loopback({"/v1/completions": lambda connection, request: connection.sendall(choice(request.body))}) as server:
        stream = ServerStream(server.url, engine, {})
        assert stream.start([10, 11], 5).result(SECONDS).ids == [10] * 5
        stream.close()
    bodies = [json.loads(request.body) for request in server.requests]
    assert [(body["prompt"][0], body["max_tokens"], body["logprobs"]) for body in bodies] == [
        ([10, 11], 2, 2), ([10, 11, 10, 10], 3, 0)
    ]  # fmt: skip
