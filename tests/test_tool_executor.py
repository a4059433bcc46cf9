import asyncio
import gc
import inspect
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import weakref
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import psutil
import pytest
import tool_samples
from transformers.utils import get_json_schema

from arpo_trl.execution.errors import TransientToolError
from arpo_trl.execution.executor import cut
from arpo_trl.execution.retries import is_transient, retry_after
from arpo_trl.tools import ToolCall, ToolExecutor, tool, tool_options


@pytest.fixture
def executor():
    with ToolExecutor(timeout=30) as executor:
        yield executor


def one(executor, function, **arguments):
    return executor.run([(ToolCall(getattr(function, "__name__", "tool"), arguments), function)])[0]


def until(condition, seconds=20):
    """Wait for something that another thread or process does in its own time."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


def workers():
    """The worker processes of this one."""
    return [p for p in psutil.Process().children() if any("function_worker" in part for part in p.cmdline())]


# --- results ---------------------------------------------------------------------------------------------------------


def test_sync_tools_of_all_rows_run_at_once(executor):
    together = threading.Barrier(64, timeout=20)

    def meet() -> int:
        return together.wait() >= 0

    calls = executor.run([(ToolCall("meet"), meet) for _ in range(64)])
    assert [call.result for call in calls] == ["True"] * 64


def test_async_tools_of_all_rows_run_at_once(executor):
    here = []
    everyone = asyncio.Event()

    async def meet() -> str:
        here.append(1)
        if len(here) == 200:
            everyone.set()
        await everyone.wait()
        return "met"

    assert {call.result for call in executor.run([(ToolCall("meet"), meet) for _ in range(200)])} == {"met"}


@pytest.mark.parametrize(
    ("value", "result"),
    [
        ("text", "text"),
        ("", ""),
        (3.5, "3.5"),
        (None, "None"),
        ({"a": 1}, "{'a': 1}"),
        ([{"type": "text", "text": "a"}], [{"type": "text", "text": "a"}]),
    ],
)
def test_what_the_model_reads_of_a_value(executor, value, result):
    async def coroutine():
        return value

    for function in (lambda: value, coroutine):
        call = one(executor, function)
        assert (call.result, call.error, call.cached) == (result, None, False)


def test_an_exception_reads_as_in_trl(executor):
    def sync_tool(x: int):
        raise ValueError(f"no such x: {x}")

    async def async_tool(x: int):
        raise ValueError(f"no such x: {x}")

    for function in (sync_tool, async_tool):
        call = one(executor, function, x=1)
        assert call.result == str({"error": "no such x: 1"})
        assert call.error == "ValueError: no such x: 1"


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), asyncio.CancelledError(), StopIteration(5)])
def test_no_exception_of_a_tool_ends_the_run(executor, error):
    def sync_tool():
        raise error

    async def async_tool():
        raise error

    for function in (sync_tool, async_tool):
        call = one(executor, function)
        assert type(error).__name__ in call.error
        assert call.result.startswith("{'error': ")
    assert one(executor, lambda: "still there").result == "still there"


def test_a_value_that_cannot_be_shown_is_an_error(executor):
    class Unshowable:
        def __str__(self):
            raise RuntimeError("cannot be shown")

    assert one(executor, Unshowable).error == "RuntimeError: cannot be shown"


def test_a_call_that_was_not_understood_is_answered_with_its_error(executor):
    called = []
    call = ToolCall("search", error="The arguments are not valid JSON.")
    executor.run([(call, called.append)])
    assert call.result == "The arguments are not valid JSON."
    assert called == []


def test_an_unknown_tool_is_told_what_there_is(executor):
    call = executor.submit(ToolCall("serach"), None, available=["python", "search"]).result()
    assert call.error == "ValueError: Tool serach not found. Available: python, search."
    # without the names it is word for word what TRL says
    assert executor.run([(ToolCall("serach"), None)])[0].result == str({"error": "Tool serach not found."})


def test_wrong_arguments_are_told_to_the_model_as_the_call_itself_tells_them(executor):
    def search(query: str, k: int = 3):
        return query[:k]

    def error(**arguments):
        return one(executor, search, **arguments).error

    assert error(query="q", k=2) is None
    assert error(query="q", k="2") == "TypeError: slice indices must be integers or None or have an __index__ method"
    assert "unexpected keyword argument 'q'" in error(q="q")
    assert "missing 1 required positional argument: 'query'" in error()
    call = executor.run([(ToolCall("search", ["q"]), search)])[0]
    assert "argument after ** must be a mapping, not list" in call.error


def test_calls_in_order_run_one_after_another(executor):
    log = []

    def step(name: str):
        log.append(f"{name} begins")
        time.sleep(0.02)
        log.append(f"{name} ends")
        if name == "b":
            raise ValueError(name)
        return name

    futures = executor.submit_in_order([(ToolCall("step", {"name": name}), step) for name in "abc"])
    assert [future.result().result for future in futures] == ["a", "{'error': 'b'}", "c"]
    assert log == ["a begins", "a ends", "b begins", "b ends", "c begins", "c ends"]


def test_seconds_are_those_of_the_tool_without_the_wait_for_a_place():
    @tool(max_concurrency=1)
    def slow():
        time.sleep(0.05)

    with ToolExecutor() as executor:
        started = time.perf_counter()
        calls = executor.run([(ToolCall("slow"), slow) for _ in range(10)])
        elapsed = time.perf_counter() - started
    assert all(call.seconds >= 0.05 for call in calls)
    # one after another, so their times add up to the whole; with the waits they would be five times that
    assert sum(call.seconds for call in calls) < 1.5 * elapsed


# --- the decorator ---------------------------------------------------------------------------------------------------


class Counter:
    def __init__(self):
        self.total = 0

    def plain(self, by: int) -> int:
        """Count.

        Args:
            by: How much.
        """
        self.total += by
        return self.total

    decorated = tool(timeout=5)(plain)


async def fetch(url: str) -> str:
    """Fetch a page.

    Args:
        url: Its address.
    """
    return url


def test_a_tool_with_options_looks_like_the_tool():
    for function in (tool_samples.add, fetch, Counter().plain):
        wrapped = tool(function, timeout=3, max_calls_per_row=2)
        assert wrapped.__name__ == function.__name__
        assert wrapped.__doc__ == function.__doc__
        assert inspect.signature(wrapped) == inspect.signature(function)
        assert inspect.iscoroutinefunction(wrapped) == inspect.iscoroutinefunction(function)
        assert get_json_schema(wrapped) == get_json_schema(function)
        assert (tool_options(wrapped).timeout, tool_options(wrapped).max_calls_per_row) == (3, 2)
        assert tool_options(function).timeout is None  # the function itself is left as it was


def test_a_tool_with_options_can_be_called_directly():
    assert tool(tool_samples.add, timeout=3)(a=1, b=2) == 3
    assert asyncio.run(tool(fetch, timeout=3)(url="u")) == "u"
    assert tool(Counter().plain)(by=2) == 2


def test_a_decorated_method_is_a_method(executor):
    first, second = Counter(), Counter()
    assert one(executor, first.decorated, by=2).result == "2"
    assert one(executor, first.decorated, by=2).result == "4"
    assert second.total == 0
    assert tool_options(first.decorated).timeout == 5


def test_partials_and_callable_objects(executor):
    class Fetcher:
        async def __call__(self, url: str):
            return url

    assert one(executor, partial(fetch, url="u")).result == "u"
    assert one(executor, Fetcher(), url="v").result == "v"
    for nameless in (Fetcher(), partial(fetch, url="u"), "fetch"):
        with pytest.raises(TypeError, match=r"tool\(\) takes a function, a coroutine function or a bound method, not"):
            tool(nameless, timeout=5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"timeout": 0}, "`timeout` must be a positive number of seconds or None, not 0"),
        ({"retries": -1}, "`retries` must be 0 or a positive integer, not -1"),
        ({"max_concurrency": 0}, "`max_concurrency` must be a positive integer or None, not 0"),
        ({"max_result_tokens": 1.5}, "`max_result_tokens` must be a positive integer or None, not 1.5"),
        ({"process": True}, "`process=True` needs a function that a worker process can import by name"),
    ],
)
def test_wrong_options_are_told_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        tool(lambda: None, **options)


def test_wrong_executor_arguments_are_told_at_once():
    with pytest.raises(ValueError, match="`max_workers` must be a positive integer, not 0"):
        ToolExecutor(max_workers=0)
    with pytest.raises(ValueError, match="`timeout` must be a positive number of seconds or None, not -1"):
        ToolExecutor(timeout=-1)


def test_max_concurrency_bounds_calls_of_one_tool_alone(executor):
    running, most = 0, 0
    lock = threading.Lock()

    def count():
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.01)
        with lock:
            running -= 1

    async def count_async():
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.01)
        running -= 1

    for function in (tool(count, max_concurrency=3), tool(count_async, max_concurrency=3)):
        most = 0
        executor.run([(ToolCall("count"), function) for _ in range(30)])
        assert most == 3


# --- cutting ---------------------------------------------------------------------------------------------------------


def words(text):
    return len(text.split())


def test_long_results_are_cut_with_a_visible_marker():
    text = " ".join(f"w{i}" for i in range(1000))
    with ToolExecutor(count_tokens=words) as executor:
        call = one(executor, tool(lambda: text, max_result_tokens=50))
        assert words(call.result) <= 50
        shown, marker = call.result.split("\n")
        assert text.startswith(shown) and words(shown) > 35
        assert marker == f"[... {len(text) - len(shown):,} of {len(text):,} characters left out]"
        # a text that just fits is left alone, and so are content blocks
        assert one(executor, tool(lambda: text, max_result_tokens=1000)).result == text
        blocks = [{"type": "text", "text": text}]
        assert one(executor, tool(lambda: blocks, max_result_tokens=50)).result == blocks


def test_a_failing_token_count_is_not_hidden():
    with ToolExecutor(count_tokens=lambda text: 1 // 0) as executor:
        with pytest.raises(ZeroDivisionError):
            one(executor, tool(lambda: "text", max_result_tokens=50))


@pytest.mark.parametrize("text", ["ab " * 5000, "x" * 100_000, " \n" * 3000, "a " * 10 + "b" * 50_000, "é" * 3000])
@pytest.mark.parametrize("limit", [1, 7, 8, 9, 100])
@pytest.mark.parametrize("count", [words, len, lambda text: -(-len(text.encode()) // 3)])
def test_a_cut_text_never_exceeds_its_limit(text, limit, count):
    result = cut(text, limit, count)
    marker_alone = result.startswith("[... ")
    assert result == text or marker_alone or count(result) <= limit
    assert (result == text) == (count(text) <= limit)


# --- retries ---------------------------------------------------------------------------------------------------------


class Server(BaseHTTPRequestHandler):
    """Answers with the statuses in `plan`, then with 200."""

    def do_GET(self):
        self.server.arrivals.append(time.monotonic())
        status, headers = self.server.plan.pop(0) if self.server.plan else (200, {})
        if status is None:
            return  # hangs up without an answer
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(b"fine")

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        server.plan, server.arrivals = [], []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def get(server):
    def fetch():
        with urllib.request.urlopen(f"http://127.0.0.1:{server.server_port}/") as answer:
            return answer.read().decode()

    return fetch


@pytest.mark.parametrize("failure", [(503, {}), (429, {}), (500, {}), (408, {}), (None, {})])
def test_transient_failures_are_tried_again(executor, server, failure):
    server.plan = [failure]
    assert one(executor, tool(get(server), retries=1)).result == "fine"
    assert len(server.arrivals) == 2


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422])
def test_permanent_failures_are_not(executor, server, status):
    server.plan = [(status, {})] * 3
    assert f"HTTP Error {status}" in one(executor, tool(get(server), retries=2)).error
    assert len(server.arrivals) == 1


def test_retries_end_and_the_last_failure_is_told(executor, server):
    server.plan = [(503, {})] * 9
    assert "HTTP Error 503" in one(executor, tool(get(server), retries=1)).error
    assert len(server.arrivals) == 2


def test_retry_after_is_honoured(executor, server):
    server.plan = [(429, {"Retry-After": "2"})]
    assert one(executor, tool(get(server), retries=1)).result == "fine"
    assert server.arrivals[1] - server.arrivals[0] >= 2  # the back-off alone would be 0.5 s


def test_a_server_that_asks_for_too_much_patience_is_not_asked_again(executor, server):
    server.plan = [(503, {"Retry-After": "3600"})]
    assert "HTTP Error 503" in one(executor, tool(get(server), retries=3)).error
    assert len(server.arrivals) == 1


def test_a_time_out_is_transient(executor):
    calls = []

    async def slow_at_first():
        calls.append(1)
        if len(calls) == 1:
            await asyncio.sleep(3600)
        return "fine"

    assert one(executor, tool(slow_at_first, timeout=0.2, retries=1)).result == "fine"
    assert len(calls) == 2


def test_what_is_transient():
    def http_error(status):
        return urllib.error.HTTPError("http://x", status, "", {"Retry-After": "Thu, 01 Jan 1970 00:00:00 GMT"}, None)

    class Timeout(OSError):  # as in requests
        pass

    class ReadTimeout(Timeout):
        pass

    class WithResponse(Exception):  # as in requests, httpx and openai
        def __init__(self, status, headers=()):
            self.response = type("Response", (), {"status_code": status, "headers": dict(headers)})()

    transient = [
        TimeoutError(),
        ConnectionResetError(),
        urllib.error.URLError(ConnectionRefusedError()),
        ReadTimeout(),
        http_error(502),
        WithResponse(429),
        TransientToolError("busy"),
    ]
    permanent = [
        ValueError("429"),
        http_error(404),
        WithResponse(403),
        FileNotFoundError(),
        urllib.error.URLError("x"),
    ]
    assert [is_transient(error) for error in transient] == [True] * len(transient)
    assert [is_transient(error) for error in permanent] == [False] * len(permanent)
    assert retry_after(http_error(503)) == 0  # a date that has passed
    assert retry_after(WithResponse(429, {"Retry-After": "7"})) == 7
    assert retry_after(TransientToolError("busy", retry_after=3.0)) == 3
    assert retry_after(ValueError()) == 0


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("7", 7),
        ("Fri, 01 Jan 99999 00:00:00 GMT", 0),
        ("Fri, 01 Jan 9999 00:00:00 -2359", None),
        ("Fri, 31 Dec 9999 23:59:59 -2359", None),
        ("1e999", float("inf")),
        ("9" * 5000, float("inf")),
        ("nan", 0),
        ("-5", 0),
        ("soon", 0),
        ("", 0),
        (b"7", 7),
        (object(), 0),
    ],
)
def test_a_wish_to_wait_is_read_whatever_it_holds(value, seconds):
    error = urllib.error.HTTPError("http://x", 503, "", {"Retry-After": value}, None)
    for asked in (retry_after(error), retry_after(TransientToolError("busy", retry_after=value))):
        assert asked >= 0 if seconds is None else asked == seconds


# --- hanging tools ---------------------------------------------------------------------------------------------------


async def hang_async():
    await asyncio.sleep(3600)


def hang_in_python():
    while True:
        time.sleep(0.001)


def hang_busily():
    while True:
        pass


@pytest.mark.parametrize("function", [hang_async, hang_in_python, hang_busily, tool(tool_samples.hang, process=True)])
def test_a_hanging_tool_is_given_up_and_ends(function):
    with ToolExecutor(timeout=0.2) as executor:
        call = one(executor, function)
        assert call.error == f"TimeoutError: Tool {function.__name__} gave no answer within 0.2 s."
        assert call.result == str({"error": f"Tool {function.__name__} gave no answer within 0.2 s."})
        # the two loops of the executor alone are left
        assert until(lambda: not any(thread.name == "arpo-tool" for thread in threading.enumerate()))
        assert until(lambda: not workers())


def test_a_thousand_hung_calls_leave_nothing_behind():
    process = psutil.Process()
    threads, seen = process.num_threads(), []
    hang = tool(tool_samples.hang, timeout=0.02, process=True, max_concurrency=4)

    def run(number):
        kinds = [(tool(hang_async, timeout=0.05), 9), (tool(hang_in_python, timeout=0.05), 9), (hang, 2)]
        pairs = [(ToolCall(f.__name__), f) for f, share in kinds for _ in range(number * share // 20)]
        seen.extend(weakref.ref(call) for call, _ in pairs)
        assert all(call.error.startswith("TimeoutError") for call in executor.run(pairs))
        assert until(lambda: not any(thread.name == "arpo-tool" for thread in threading.enumerate()))

    with ToolExecutor() as executor:
        run(100)
        gc.collect()
        memory, open_files = process.memory_info().rss, process.num_fds()
        run(900)
        gc.collect()
        assert len(seen) == 1000
        assert process.num_threads() <= threads + 2  # the two event loops
        assert workers() == []
        assert process.num_fds() <= open_files + 2
        assert [reference() for reference in seen if reference() is not None] == []
        assert process.memory_info().rss < memory + 20e6
    assert until(lambda: process.num_threads() <= threads)


def test_hung_calls_that_cannot_be_stopped_are_bounded():
    release = threading.Event()

    @tool(timeout=0.1, max_concurrency=4)
    def wait_in_c():
        release.wait()
        return "released"

    before = threading.active_count()
    with ToolExecutor() as executor:
        calls = executor.run([(ToolCall("wait_in_c"), wait_in_c) for _ in range(1000)])
        errors = [call.error for call in calls]
        told = "RuntimeError: Tool wait_in_c is not called: 4 earlier calls of it hang and cannot be stopped."
        assert errors.count("TimeoutError: Tool wait_in_c gave no answer within 0.1 s.") == 4
        assert errors.count(told) == 996
        assert threading.active_count() <= before + 5  # four and the loop
        assert one(executor, lambda: "other tools go on").result == "other tools go on"
        release.set()
        assert until(lambda: threading.active_count() <= before + 1)
        assert until(lambda: one(executor, wait_in_c).result == "released")


@pytest.mark.parametrize("stoppable", [True, False])
def test_an_async_tool_that_blocks_the_event_loop_does_not_stop_the_others(stoppable):
    release = threading.Event()

    @tool(timeout=0.3)
    async def block():
        release.wait() if not stoppable else hang_in_python()

    async def fine():
        await asyncio.sleep(0.01)
        return "fine"

    before = threading.active_count()
    with ToolExecutor(timeout=0.3) as executor:
        assert one(executor, block).error.startswith("TimeoutError")
        assert until(lambda: one(executor, fine).result == "fine")
        release.set()
        assert until(lambda: threading.active_count() <= before + 2)
        assert one(executor, fine).result == "fine"


def test_a_coroutine_that_ignores_its_cancellation_is_bounded():
    stop = False

    @tool(timeout=0.1, max_concurrency=2)
    async def stubborn():
        while not stop:
            try:
                await asyncio.sleep(0.05)
            except asyncio.CancelledError:
                pass
        return "stopped"

    with ToolExecutor() as executor:
        errors = [call.error for call in executor.run([(ToolCall("stubborn"), stubborn) for _ in range(10)])]
        assert sum("is not called" in error for error in errors) == 8
        stop = True
        assert until(lambda: one(executor, stubborn).result == "stopped")


# --- worker processes ------------------------------------------------------------------------------------------------


def test_a_tool_in_a_worker_process(executor):
    add = tool(tool_samples.add, process=True)
    assert one(executor, add, a=2, b=3).result == "5"
    assert one(executor, add, a=2).result == "3"
    assert one(executor, add, a=[]).error.startswith("TypeError: can only concatenate list")
    # warm: one call after another by the same process, which is not this one
    worker_id = tool(tool_samples.worker_id, process=True)
    (pid,) = {one(executor, worker_id).result for _ in range(5)}
    assert int(pid) != os.getpid()


def test_exceptions_of_a_worker_process(executor):
    fail = tool(tool_samples.fail, process=True)
    assert one(executor, fail, kind="k").error == "KeyError: 'k'"
    assert one(executor, fail, kind="two parts").error == "RuntimeError: TwoPartError: two parts"
    assert one(executor, tool(tool_samples.leave, process=True)).error == "RuntimeError: SystemExit: 4"


def test_a_worker_process_that_dies_is_replaced(executor):
    die = tool(tool_samples.die, process=True)
    for _ in range(2):
        assert one(executor, die).error == "RuntimeError: the worker process died with exit status 3"
    # one that dies between two calls is noticed too
    worker_id = tool(tool_samples.worker_id, process=True)
    pid = int(one(executor, worker_id).result)
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # all of its threads are gone, and it is left to be noticed
    assert int(one(executor, worker_id).result) != pid
    assert not psutil.pid_exists(pid)


def test_what_a_killed_worker_has_started_is_killed_too(tmp_path):
    with ToolExecutor(timeout=1) as executor:
        one(executor, tool(tool_samples.hang_with_child, process=True), path=str(tmp_path / "pids"))
        pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
        assert len(pids) == 2
        assert until(lambda: not any(psutil.pid_exists(pid) and _runs(pid) for pid in pids))


def _runs(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_workers_end_when_the_run_is_killed():
    script = (
        "import sys, time; sys.path.insert(0, sys.argv[1])\n"
        "import tool_samples\n"
        "from arpo_trl.tools import ToolCall, ToolExecutor, tool\n"
        "executor = ToolExecutor()\n"
        "calls = executor.run([(ToolCall('worker_id'), tool(tool_samples.worker_id, process=True))])\n"
        "executor.submit(ToolCall('hang'), tool(tool_samples.hang, process=True))\n"
        "time.sleep(0.5)\n"
        "print(calls[0].result, flush=True)\n"
        "time.sleep(3600)\n"
    )
    run = subprocess.Popen(
        [sys.executable, "-c", script, os.path.dirname(__file__)], stdout=subprocess.PIPE, text=True
    )
    try:
        pid = int(run.stdout.readline())
        pids = [child.pid for child in psutil.Process(run.pid).children()]
        assert pid in pids and len(pids) == 2
    finally:
        run.kill()
        run.wait()
        run.stdout.close()
    assert until(lambda: not any(_runs(pid) for pid in pids))


# --- closing ---------------------------------------------------------------------------------------------------------


def test_closing_answers_what_still_runs_and_leaves_nothing():
    before = threading.active_count()
    executor = ToolExecutor()
    futures = [
        executor.submit(ToolCall("hang"), function)
        for function in (hang_async, hang_in_python, tool(tool_samples.hang, process=True))
    ]
    futures += executor.submit_in_order([(ToolCall("hang"), hang_in_python), (ToolCall("next"), hang_busily)])
    assert until(lambda: len(workers()) == 1)
    executor.close()
    executor.close()
    assert {future.result().error for future in futures} == {"the executor was closed before the call had ended"}
    assert threading.active_count() == before
    assert workers() == []


def test_a_closed_executor_starts_afresh(executor):
    assert one(executor, tool_samples.add, a=1).result == "2"
    executor.close()
    assert one(executor, tool_samples.add, a=1).result == "2"


def test_an_executor_that_is_never_used_starts_nothing():
    before = threading.active_count()
    ToolExecutor().close()
    assert threading.active_count() == before


def test_an_executor_that_is_dropped_leaves_nothing():
    before = threading.active_count()
    executor = ToolExecutor()
    assert one(executor, tool(tool_samples.add, process=True), a=1).result == "2"
    del executor
    gc.collect()
    assert until(lambda: threading.active_count() == before)
    assert workers() == []


def test_a_future_can_be_cancelled(executor):
    release = threading.Event()
    ran = []
    first, second = executor.submit_in_order(
        [(ToolCall("wait"), release.wait), (ToolCall("append", {}), lambda: ran.append(1))]
    )
    second.cancel()
    release.set()
    assert first.result().result == "True"
    assert one(executor, lambda: len(ran)).result == "0"
