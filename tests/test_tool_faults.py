"""Tools that disturb what runs them: their worker process, the text of their exceptions, their cache."""

import os
import sqlite3
import threading
import time

import psutil
import pytest
import tool_samples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from arpo_trl.execution import cache as cache_module
from arpo_trl.execution.cache import ToolCache
from arpo_trl.execution.function_worker import _HEADER
from arpo_trl.tools import ToolCall, ToolExecutor, tool

linux = pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs /proc")


@pytest.fixture(scope="module")
def executor():
    with ToolExecutor(timeout=30) as executor:
        yield executor


def one(executor, function, **arguments):
    return executor.run([(ToolCall(getattr(function, "__name__", "tool"), arguments), function)])[0]


def until(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


def runs(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


# --- the socket of a worker process ----------------------------------------------------------------------------------

FOREIGN = (
    "RuntimeError: the tool wrote to the socket of its worker process; its answer is lost, and the process was ended"
)
contents = st.one_of(
    st.binary(min_size=1, max_size=200),
    # as near to a message as what does not know the secret can come
    st.builds(
        _HEADER.pack, st.binary(min_size=16, max_size=16), st.integers(0, 9), st.just(2**60), st.just(b"0" * 16)
    ),
)


@linux
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(contents)
def test_whatever_a_tool_writes_to_its_worker_no_answer_goes_to_another_call(executor, content):
    function = tool(tool_samples.write_and_answer, process=True)
    assert one(executor, function, content=content, x=1).error == FOREIGN
    assert one(executor, function, content=b"", x=2).result == "2"


@linux
@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(contents)
def test_what_a_tool_writes_after_its_answer_is_noticed_before_the_next_call(executor, content):
    function = tool(tool_samples.write_later_and_answer, process=True)
    assert one(executor, function, content=content, x=1).result == "1"
    time.sleep(0.1)
    assert one(executor, function, content=b"", x=2).result == "2"


@pytest.mark.parametrize("function", [tool_samples.fork_and_answer, tool_samples.fork_and_raise])
def test_a_forked_child_that_returns_answers_nobody(executor, function):
    for x in range(3):
        call = one(executor, tool(function, process=True), x=x)
        assert f"{x} of the parent" in call.result


@linux
def test_a_worker_whose_socket_is_gone_is_replaced(executor, tmp_path):
    for x in range(2):
        assert "died" in one(executor, tool(tool_samples.close_everything, process=True), x=x).error
        replace = tool(tool_samples.put_a_file_in_its_place, process=True)
        assert "died" in one(executor, replace, path=str(tmp_path / "file")).error
        assert (tmp_path / "file").read_bytes() == b""
    assert one(executor, tool(tool_samples.add, process=True), a=1).result == "2"


@linux
@pytest.mark.parametrize("then", ["die", "hang", "answer"])
def test_what_a_tool_started_ends_with_its_worker(tmp_path, then):
    path = tmp_path / "pids"
    with ToolExecutor(timeout=1 if then == "hang" else 30) as executor:
        one(executor, tool(tool_samples.daemons, process=True), path=str(path), then=then)
        pids = [int(pid) for pid in path.read_text().split()]
        if then == "answer":  # they may serve the next call
            assert all(runs(pid) for pid in pids)
    assert len(pids) == 2
    assert until(lambda: not any(runs(pid) for pid in pids))


# --- exceptions without a text, or with one that raises --------------------------------------------------------------


@pytest.mark.parametrize("process", [False, True])
@pytest.mark.parametrize(
    ("kind", "error", "text"),
    [
        ("error", "SilentError: its message cannot be shown", "its message cannot be shown"),
        ("exit", "RuntimeError: SilentExit: its message cannot be shown", "SilentExit: its message cannot be shown"),
        ("no text", "ValueError", "ValueError"),
    ],
)
def test_every_exception_is_told(executor, kind, error, text, process):
    function = tool(tool_samples.fail_silently, process=process)
    # more often than there are places: none is kept
    calls = executor.run([(ToolCall("fail_silently", {"kind": kind}), function) for _ in range(3 if process else 80)])
    assert {call.error for call in calls} == {error}
    assert {call.result for call in calls} == {str({"error": text})}
    assert one(executor, tool(tool_samples.add, process=process), a=1).result == "2"


def test_every_exception_of_an_async_tool_is_told(executor):
    async def fail(kind: str):
        tool_samples.fail_silently(kind)

    assert one(executor, fail, kind="error").error == "SilentError: its message cannot be shown"
    assert one(executor, fail, kind="exit").error == "RuntimeError: SilentExit: its message cannot be shown"
    assert one(executor, fail, kind="no text").result == str({"error": "ValueError"})


def test_an_exception_whose_text_never_comes_is_given_up(executor):
    class Endless(Exception):
        def __str__(self):
            while True:
                time.sleep(0.001)

    def fail():
        raise Endless

    assert "gave no answer within 0.3 s" in one(executor, tool(fail, timeout=0.3)).error
    assert one(executor, tool_samples.add, a=1).result == "2"


def test_an_exception_whose_attributes_raise_is_final(executor):
    calls = []

    class Odd(Exception):
        @property
        def response(self):
            raise RuntimeError("no response")

    def fail():
        calls.append(1)
        raise Odd("odd")

    assert one(executor, tool(fail, retries=3)).error == "Odd: odd"
    assert len(calls) == 1


def test_texts_that_are_strings_of_another_class(executor):
    class Text(str):
        def encode(self, *arguments):
            raise RuntimeError("no bytes")

    class Named(Exception):
        def __str__(self):
            return Text("named \ud800")

    def fail():
        raise Named

    call = one(executor, fail)
    assert call.error == "Named: named \ufffd" and type(call.error) is str


# --- a cache that is slow or locked ----------------------------------------------------------------------------------


class SlowCache(ToolCache):
    """Stores nothing before it may."""

    def __init__(self, path):
        super().__init__(path)
        self.may_store = threading.Event()

    def set(self, *arguments):
        assert self.may_store.wait(60)
        super().set(*arguments)


def test_a_call_does_not_wait_until_its_answer_is_stored(tmp_path):
    cache, made = SlowCache(tmp_path / "tools.sqlite"), []

    @tool(cache=cache)
    def double(x: int) -> int:
        made.append(x)
        return 2 * x

    with ToolExecutor() as executor:
        calls = [one(executor, double, x=x) for x in (1, 2, 1, 2)]
        assert len(cache) == 0
        # equal calls that come before it is stored are answered all the same
        assert [(call.result, call.cached) for call in calls] == [("2", False), ("4", False), ("2", True), ("4", True)]
        assert made == [1, 2]
        cache.may_store.set()
        assert until(lambda: len(cache) == 2)
        assert one(executor, double, x=1).cached


def test_answers_are_stored_when_the_executor_closes(tmp_path):
    cache = SlowCache(tmp_path / "tools.sqlite")
    with ToolExecutor() as executor:
        one(executor, tool(tool_samples.add, cache=cache), a=1)
        cache.may_store.set()
    assert cache.get("add", {"a": 1, "b": 1}) == "2"


@pytest.mark.parametrize("lock", ["BEGIN EXCLUSIVE", "PRAGMA locking_mode = EXCLUSIVE; BEGIN IMMEDIATE"])
def test_a_locked_cache_is_tried_once_and_passed_over_for_a_while(tmp_path, monkeypatch, lock):
    monkeypatch.setattr(cache_module, "_LOOK_UP_PATIENCE", 0.05)
    monkeypatch.setattr(cache_module, "_STORE_PATIENCE", 0.05)
    path = tmp_path / "tools.sqlite"
    cache, tried = ToolCache(path), []
    connect = cache_module._connect
    monkeypatch.setattr(cache_module, "_connect", lambda *arguments: tried.append(1) or connect(*arguments))
    if "PRAGMA" in lock:
        prepared = ToolCache(path)
        prepared.set("add", {"a": 9}, "10")
        prepared.close()
        tried.clear()
    holder = sqlite3.connect(path, isolation_level=None)
    for statement in lock.split(";"):
        holder.execute(statement)
    double = tool(lambda x: 2 * x, cache=cache)
    with ToolExecutor() as executor:
        calls = executor.run([(ToolCall("double", {"x": x}), double) for x in range(8)])
    assert [call.result for call in calls] == [str(2 * x) for x in range(8)]
    assert len(tried) == 1
    holder.rollback()
    holder.close()
    assert cache.get("double", {"x": 3}) is None
    monkeypatch.setattr(cache, "_passed_over_until", 0.0)  # the while has passed
    cache.set("double", {"x": 3}, "6")
    assert cache.get("double", {"x": 3}) == "6"
