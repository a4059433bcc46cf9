"""The Python tool does what its docstrings say; what it keeps hostile code from is in test_tool_python_attacks.py."""

import contextlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
from loopback import Loopback, http
from transformers.utils import get_json_schema

from arpo_trl.execution.errors import TransientToolError
from arpo_trl.tools.python import PythonError, PythonSandbox
from arpo_trl.tools.python.remote import RemoteSandbox


def make_sandbox(**options):
    try:
        return PythonSandbox(**options)
    except RuntimeError as error:
        if options.get("sandbox", "bwrap") != "bwrap":
            raise
        pytest.skip(str(error))


@pytest.fixture(scope="module", params=["bwrap", "rlimits"])
def sandbox(request):
    with make_sandbox(sandbox=request.param, timeout=20, max_output_chars=1000) as sandbox:
        yield sandbox


def error_of(sandbox, code: str) -> str:
    with pytest.raises(PythonError) as error:
        sandbox.python(code)
    return str(error.value)


def eventually(condition, seconds: float = 20.0) -> bool:
    """Processes are buried a moment after they have been killed."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return bool(condition())


# ---------------------------------------------------------------------------------------------------------------------
# What a call returns


@pytest.mark.parametrize(
    ("code", "answer"),
    [
        ("print(1987 - 1934)", "53"),
        ("x = 6\nx * 7", "42"),
        ("'text'", "'text'"),
        ("print('a')\n'b'", "a\n'b'"),
        ("x = 3", "(no output)"),
        ("", "(no output)"),
        ("print()", "(no output)"),
        ("None", "(no output)"),
        ("print('x')\nNone", "x"),
        ("def f():\n    return 1", "(no output)"),
        ("for i in range(3):\n    i", "(no output)"),
        ("1; 2", "2"),
        ("print('größe ✓')", "größe ✓"),
        ("print('\\ud800')", "\\ud800"),
        ("'# not a comment'  # a comment", "'# not a comment'"),
        ("__name__", "'__main__'"),
        ("import sys; print('out'); print('err', file=sys.stderr); print('out')", "out\nerr\nout"),
        ("import os; os.write(1, b'\\xff')", "\\xff1"),
        ("print('before')\nexit()", "before"),
        ("import sys; sys.exit(0)", "(no output)"),
        ("from sympy import *\nx = symbols('x')\nsolve(x**2 - 2)", "[-sqrt(2), sqrt(2)]"),
        ("import numpy as np\nnp.arange(3)", "array([0, 1, 2])"),
        ("import asyncio\nasync def f():\n    return 3\nasyncio.run(f())", "3"),
        ("import multiprocessing as m\nwith m.Pool(2) as p:\n    print(p.map(abs, [-1, -2]))", "[1, 2]"),
        ("import pickle\nclass A: pass\ntype(pickle.loads(pickle.dumps(A()))) is A", "True"),
        ("open('file', 'w').write('abc'); open('file').read()", "'abc'"),
        ("import tempfile\nwith tempfile.TemporaryFile() as f: f.write(b'1')", "(no output)"),
    ],
)
def test_answers(sandbox, code, answer):
    assert sandbox.python(code) == answer


def test_traceback_shows_the_models_lines_and_no_others(sandbox):
    text = error_of(sandbox, "print('first')\nimport json\n\ndef f(text):\n    return json.loads(text)\n\nf('{')\n")
    assert text.startswith("first\nTraceback (most recent call last):\n")
    assert re.findall(r'File "(.*)", line (\d+)', text) == [("<python>", "7"), ("<python>", "5")]
    assert "    return json.loads(text)\n" in text
    assert text.splitlines()[-1].startswith("json.decoder.JSONDecodeError: ")


def test_chained_exceptions_are_shown_without_library_frames(sandbox):
    text = error_of(
        sandbox, "import json\ntry:\n    json.loads('{')\nexcept ValueError as e:\n    raise KeyError('k') from e"
    )
    assert "JSONDecodeError" in text and text.splitlines()[-1] == "KeyError: 'k'"
    assert set(re.findall(r'File "(.*?)"', text)) == {"<python>"}


@pytest.mark.parametrize(
    ("code", "last_line"),
    [
        ("1/0", "ZeroDivisionError: division by zero"),
        ("x = (", "SyntaxError: '(' was never closed"),
        ("input()", "EOFError: EOF when reading a line"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("import sys; sys.exit('no solution')", "SystemExit: no solution"),
        ("exit(3)", "SystemExit: 3"),
        ("def f(): f()\nf()", "RecursionError: maximum recursion depth exceeded"),
        ("class E(Exception):\n    def __str__(self): raise self\nraise E", "E: <exception str() failed>"),
        ("class A:\n    def __repr__(self): raise ValueError('r')\nA()", "ValueError: r"),
    ],
)
def test_errors_are_told_to_the_model(sandbox, code, last_line):
    assert error_of(sandbox, code).splitlines()[-1] == last_line


def test_code_must_be_text(sandbox):
    assert "must be a string of Python code, not int" in error_of(sandbox, 3)


def test_long_output_loses_its_middle(sandbox):
    text = sandbox.python("print('a' * 5000)\nprint('b' * 5000)\n'end'")
    assert text == "a" * 500 + "\n[... 9007 characters left out ...]\n" + ("b" * 5000 + "\n'end'")[-500:]


def test_long_output_keeps_the_error(sandbox):
    assert error_of(sandbox, "print('a' * 5000)\n1/0").endswith("ZeroDivisionError: division by zero")


def test_schema_for_the_chat_template(sandbox):
    function = get_json_schema(sandbox.python)["function"]
    assert function["name"] == "python"
    assert function["parameters"]["required"] == ["code"]
    assert function["parameters"]["properties"]["code"]["type"] == "string"


# ---------------------------------------------------------------------------------------------------------------------
# Calls know nothing of each other


@pytest.mark.parametrize("module", ["", "sympy"])  # either worker
def test_no_state_crosses(sandbox, module):
    sandbox.python(
        f"import builtins, os, math  # {module}\n"
        "kept = builtins.kept = math.kept = os.environ['KEPT'] = 'kept'\n"
        "open('kept', 'w').close(); os.chdir('/')"
    )
    seen = f"import builtins, os, math  # {module}\n" + (
        "['kept' in globals(), hasattr(builtins, 'kept'), hasattr(math, 'kept'), 'KEPT' in os.environ,"
        " os.listdir('.'), os.getcwd() == '/']"
    )
    assert sandbox.python(seen) == "[False, False, False, False, [], False]"


def test_random_numbers_differ_between_calls(sandbox):
    code = "import random, numpy\nrandom.random(), numpy.random.rand()"
    first, second = [eval(sandbox.python(code).replace("np.float64", "")) for _ in range(2)]
    assert first[0] != second[0] and first[1] != second[1]


def test_many_threads_get_their_own_answers(sandbox):
    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(lambda i: sandbox.python(f"print({i} * 2)"), range(64)))
    assert answers == [str(2 * i) for i in range(64)]


def test_preloaded_modules_are_loaded_where_the_code_names_them(sandbox):
    assert sandbox.python("import sys\n'sym' + 'py' in sys.modules") == "False"
    assert sandbox.python("import sys\n'sympy' in sys.modules") == "True"


def test_modules_that_are_not_installed_are_not_preloaded():
    with PythonSandbox("rlimits", preload=["no_such_module"]) as sandbox:
        assert "ModuleNotFoundError: No module named 'no_such_module'" in error_of(sandbox, "import no_such_module")


# ---------------------------------------------------------------------------------------------------------------------
# Limits


@pytest.fixture(scope="module", params=["bwrap", "rlimits"])
def narrow(request):
    with make_sandbox(sandbox=request.param, timeout=1, memory_mb=128, preload=[]) as sandbox:
        yield sandbox


def test_time_out_keeps_the_output_so_far(narrow):
    text = error_of(narrow, "print('so far')\nwhile True: pass")
    assert text == "so far\nThe code ran longer than 1 s and was stopped."


def test_time_out_while_asleep(narrow):
    assert error_of(narrow, "import time\ntime.sleep(100)") == "The code ran longer than 1 s and was stopped."


def test_memory_of_one_process(narrow):
    assert error_of(narrow, "x = bytearray(1 << 30)").splitlines()[-1] == "MemoryError"
    assert narrow.python("x = bytearray(100 << 20)\nlen(x)") == str(100 << 20)


def test_memory_of_all_processes_together(narrow):
    code = """
        import os, time
        for _ in range(4):
            if os.fork() == 0:
                x = b"1" * (90 << 20)
                time.sleep(100)
        time.sleep(100)
    """
    assert error_of(narrow, textwrap.dedent(code)) in (
        "The code used more than 128 MB of memory and was stopped.",
        "The code ran longer than 1 s and was stopped.",  # on a machine too busy for them to get that far
    )


def test_a_program_that_is_started_does_not_count_with_the_memory_of_its_parent(narrow):
    code = (
        "import subprocess, sys\nx = b'1' * (80 << 20)\n"
        "for _ in range(3): subprocess.run([sys.executable, '-S', '-c', ''])"
    )
    assert narrow.python(code) == "(no output)"


def test_size_of_a_file(narrow):
    assert "OSError: [Errno 27] File too large" in error_of(narrow, "open('f', 'wb').write(bytes(65 << 20))")


def test_the_end_of_the_interpreter_is_not_a_success(narrow):
    assert error_of(narrow, "import os\nprint(1)\nos._exit(0)") == (
        "1\nThe code ended the interpreter with exit code 0 before it had run to its end."
    )
    assert error_of(narrow, "import ctypes\nctypes.string_at(0)") == (
        "The code crashed the interpreter (Segmentation fault)."
    )


def test_a_daemon_does_not_outlive_its_call(narrow):
    def processes():
        return {p.pid for p in psutil.Process().children(recursive=True)}

    narrow.python("")
    before = processes()
    code = (
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n"
        "    if os.fork() == 0:\n        time.sleep(100)\n    os._exit(0)\nprint('gone')"
    )
    assert narrow.python(code) == "gone"
    assert eventually(lambda: processes() <= before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sandbox": "docker"}, "sandbox must be 'bwrap' or 'rlimits', not 'docker'"),
        ({"timeout": 0}, "timeout must be a positive number, not 0"),
        ({"timeout": float("inf")}, "timeout must be a positive number, not inf"),
        ({"memory_mb": -1}, "memory_mb must be a positive number, not -1"),
        ({"max_output_chars": 0}, "max_output_chars must be a positive number"),
        ({"workers": 0}, "workers must be a positive number, not 0"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        PythonSandbox(**options)


@pytest.mark.parametrize(
    "script", [None, "#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n"]
)
def test_unusable_bwrap_names_both_ways_on(tmp_path, monkeypatch, script):
    if script:
        (tmp_path / "bwrap").write_text(script)
        (tmp_path / "bwrap").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError) as error:
        PythonSandbox()
    assert "apt install bubblewrap" in str(error.value) and "PythonSandbox(sandbox='rlimits')" in str(error.value)
    assert ("No permissions to create new namespace" if script else "not installed") in str(error.value)


# ---------------------------------------------------------------------------------------------------------------------
# Processes


def test_close_ends_every_process():
    before = set(psutil.Process().children(recursive=True))
    sandbox = make_sandbox()
    started = set(psutil.Process().children(recursive=True)) - before
    assert started
    sandbox.close()
    sandbox.close()
    assert eventually(lambda: not any(process.is_running() for process in started))
    with pytest.raises(RuntimeError, match="closed"):
        sandbox.python("1")


def kill_worker(sandbox):
    """Kill the process that serves calls, as an operator or the kernel might, and wait until it is gone."""
    worker = psutil.Process(sandbox._bare._process.pid)
    processes = [worker, *worker.children(recursive=True)]
    os.killpg(worker.pid, signal.SIGKILL)
    assert eventually(lambda: not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes))


def test_a_worker_that_died_is_replaced(sandbox):
    kill_worker(sandbox)
    assert sandbox.python("1 + 1") == "2"


def test_a_worker_that_dies_during_a_call_is_a_transient_failure(sandbox):
    errors = []

    def call():
        try:
            sandbox.python("import time\ntime.sleep(15)")
        except Exception as error:
            errors.append(error)

    sandbox.python("")
    worker = psutil.Process(sandbox._bare._process.pid)
    idle = 1 if sandbox.sandbox == "bwrap" else 0  # the interpreter under bwrap
    thread = threading.Thread(target=call)
    thread.start()
    assert eventually(lambda: len(worker.children(recursive=True)) >= idle + 2)
    kill_worker(sandbox)
    thread.join()
    assert [type(error) for error in errors] == [TransientToolError]
    assert sandbox.python("1 + 1") == "2"


def test_after_a_fork_both_processes_can_call(sandbox):
    with contextlib.ExitStack() as stack:
        stack.enter_context(sandbox._bare._lock)  # as if another thread were calling at the moment of the fork
        read, write = os.pipe()
        if (pid := os.fork()) == 0:
            with contextlib.suppress(BaseException):
                os.write(write, sandbox.python("2 + 2").encode())
                sandbox.close()
            os._exit(0)
    os.close(write)
    os.waitpid(pid, 0)
    assert os.read(read, 100) == b"4"
    os.close(read)
    assert sandbox.python("3 + 3") == "6"


@pytest.mark.parametrize("end", ["pass", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"])
@pytest.mark.parametrize("kind", ["bwrap", "rlimits"])
def test_the_sandbox_ends_with_its_owner(kind, end):
    make_sandbox(sandbox=kind, preload=[]).close()
    script = f"""
        import threading, time, psutil
        from arpo_trl.tools.python import PythonSandbox
        sandbox = PythonSandbox({kind!r}, preload=[])
        threading.Thread(target=sandbox.python, args=["import time; time.sleep(100)"], daemon=True).start()
        time.sleep(0.5)
        print(*[child.pid for child in psutil.Process().children(recursive=True)], flush=True)
        {end}
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True)
    pids = list(map(int, run.stdout.split()))
    assert len(pids) >= 4  # two workers, a supervisor and the code
    assert eventually(lambda: not any(psutil.pid_exists(pid) for pid in pids))


# ---------------------------------------------------------------------------------------------------------------------
# Another machine's sandbox


def fusion(status="Success", message="", run_status="Finished", stdout="", stderr="", return_code=0):
    run = {"status": run_status, "execution_time": 0.1, "return_code": return_code, "stdout": stdout, "stderr": stderr}
    return http(
        json.dumps({"status": status, "message": message, "compile_result": None, "run_result": run, "files": {}})
    )


def run_code(connection, request):
    """What a SandboxFusion server does with a request, minus the isolation."""
    body = json.loads(request.body)
    assert request.line.startswith("POST /run_code ") and body["language"] == "python"

    def limit_memory():  # as the server does, which takes the limit for that of the stack, too
        size = body["memory_limit_MB"] << 20
        for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA, resource.RLIMIT_STACK):
            resource.setrlimit(kind, (size, resource.getrlimit(kind)[1]))

    try:
        run = subprocess.run(
            [sys.executable, "-I", "-c", body["code"]],
            capture_output=True,
            text=True,
            timeout=body["run_timeout"],
            preexec_fn=limit_memory if body["memory_limit_MB"] > 0 else None,
            env={"PATH": os.environ["PATH"]},  # a server says nothing about the number of threads
        )
    except subprocess.TimeoutExpired as error:
        out = (error.stdout or b"").decode()
        connection.sendall(fusion("Failed", run_status="TimeLimitExceeded", stdout=out, stderr="", return_code=None))
    else:
        status = "Failed" if run.returncode else "Success"
        connection.sendall(fusion(status, "", "Finished", run.stdout, run.stderr, run.returncode))


@pytest.mark.parametrize(
    ("code", "answer"),
    [("print(1987 - 1934)", "53"), ("x = 'a\\'\"'\nx", "'a\\'\"'"), ("x = 1", "(no output)"), ("'ü✓'", "'ü✓'")],
)
def test_remote_answers(code, answer):
    with Loopback({"/run_code": run_code}) as server:
        assert RemoteSandbox(server.url).python(code) == answer


@pytest.mark.parametrize("memory_mb", [256, 1024, 4096, None, -1])
@pytest.mark.parametrize(
    ("code", "answer"),
    [
        ("import numpy as np\nint(np.arange(3).sum())", "3"),
        ("import threading\nt = threading.Thread(target=print, args=['ok']); t.start(); t.join()", "ok"),
        (
            "import subprocess, sys\n"
            "code = 'import threading; t = threading.Thread(target=print, args=[1]); t.start(); t.join()'\n"
            "print(subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stdout)",
            "1",
        ),
    ],
)
def test_remote_threads_start_under_the_servers_limits(memory_mb, code, answer):
    with Loopback({"/run_code": run_code}) as server:
        assert RemoteSandbox(server.url, memory_mb=memory_mb).python(code) == answer
    assert json.loads(server.requests[0].body)["memory_limit_MB"] == (memory_mb or -1)


def test_remote_many_threads_fit_into_the_default_memory():
    code = """
        import threading
        go = threading.Event()
        threads = [threading.Thread(target=lambda: (bytearray(1000), go.wait())) for _ in range(48)]
        for t in threads: t.start()
        go.set()
        print(len(threads))
    """
    with Loopback({"/run_code": run_code}) as server:
        assert RemoteSandbox(server.url).python(textwrap.dedent(code)) == "48"


def test_remote_memory_is_limited():
    with Loopback({"/run_code": run_code}) as server:
        assert error_of(RemoteSandbox(server.url), "x = bytearray(2 << 30)").splitlines()[-1] == "MemoryError"
        assert RemoteSandbox(server.url, memory_mb=None).python("import mmap\nlen(mmap.mmap(-1, 2 << 30))") == str(
            2 << 30
        )


@pytest.mark.parametrize("memory_mb", [0, -2, 1, 63])
def test_remote_memory_that_no_interpreter_fits_into(memory_mb):
    with pytest.raises(ValueError, match=f"memory_mb must be at least 64.*, not {memory_mb}"):
        RemoteSandbox("http://127.0.0.1:9", memory_mb=memory_mb)


def test_remote_errors_of_the_code():
    with Loopback({"/run_code": run_code}) as server, PythonSandbox("rlimits", preload=[]) as local:
        remote = RemoteSandbox(server.url + "/", timeout=2, memory_mb=64)
        assert error_of(remote, "print(1)\n1/0") == error_of(local, "print(1)\n1/0")
        assert error_of(remote, "import os\nos._exit(3)") == "The code ended the interpreter with exit code 3."
        assert error_of(remote, "while True: pass") == "The code ran longer than 2 s and was stopped."
    assert json.loads(server.requests[0].body)["memory_limit_MB"] == 64


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (http("broken", "500 Internal Server Error"), TransientToolError, "HTTP 500"),
        (http("wait", "429 Too Many Requests", Retry_After="7"), TransientToolError, "HTTP 429"),
        (fusion("SandboxError", "no space left"), TransientToolError, "no space left"),
        (http("<html>proxy</html>"), TransientToolError, "did not answer with JSON"),
        (http('{"status": "Success", "mess')[:-20], TransientToolError, "failed"),
        (b"", TransientToolError, "failed"),
        (b"garbage\r\n\r\n", TransientToolError, "failed"),
        (http("[1, 2]"), RuntimeError, "does not speak SandboxFusion's protocol"),
        (http('{"detail": "no"}'), RuntimeError, "does not speak SandboxFusion's protocol"),
        (http('{"status": "Success", "message": "", "run_result": null}'), RuntimeError, "does not speak"),
        (http('{"detail": "bad field"}', "422 Unprocessable Entity"), RuntimeError, "HTTP 422"),
        (http("", "404 Not Found"), RuntimeError, "HTTP 404"),
    ],
)
def test_remote_failures_of_the_server(answer, error, message):
    with Loopback({"/run_code": answer}) as server, pytest.raises(error, match=message) as caught:
        RemoteSandbox(server.url).python("1")
    assert type(caught.value) is error


def test_remote_retry_after_is_passed_on():
    answer = http("wait", "503 Service Unavailable", Retry_After="7")
    with Loopback({"*": answer}) as server, pytest.raises(TransientToolError) as caught:
        RemoteSandbox(server.url).python("1")
    assert caught.value.retry_after == 7


def test_remote_that_never_answers(monkeypatch):
    monkeypatch.setattr("arpo_trl.tools.python.remote._QUEUE_SECONDS", 0.2)
    server = Loopback({})
    server.answers["*"] = server.hang
    with server, pytest.raises(TransientToolError):
        RemoteSandbox(server.url, timeout=0.3).python("1")


def test_remote_that_nobody_serves():
    with Loopback({}) as server:
        pass
    with pytest.raises(TransientToolError):
        RemoteSandbox(server.url).python("1")


def test_remote_address_is_checked():
    with pytest.raises(ValueError, match="http://"):
        RemoteSandbox("sandbox:8080")
