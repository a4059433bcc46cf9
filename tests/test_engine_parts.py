"""Segments that vLLM is asked for in parts: the law of what is sampled, what is asked for, and what a server sees."""

import json
import threading
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

from arpo_trl.rollout.engines import Sample, parts
from arpo_trl.rollout.engines.parts import StopStrings, may_be_parted, segment_in_parts, shared_limit
from arpo_trl.rollout.engines.vllm import Answer, Asked, VLLMEngine, server_by_row, stops_of, top_k_sample
from arpo_trl.rollout.entropy import top_k_entropy

TEXTS = ["", "a", "<", "/>"]
"""Tokens of a small language, of which 0 ends the turn."""
NO_STOPS = StopStrings((), "".join)


def decode(ids):
    return "".join(TEXTS[token] for token in ids)


def next_probabilities(context):
    """A distribution over four tokens that depends on the two before."""
    weights = [1, 2 + sum(context[-2:]) % 3, 2 + context[-1] % 2, 1 + sum(context[-2:]) % 2]
    return [weight / sum(weights) for weight in weights]


def answers(request, stops):
    """All that an engine may answer to a request, with probabilities: it looks for stop strings in this alone."""
    running = [([], 1.0)]
    while running:
        ids, probability = running.pop()
        if ids and (len(ids) == request.limit or ids[-1] == 0 or any(stop in decode(ids) for stop in stops)):
            yield ids, probability
            continue
        for token, share in enumerate(next_probabilities(request.context + ids)):
            running.append(([*ids, token], probability * share))


def law(strings, limit, **settings):
    """Probability of each segment. A generator cannot be copied, so it is sent again what it was sent before."""
    found, running = defaultdict(float), [([], 1.0)]
    while running:
        history, probability = running.pop()
        segment = segment_in_parts([1], limit, top_k=2, **settings)
        try:
            request = next(segment)
            for part in history:
                request = segment.send(Sample(part, [0.5] * len(part), [-1.0] * len(part)))
        except StopIteration as ended:
            assert len(ended.value.ids) == len(ended.value.logprobs) <= limit
            found[tuple(ended.value.ids)] += probability
        else:
            for part, share in answers(request, strings):
                running.append(([*history, part], probability * share))
    return found


def coarse(limit, room):
    """Powers of two instead of `shared_limit`, whose steps are above 1 from 16 tokens on."""
    powers = [power for power in (1, 2, 4, 8) if power <= room]
    return min((power for power in powers if power >= limit), default=powers[-1])


@pytest.mark.parametrize("few_limits", [False, True])
@pytest.mark.parametrize("stops", [(), ("</>",), ("a</",), ("</>", "a<a")])
@pytest.mark.parametrize("window", [1, 2, 3])
def test_parts_leave_the_law_of_a_segment_as_it_is(few_limits, stops, window, monkeypatch):
    monkeypatch.setattr(parts, "shared_limit", coarse)
    text = StopStrings(stops, decode)
    limit = 5
    expected = law(stops, limit, room=limit, window=window, stops=None)
    for room in (limit, limit + 2):
        found = law(stops, limit, room=room, window=window, stops=text, few_limits=few_limits)
        assert found == pytest.approx(expected)
    assert sum(expected.values()) == pytest.approx(1)
    spanning = [ids for ids in expected if any(stop in decode(ids) for stop in stops) and len(ids) > window]
    assert bool(spanning) == bool(stops)


def asked(limit, answered, room=10**6, window=20, stops=NO_STOPS, **settings):
    """What is asked for a segment whose parts have `answered` tokens, as `(known, limit, K)`, and the segment."""
    segment, requests = segment_in_parts([5], limit, room, 20, window, stops, **settings), []
    request = next(segment)
    try:
        for length in answered:
            requests.append((len(request.context) - 1, request.limit, request.top_k))
            length = min(length, request.limit)
            request = segment.send(Sample([7] * length, [0.5] * min(length, window), [-1.0] * length))
    except StopIteration as ended:
        return requests, ended.value
    raise AssertionError(f"{requests}, and then {request[1:]}")


def test_log_probabilities_of_many_tokens_are_asked_for_where_the_entropy_is_read():
    requests, sample = asked(1000, [21, 980])
    assert requests == [(0, 21, 20), (20, 980, 0)]
    assert len(sample.ids) == len(sample.logprobs) == 1000 and len(sample.entropies) == 20
    assert asked(1000, [13])[0] == asked(1000, [20])[0] == [(0, 21, 20)], "the row has ended"
    assert asked(15, [15])[0] == [(0, 15, 20)]
    assert asked(1000, [1000], stops=None)[0] == [(0, 1000, 20)], "at once"


def test_limits_are_few_and_what_is_too_much_is_cut():
    requests, sample = asked(1001, [21, 1024], few_limits=True)
    assert requests == [(0, 21, 20), (20, 1024, 0)] and len(sample.ids) == 1001
    requests, sample = asked(15, [21], few_limits=True)
    assert requests == [(0, 21, 20)] and len(sample.ids) == len(sample.entropies) == 15, "one request for short rows"
    requests, sample = asked(1001, [21, 960, 5], room=1001, few_limits=True)
    assert requests == [(0, 21, 20), (20, 960, 0), (979, 22, 0)] and len(sample.ids) == 984, (
        "there is no room for more"
    )
    assert asked(1001, [1001], room=1001, stops=None, few_limits=True)[0] == [(0, 1001, 20)]
    assert asked(1001, [1024], room=1100, stops=None, few_limits=True)[0] == [(0, 1024, 20)]


def test_limits_of_a_wave_are_a_handful():
    limits = range(5192, 7993)
    shared = {shared_limit(limit, 10**6) for limit in limits}
    assert shared == {5632, 6144, 6656, 7168, 7680, 8192}
    for limit in [*range(1, 70), *limits]:
        assert limit <= shared_limit(limit, 10**6) <= max(limit, limit * 9 / 8)
        assert limit * 8 / 9 <= shared_limit(limit, limit) <= limit


def test_a_stop_string_that_begins_in_one_part_ends_the_segment_in_the_next():
    ids = [1, 1, 2]
    segment = segment_in_parts([1], 50, 50, 20, 3, StopStrings(["</>"], decode))
    assert next(segment).limit == 4
    request = segment.send(Sample([*ids, 1], [0.5] * 4, [-1.0] * 4))
    assert (request.context, request.limit, request.top_k) == ([1, *ids], 4, 0), "what has begun is soon over"
    with pytest.raises(StopIteration) as ended:
        segment.send(Sample([3, 1, 1, 1], [0.1] * 4, [-2.0] * 4))
    assert ended.value.value == Sample([*ids, 3], [0.5] * 3, [-1.0] * 3 + [-2.0])


@pytest.mark.parametrize(
    "settings, regex, caches, sleeps, branches, parted",
    [
        ({}, None, True, False, True, True),
        ({"top_p": 0.9, "repetition_penalty": 1.1, "max_tokens": 5, "stop": "ab"}, None, True, False, True, True),
        ({"presence_penalty": 0.5}, None, True, False, True, False),
        ({"seed": 3}, None, True, False, True, False),
        ({"min_tokens": 3}, None, True, False, True, False),
        ({}, "[a-z]+", True, False, True, False),
        ({}, None, False, False, True, False),
        ({}, None, True, True, True, False),
        ({}, None, True, False, False, False),
    ],
)
def test_what_counts_sampled_tokens_otherwise_than_a_prompt_is_sampled_at_once(
    settings, regex, caches, sleeps, branches, parted
):
    cache = SimpleNamespace(cache_config=SimpleNamespace(enable_prefix_caching=caches))
    engine = SimpleNamespace(
        generation_kwargs=settings,
        structured_outputs_regex=regex,
        enable_sleep_mode=sleeps,
        llm=SimpleNamespace(llm_engine=SimpleNamespace(vllm_config=cache)),
    )
    trainer = SimpleNamespace(
        vllm_mode="colocate",
        vllm_generation=engine,
        _protocol=SimpleNamespace(stop_strings=[]),
        _tokenizer=SimpleNamespace(decode=lambda ids, **settings: decode(ids)),
        _branches=branches,
        _image_reader=None,
    )
    stops = stops_of(trainer)()
    assert (stops is not None) == parted
    if "stop" in settings:
        assert list(stops.strings) == ["ab"] and stops.begun([1]) and not stops.begun([2])
    assert may_be_parted({}) and not may_be_parted({"bad_words": ["x"]})


def test_rows_in_parts_are_each_asked_for_until_they_end():
    def ask(requests, lookups, images=()):
        if not requests:
            return None
        calls.append([(request.context[0], request.limit, request.top_k) for request in requests])
        lookups["prefix_cache_queries"] += sum(len(request.context) for request in requests)
        # Row n has n tokens in all, of which each is n
        lengths = [min(request.limit, request.context[0] + 1 - len(request.context)) for request in requests]
        ids = [[request.context[0]] * length for request, length in zip(requests, lengths, strict=True)]
        logprobs = [[[-0.5, -1.5]] * length for length in lengths]
        return Answer(ids, logprobs, [[[token, 99] for token in row] for row in ids])

    calls = []
    engine = VLLMEngine(ask, 5000, 100, 2, 4, stops=lambda: StopStrings((), decode))
    samples = engine.sample([[3], [40], [4], [90]], [100, 100, 100, 60])
    assert [len(sample.ids) for sample in samples] == [3, 40, 4, 60]
    assert calls == [[(3, 5, 2), (40, 5, 2), (4, 5, 2), (90, 5, 2)], [(40, 96, 0), (90, 56, 0)]]
    assert [sample.entropies for sample in samples] == [[top_k_entropy([-0.5, -1.5], 100)] * n for n in (3, 4, 4, 4)]
    assert all(sample.logprobs == [-0.5] * len(sample.ids) for sample in samples)
    assert engine.lookups == {"prefix_cache_queries": 4}, "what is read again because of the parts does not count"


def test_one_row_is_read_alone():
    sample = top_k_sample([4, 2], [[-0.3, -1.6, -4.0], [-0.1, -3.0]], [[7, 2, 4], [2, 9]], 2, 1, 100)
    assert sample == Sample([4, 2], [top_k_entropy([-0.3, -1.6], 100)], [-4.0, -0.1])


class CountingServer(ThreadingHTTPServer):
    """A server that answers once it has `expected` rows at the same time, or nothing new comes for a second."""

    request_queue_size = 1024
    daemon_threads = True

    def __init__(self, expected):
        super().__init__(("127.0.0.1", 0), Handler)
        self.expected, self.rows, self.most, self.asked = expected, 0, 0, []
        self.changed = threading.Condition()


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server, rows = self.server, len(asked["prompts"])
        with server.changed:
            server.rows += rows
            server.most = max(server.most, server.rows)
            server.asked.append((asked["max_tokens"], rows))
            server.changed.notify_all()
            server.changed.wait_for(lambda: server.most >= server.expected, timeout=10)
            server.rows -= rows
        body = json.dumps({"completion_ids": [[0]] * rows}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def test_a_server_has_all_rows_of_a_wave_at_the_same_time():
    import urllib.request

    rows = 2048
    limits = [8192 - 200 - (row * 1361) % 2800 for row in range(rows)]
    assert len(set(limits)) > 1000
    server = CountingServer(rows)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def generate(prompts, max_tokens, logprobs):
        body = json.dumps({"prompts": prompts, "max_tokens": max_tokens}).encode()
        with urllib.request.urlopen(f"http://127.0.0.1:{server.server_port}", body, timeout=60) as answer:
            return json.loads(answer.read())

    def ask(requests, lookups, images=()):
        if not requests:
            return None
        each = [Asked(*request[1:]) for request in requests]
        answer = server_by_row(generate, each)([request.context for request in requests])
        return Answer(answer["completion_ids"])

    engine = VLLMEngine(ask, 10**5, 100, 20, 20, stops=lambda: StopStrings((), decode), few_limits=True)
    try:
        assert [sample.ids for sample in engine.sample([[5]] * rows, limits)] == [[0]] * rows
        assert server.most == rows and Counter(dict(server.asked)) == {21: rows}, "the first part: one request"
        # The second part, and segments at once
        server.most, server.asked = 0, []
        engine = VLLMEngine(ask, 10**5, 100, 0, 20, few_limits=True)
        engine.sample([[5]] * rows, limits)
        assert server.most == rows and len(server.asked) == 6
        # More kinds of rows than there are places for requests in TRL's own pool of 64
        server.most, server.asked, server.expected = 0, [], 200
        with ThreadPoolExecutor(1) as pool:
            kinds = [Asked(1 + row, 0) for row in range(200)]
            pool.submit(server_by_row(generate, kinds), [[5]] * 200).result(60)
        assert server.most == 200
    finally:
        server.shutdown()
        server.server_close()
