import asyncio
import os
import pickle
import signal
import sqlite3
import subprocess
import sys
import threading

import pytest

from arpo_trl.execution.cache import ToolCache
from arpo_trl.tools import ToolCall, ToolExecutor, tool


@pytest.fixture
def path(tmp_path):
    return tmp_path / "folder" / "tools.sqlite"


def in_process(code, *arguments, **options):
    code = "import sys\nfrom arpo_trl.execution.cache import ToolCache\n" + code
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], text=True, **options)


# --- the store -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("result", ["text", "", "\ud800 half a surrogate", [{"type": "text", "text": "block"}]])
def test_answers_are_kept_as_they_are(path, result):
    ToolCache(path).set("search", {"query": "q", "k": 3}, result)
    assert ToolCache(path).get("search", {"k": 3, "query": "q"}) == result


def test_answers_are_told_apart(path):
    cache = ToolCache(path)
    cache.set("search", {"query": "q"}, "found")
    assert cache.get("search", {"query": "Q"}) is None
    assert cache.get("browse", {"query": "q"}) is None
    assert cache.get("search", {"query": "q", "k": 1}) is None
    assert ToolCache(path, namespace="wiki-2024").get("search", {"query": "q"}) is None
    assert len(cache) == 1 and len(ToolCache(path, namespace="wiki-2024")) == 0


def test_what_json_cannot_hold_is_left_out(path):
    cache = ToolCache(path)
    cache.set("draw", {}, [{"type": "image", "image": object()}])
    cache.set("draw", {"x": object()}, "text")
    assert len(cache) == 0 and cache.get("draw", {"x": object()}) is None


def test_other_files_are_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("these are notes, not a data base")
    with pytest.raises(ValueError, match="`cache` is not an SQLite file: .*notes.txt"):
        ToolCache(tmp_path / "notes.txt")
    with pytest.raises(ValueError, match="`cache` must be a file, but .* is a folder"):
        tool(len, cache=tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "these are notes, not a data base"


def test_it_travels_to_other_processes(path):
    cache = ToolCache(path, namespace="n")
    cache.set("f", {}, "answer")
    assert pickle.loads(pickle.dumps(cache)).get("f", {}) == "answer"
    child = os.fork()
    if child == 0:  # a connection carried over a fork would be a damaged file
        cache.set("f", {"child": True}, "from the child")
        os._exit(0 if cache.get("f", {}) == "answer" else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert cache.get("f", {"child": True}) == "from the child"


def test_processes_that_write_at_once_lose_nothing(path):
    code = (
        "cache, me = ToolCache(sys.argv[1]), sys.argv[2]\n"
        "for i in range(100):\n"
        "    cache.set('f', {'by': me, 'i': i}, f'{me}-{i}')\n"
        "    cache.set('f', {'shared': i}, 'the same')\n"
    )
    writers = [in_process(code, path, number) for number in range(6)]
    assert [writer.wait() for writer in writers] == [0] * 6
    cache = ToolCache(path)
    assert len(cache) == 6 * 100 + 100
    assert all(cache.get("f", {"by": str(n), "i": i}) == f"{n}-{i}" for n in range(6) for i in range(100))


def test_threads_that_write_at_once_lose_nothing(path):
    cache = ToolCache(path)
    threads = [
        threading.Thread(target=lambda n=n: [cache.set("f", {"n": n, "i": i}, "r") for i in range(50)])
        for n in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(cache) == 400


def test_a_kill_in_mid_write_loses_no_answer_that_was_written(path):
    code = (
        "cache, i = ToolCache(sys.argv[1]), int(sys.argv[2])\n"
        "while True:\n"
        "    cache.set('f', {'i': i}, str(i) * 5000)\n"
        "    print(i, flush=True)\n"
        "    i += 1\n"
    )
    written = []
    for start in range(0, 500_000, 100_000):
        writer = in_process(code, path, start, stdout=subprocess.PIPE)
        written += [int(writer.stdout.readline()) for _ in range(20)]
        writer.send_signal(signal.SIGKILL)
        written += [int(line) for line in writer.stdout.read().splitlines()]
        writer.wait()
        writer.stdout.close()
    assert len(written) >= 100
    cache = ToolCache(path)
    assert all(cache.get("f", {"i": i}) == str(i) * 5000 for i in written)
    assert sqlite3.connect(path).execute("PRAGMA integrity_check").fetchone() == ("ok",)
    cache.set("f", {"after": True}, "goes on")
    assert cache.get("f", {"after": True}) == "goes on"


def test_a_failing_cache_does_not_fail_the_tool(path, caplog):
    cache = ToolCache(path)
    path.parent.mkdir()
    path.write_bytes(b"SQLite format 3\0" + b"damaged" * 100)
    with ToolExecutor() as executor:
        calls = executor.run([(ToolCall("f", {"x": x}), tool(lambda x: x, cache=cache)) for x in range(3)])
    assert [call.result for call in calls] == ["0", "1", "2"]
    assert [record.message for record in caplog.records if "fails and is passed over" in record.message] != []
    assert len(caplog.records) == 1  # told once, not once a call


# --- in the executor -------------------------------------------------------------------------------------------------


def test_a_tool_is_run_once_for_all_executors(path):
    calls = []

    @tool(cache=path)
    def search(query: str, k: int = 3) -> str:
        calls.append((query, k))
        return f"about {query}"

    def ask(**arguments):
        with ToolExecutor() as executor:
            call = executor.run([(ToolCall("search", arguments), search)])[0]
        return call.result, call.cached

    assert ask(query="a") == ("about a", False)
    assert ask(query="a") == ("about a", True)
    assert ask(query="a", k=3) == ("about a", True)  # the default, said
    assert ask(query="a", k=4) == ("about a", False)
    assert calls == [("a", 3), ("a", 4)]


def test_failures_are_never_remembered(path):
    outcomes = [ValueError("no"), "", "yes"]

    @tool(cache=path)
    def search():
        outcome = outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    with ToolExecutor() as executor:
        first, second, third = (executor.run([(ToolCall("search"), search)])[0] for _ in range(3))
    assert (first.error, first.cached) == ("ValueError: no", False)
    assert (second.result, second.cached) == ("", False)  # an empty answer is an answer
    assert (third.result, third.cached) == ("", True)


def test_a_time_out_is_not_remembered(path):
    @tool(cache=path, timeout=0.1)
    async def search():
        await asyncio.sleep(3600)

    with ToolExecutor() as executor:
        assert "gave no answer" in executor.run([(ToolCall("search"), search)])[0].error
    assert len(ToolCache(path)) == 0


@pytest.mark.parametrize("fails", [False, True])
def test_the_same_call_in_flight_is_made_once(path, fails):
    calls = []
    go = threading.Event()

    @tool(cache=path)
    def search(query: str):
        calls.append(query)
        go.wait(20)
        if fails:
            raise ValueError("no")
        return query

    with ToolExecutor() as executor:
        futures = [executor.submit(ToolCall("search", {"query": "ab"[i % 2]}), search) for i in range(64)]
        # every call is in flight once one that was handed in after them is answered
        executor.run([(ToolCall("other"), lambda: None)])
        go.set()
        done = [future.result() for future in futures]
    assert sorted(calls) == ["a", "b"]
    if fails:
        assert {call.error for call in done} == {"ValueError: no"}
        assert not any(call.cached for call in done)
    else:
        assert [call.result for call in done] == ["a", "b"] * 32
        assert sum(call.cached for call in done) == 62


def test_an_answer_is_remembered_whole_and_cut_after(path):
    def words(text):
        return len(text.split())

    text = "word " * 100

    def run(limit):
        with ToolExecutor(count_tokens=words) as executor:
            return executor.run([(ToolCall("f"), tool(lambda: text, cache=path, max_result_tokens=limit))])[0]

    short, long = run(20), run(200)
    assert words(short.result) <= 20
    assert long.cached and long.result == text
