"""HTTP search back ends against a real server on loopback that also misbehaves."""

import http.client
import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from email.utils import formatdate

import numpy as np
import pytest
from loopback import Loopback
from loopback import http as answer_http
from transformers.utils import get_json_schema

from arpo_trl.execution.errors import TransientToolError
from arpo_trl.tools import ToolCall, ToolExecutor, tool
from arpo_trl.tools.search import BM25Search
from arpo_trl.tools.search.dense import DenseSearch
from arpo_trl.tools.search.http import RetrieveClient, SerperSearch
from arpo_trl.tools.search.passages import NO_RESULTS
from arpo_trl.tools.search.server import answer, serve

PASSAGES = ["Mira Dolen was born in Vesk.", "Vesk lies on the river Orn.", "Talmar is known for its cheese."]
CLIENTS = ["retrieve", "serper"]


def ok(content) -> bytes:
    return answer_http(json.dumps(content), Content_Type="application/json")


def make(client: str, server: Loopback, **options):
    if client == "retrieve":
        return RetrieveClient(f"{server.url}/retrieve", **options)
    return SerperSearch(api_key="secret-key", base_url=server.url, **options)


@pytest.fixture
def index_server():
    server = serve(BM25Search(PASSAGES, top_k=2), port=0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


# --- the /retrieve protocol, client


def test_retrieve_sends_and_reads_the_protocol():
    hits = [{"document": {"id": "7", "contents": "Paris"}, "score": 1.5}, {"document": {"contents": "Lyon"}}]
    with Loopback({"/retrieve": ok({"result": [hits]})}) as server:
        assert make("retrieve", server, top_k=2).search("capital of France") == "Page 1: Paris\nPage 2: Lyon"
    (request,) = server.requests
    assert request.line == "POST /retrieve HTTP/1.1"
    assert json.loads(request.body) == {"queries": ["capital of France"], "topk": 2, "return_scores": True}


def test_retrieve_reads_documents_without_scores_and_cuts_what_was_not_asked_for():
    with Loopback({"*": ok({"result": [[{"contents": "a"}, {"contents": "b"}], []]})}) as server:
        assert make("retrieve", server, top_k=1).retrieve(["x", "y"]) == [["a"], []]


def test_retrieve_without_a_hit_is_a_text():
    with Loopback({"*": ok({"result": [[]]})}) as server:
        assert make("retrieve", server).search("x") == NO_RESULTS


@pytest.mark.parametrize(
    "content", [[], {}, {"result": None}, {"result": []}, {"result": [["text"]]}, {"result": [[{"contents": 3}]]}, 7]
)
def test_another_protocol_is_a_final_error(content):
    with Loopback({"*": ok(content)}) as server, pytest.raises(RuntimeError, match="does not speak") as caught:
        make("retrieve", server).search("x")
    assert not isinstance(caught.value, TransientToolError)


# --- Serper


def test_serper_sends_the_key_and_shows_the_pages(monkeypatch):
    monkeypatch.setenv("SERPER_API_KEY", "key-from-environment")
    content = {
        "answerBox": {"title": "France / Capital", "answer": "Paris", "link": "https://a.example"},
        "organic": [
            {"title": "Paris", "link": "https://b.example", "snippet": "Paris is the capital.", "date": "2 May 2024"},
            {"title": "Lyon", "link": "https://c.example"},
            {"title": "Nice", "link": "https://d.example", "snippet": "A city."},
        ],
    }
    with Loopback({"/search": ok(content)}) as server:
        text = SerperSearch(base_url=server.url + "/", top_k=3).search("capital of France")
    assert text == (
        "Page 1: France / Capital (https://a.example) · Paris\n"
        "Page 2: Paris (https://b.example) · 2 May 2024 · Paris is the capital.\n"
        "Page 3: Lyon (https://c.example)"
    )
    (request,) = server.requests
    assert request.headers["x-api-key"] == "key-from-environment"
    assert json.loads(request.body) == {"q": "capital of France", "num": 3}


def test_serper_shows_the_knowledge_graph():
    content = {
        "knowledgeGraph": {
            "title": "Vesk",
            "type": "Town",
            "description": "Vesk is a town on the Orn.",
            "descriptionLink": "https://v.example",
            "attributes": {"Founded": "1204", "Population": 4100},
        },
        "organic": [{"title": "Orn", "link": "https://o.example"}],
    }
    town = "Page 1: Vesk (https://v.example) · Town · Vesk is a town on the Orn. · Founded: 1204 · Population: 4100"
    with Loopback({"*": ok(content)}) as server:
        assert make("serper", server).search("Vesk") == f"{town}\nPage 2: Orn (https://o.example)"
        del content["organic"]
        server.answers["*"] = ok(content)
        assert make("serper", server).search("Vesk") == town


def test_serper_without_a_key_names_the_variable(monkeypatch):
    monkeypatch.delenv("SERPER_API_KEY", raising=False)
    with pytest.raises(ValueError, match="SERPER_API_KEY"):
        SerperSearch()


def test_serper_tells_no_pages_from_no_answer():
    with Loopback({"*": ok({"organic": []})}) as server:
        assert make("serper", server).search("x") == NO_RESULTS
    with Loopback({"*": ok({"message": "out of credits"})}) as server, pytest.raises(RuntimeError, match="credits"):
        make("serper", server).search("x")


def test_the_key_does_not_follow_a_redirect_and_is_in_no_error():
    with Loopback({}) as thief, Loopback({"*": answer_http(status="307 Moved", Location=thief.url)}) as server:
        with pytest.raises(RuntimeError, match="307") as caught:
            make("serper", server).search("x")
    assert thief.connections == 0
    assert "secret-key" not in str(caught.value)


# --- faults, the same for both clients


@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize(
    "status, after",
    [("429 Too Many Requests", "7"), ("503 Unavailable", None), ("500 Oops", None), ("502 Bad", "0.5")],
)
def test_what_may_pass_carries_status_and_waiting_time(client, status, after):
    fault = answer_http("slow down", status, **({"Retry_After": after} if after else {}))
    with Loopback({"*": fault}) as server, pytest.raises(TransientToolError, match="slow down") as caught:
        make(client, server).search("x")
    assert caught.value.status == int(status[:3])
    assert caught.value.retry_after == (float(after) if after else None)


def test_retry_after_may_be_a_date():
    fault = answer_http(status="429 Too Many Requests", Retry_After=formatdate(time.time() + 100, usegmt=True))
    with Loopback({"*": fault}) as server, pytest.raises(TransientToolError) as caught:
        make("retrieve", server).search("x")
    assert 50 < caught.value.retry_after <= 100


@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize("status", ["400 Bad Request", "401 Unauthorized", "403 Forbidden", "404 Not Found"])
def test_what_will_not_pass_is_final(client, status):
    with Loopback({"*": answer_http("no such thing", status)}) as server:
        with pytest.raises(RuntimeError, match=f"HTTP {status[:3]}: 'no such thing'") as caught:
            make(client, server).search("x")
    assert not isinstance(caught.value, TransientToolError)


BROKEN = {
    "not HTTP": b"SSH-2.0-OpenSSH_9.6\r\n",
    "garbage": answer_http("<html>gateway</html>"),
    "not UTF-8": answer_http(b"\xff\xfe\x00"),
    "nothing": b"",
    "half a header": b"HTTP/1.1 200 OK\r\nContent-Le",
    "half a body": answer_http(b'{"result": [[]', Content_Length="400"),
    "half a body of unknown length": b'HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n{"result": [[{"docu',
    "half a chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n40\r\n{}",
}


@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_answer_may_pass(client, kind):
    with Loopback({"*": BROKEN[kind]}) as server, pytest.raises(TransientToolError):
        make(client, server).search("x")


@pytest.mark.parametrize("client", CLIENTS)
def test_a_server_that_hangs_is_given_up(client):
    with Loopback({}) as server:
        server.answers["*"] = server.hang
        with pytest.raises(TransientToolError, match="ReadTimeout|timed out"):
            make(client, server, timeout=0.3).search("x")


def test_a_body_that_drips_is_given_up():
    with Loopback({}) as server:
        head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"

        def drip(connection, request):
            connection.sendall(head)
            while not server.over.wait(0.05):
                connection.sendall(b"1\r\nx\r\n")

        server.answers["*"] = drip
        with pytest.raises(TransientToolError, match="no complete answer within 0.4 s"):
            make("retrieve", server, timeout=0.4).search("x")


@pytest.mark.parametrize("client", CLIENTS)
def test_headers_that_drip_are_given_up(client):
    """Each byte comes in time; the headers never end."""
    with Loopback({}) as server:

        def drip(connection, request):
            connection.sendall(b"HTTP/1.1 200 OK\r\nX-Slow: ")
            while not server.over.wait(0.05):
                connection.sendall(b"x")

        server.answers["*"] = drip
        with pytest.raises(TransientToolError, match="no complete answer within 0.4 s"):
            make(client, server, timeout=0.4).search("x")


def test_a_wish_to_wait_beyond_the_calendar_is_passed_over():
    fault = answer_http(status="503 Busy", Retry_After="Fri, 01 Jan 99999 00:00:00 GMT")
    with Loopback({"*": fault}) as server, pytest.raises(TransientToolError, match="503") as caught:
        make("retrieve", server).search("x")
    assert caught.value.retry_after is None


def test_an_endless_body_is_given_up():
    with Loopback({}) as server:

        def flood(connection, request):
            connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
            while not server.over.is_set():
                connection.sendall(b"x" * 2**16)

        server.answers["*"] = flood
        with pytest.raises(RuntimeError, match="longer than") as caught:
            make("retrieve", server).search("x")
    assert not isinstance(caught.value, TransientToolError)


def test_nobody_listening_may_pass():
    with Loopback({}) as server:
        client = make("retrieve", server)
    with pytest.raises(TransientToolError, match="refused") as caught:
        client.search("x")
    assert caught.value.status is None


@pytest.mark.parametrize("client", CLIENTS)
def test_a_client_works_again_after_every_fault(client):
    good = {"result": [[{"contents": "fine"}]], "organic": [{"title": "fine"}]}
    with Loopback({}) as server:
        searcher = make(client, server, timeout=0.3)
        for fault in [*BROKEN.values(), server.hang, answer_http(status="500 Oops")]:
            server.answers["*"] = fault
            with pytest.raises(TransientToolError):
                searcher.search("x")
            server.answers["*"] = ok(good)
            assert searcher.search("x") == "Page 1: fine"


@pytest.mark.parametrize("client", CLIENTS)
def test_the_tools_have_a_schema_and_refuse_what_is_not_one_query(client):
    with Loopback({}) as server:
        search = make(client, server).search
        assert get_json_schema(search)["function"]["parameters"]["required"] == ["query"]
        with pytest.raises(TypeError, match="one string, not list"):
            search(["a"])
    assert server.connections == 0


@pytest.mark.parametrize("url", ["localhost:8000/retrieve", "ftp://host/retrieve", "http:///retrieve", ""])
def test_addresses_that_cannot_be_asked_are_refused(url):
    with pytest.raises(ValueError, match="http"):
        RetrieveClient(url)


# --- the server


def test_client_and_server_agree(index_server):
    client = RetrieveClient(f"http://127.0.0.1:{index_server.server_port}/retrieve", top_k=2)
    index = index_server.index
    for query in ("Where was Mira born?", "Vesk", "zeppelin", ""):
        assert client.search(query) == index.search(query)
    assert client.retrieve(["cheese", "Orn"], top_k=1) == [[PASSAGES[2]], [PASSAGES[1]]]


def test_the_server_answers_many_at_once(index_server):
    client = RetrieveClient(f"http://127.0.0.1:{index_server.server_port}/retrieve")
    queries = [word for text in PASSAGES for word in text.split()] * 20
    with ThreadPoolExecutor(64) as pool:
        assert list(pool.map(client.search, queries)) == [index_server.index.search(query) for query in queries]


def test_answer_has_the_form_of_the_protocol():
    index = BM25Search(PASSAGES, top_k=1)
    score = index.rank("cheese", 1)[0][1]
    document = {"id": "2", "contents": PASSAGES[2]}
    assert answer(index, {"queries": ["cheese"], "return_scores": True}) == {
        "result": [[{"document": document, "score": score}]]
    }
    assert answer(index, {"queries": ["cheese", "x"], "topk": 5}) == {"result": [[document], []]}


@pytest.mark.parametrize(
    "request_, complaint",
    [
        ([], "must be an object"),
        ({}, "'queries' must be a list of strings"),
        ({"queries": "cheese"}, "'queries' must be a list of strings"),
        ({"queries": [1]}, "'queries' must be a list of strings"),
        ({"queries": ["a"], "topk": -1}, "'topk' must be a whole number from 1 to 1000, not -1"),
        ({"queries": ["a"], "topk": "3"}, "'topk'"),
        ({"queries": ["a"], "topk": True}, "'topk'"),
        ({"queries": ["a"], "topk": "9" * 100_000}, "^.{,150}$"),
        ({"queries": ["a"] * 6000, "topk": 1000}, "6000 queries with 'topk' 1000 ask for more than 20000 passages"),
        ({"queries": ["a", "b" * 10_001]}, "A query has 10001 characters; it may have 10000"),
        ({"queries": ["long"] * 9}, "The answer is longer than 16777216 characters; send fewer queries at once"),
    ],
)
def test_requests_of_another_form_are_refused(request_, complaint):
    with pytest.raises(ValueError, match=complaint):
        answer(BM25Search([*PASSAGES, "long " * 400_000]), request_)


def test_the_server_survives_what_it_is_sent(index_server):
    def post(path, body, headers=None):
        connection = http.client.HTTPConnection("127.0.0.1", index_server.server_port, timeout=10)
        connection.request("POST", path, body, headers or {})
        response = connection.getresponse()
        return response.status, json.loads(response.read())

    assert post("/retrieve", b"{not json")[0] == 400
    assert post("/retrieve", b"\xff\xff")[0] == 400
    assert post("/retrieve", b"[" * 100_000)[0] == 400
    status, content = post("/retrieve", json.dumps({"queries": ["cheese"] * 6000, "topk": 1000}))
    assert status == 400 and "ask for more than 20000 passages" in content["error"]
    assert post("/retrieve", b'{"queries": ["\\ud800"], "topk": "\\ud800"}')[0] == 400
    assert post("/elsewhere", b"{}")[0] == 404
    assert post("/retrieve", b"", {"Content-Length": "99999999999"})[0] == 413
    assert post("/retrieve", b"", {"Content-Length": "-5"})[0] == 411
    assert post("/retrieve", b'{"queries": ["cheese"]}') == (200, {"result": [[{"id": "2", "contents": PASSAGES[2]}]]})


def test_a_failing_encoder_is_a_server_error():
    def encoder(texts):
        if texts == ["bad"]:
            raise OSError("the encoder is gone")
        return np.ones((len(texts), 2))

    server = serve(DenseSearch(PASSAGES, encoder), port=0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    client = RetrieveClient(f"http://127.0.0.1:{server.server_port}/retrieve")
    with pytest.raises(TransientToolError, match="the encoder is gone") as caught:
        client.search("bad")
    assert caught.value.status == 500
    assert client.search("good").startswith("Page 1")
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("kind", ["saved", "jsonl"])
def test_the_command_serves_an_index(tmp_path, kind):
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"contents": text}) + "\n" for text in PASSAGES))
    if kind == "saved":
        path = tmp_path / "index"
        BM25Search(PASSAGES).save(path)
    process = subprocess.Popen(
        [sys.executable, "-m", "arpo_trl.tools.search.server", "--index", str(path), "--port", "0"],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    try:
        line = process.stdout.readline()
        assert line.startswith("3 passages at http://127.0.0.1:")
        client = RetrieveClient(line.split(" at ")[1].strip(), top_k=1)
        assert client.search("Mira") == f"Page 1: {PASSAGES[0]}"
    finally:
        process.terminate()
        process.wait()


def test_the_command_names_what_is_wrong(tmp_path):
    run = subprocess.run(
        [sys.executable, "-m", "arpo_trl.tools.search.server", "--index", str(tmp_path)],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 2
    assert "holds no saved index" in run.stderr


def test_the_executor_waits_as_asked_and_tries_again():
    answers = [answer_http(status="503 Busy"), answer_http(status="429 Slow down", Retry_After="1"), None]
    asked = []

    def next_answer(connection, request):
        asked.append(time.monotonic())
        connection.sendall(answers[len(asked) - 1] or ok({"result": [[{"contents": "fine"}]]}))

    with Loopback({"*": next_answer}) as server:
        search = tool(make("retrieve", server).search, retries=2)
        executor = ToolExecutor()
        call = executor.submit(ToolCall("search", {"query": "x"}), search).result(timeout=60)
        executor.close()
    assert (call.result, call.error) == ("Page 1: fine", None)
    assert asked[2] - asked[1] >= 1.0
