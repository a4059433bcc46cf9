"""The Python tool: runs code that a model wrote, which is to be treated as hostile.

[`PythonSandbox`] runs it on this machine; [`~arpo_trl.tools.python.remote.RemoteSandbox`] has another machine run it.

```python
from arpo_trl.tools.python import PythonSandbox

trainer = ARPOTrainer(..., tools=[PythonSandbox(timeout=10).python])
```

With `sandbox="bwrap"` a call cannot
- reach the network, not even this machine's loopback, nor concurrent calls;
- see files other than the interpreter, its libraries and the installed packages, all read-only, nor leave files
  behind;
- see other processes or their environment, or outlive its end: its process namespace dies with it;
- exceed its limits on time, memory, processes, open files, size of files and of output;
- take what the machine or the user has only one store of, such as asynchronous I/O, huge pages or locks on files.

What it does NOT do, in either mode:
- stop an attack on the kernel itself. Calls share it with the host; they reach it by listed system calls only, no
  more;
- limit memory between two looks at a call with several processes, 10 ms apart; only a cgroup around all would;
- hide the installed packages, their versions, or the machine's kernel and hardware;
- share the processor fairly: a call may use every core until its time-out.

`sandbox="rlimits"` limits time, memory of one process and size of files and output, and ends what a call leaves
running (unless it works to escape). It stops accidents only: the code runs as you, reads and deletes your files, uses
your network and can start more processes than the machine holds.
"""

import atexit
import contextlib
import json
import math
import os
import select
import shutil
import signal
import site
import socket
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from ...execution.errors import TransientToolError
from ...execution.options import tool
from ...source_code import source_code
from . import system_calls
from . import worker as python_worker

NO_OUTPUT = "(no output)"  # an answer like any other: the code ran, so it is not run again

_FLOOD_BYTES = 1 << 20  # output beyond what is shown that code may write before it is stopped
_START_SECONDS = 60  # importing the preloaded modules from a cold, shared disk
_GRACE_SECONDS = 10  # beyond the time-out that the sandbox keeps itself
_WAYS_ON = (
    "Install bubblewrap (`apt install bubblewrap`) on a machine that allows user namespaces, or choose "
    "PythonSandbox(sandbox='rlimits'), which stops accidents but not hostile code: it can read and delete your files, "
    "use your network and exhaust the machine's processes."
)


class PythonError(RuntimeError):
    """Code that did not run to its end; the text is for the model: output so far, then the traceback or what
    happened."""


class PythonSandbox:
    """Runs Python code, every call in a process and a sandbox of its own; [`~PythonSandbox.python`] is the tool.

    May be called from any number of threads, and after a fork. Ends with the process if it is not closed before.

    Args:
        sandbox (`str`): `"bwrap"` to contain hostile code, which needs Linux and
            [bubblewrap](https://github.com/containers/bubblewrap), or `"rlimits"` to contain accidents only.
        timeout (`float`): Seconds that a call may run.
        memory_mb (`int`): Memory in MiB that all processes of a call together may use beyond the preloaded modules.
            Counted as it is mapped, so memory that forked processes share counts for each; `docs/security.md` says
            what is counted and how closely.
        max_output_chars (`int`): Characters of output that are shown; what is cut from the middle is replaced by a
            marker.
        workers (`int`, *optional*): Calls that run at the same time; others wait, and waiting does not count towards
            `timeout`. Defaults to the number of processors, at least 4.
        preload (`Sequence[str]`): Modules that are imported before calls arrive. Those that are not installed are
            skipped.

    Example:

    ```python
    >>> with PythonSandbox(timeout=5) as sandbox:
    ...     print(sandbox.python("from sympy import *; x = symbols('x'); solve(x**2 - 2)"))
    [-sqrt(2), sqrt(2)]
    ```
    """

    def __init__(
        self,
        sandbox: Literal["bwrap", "rlimits"] = "bwrap",
        timeout: float = 10.0,
        memory_mb: int = 1024,
        max_output_chars: int = 10_000,
        workers: int | None = None,
        preload: Sequence[str] = ("numpy", "sympy"),
    ):
        workers = max(4, os.cpu_count() or 1) if workers is None else workers
        if sandbox not in ("bwrap", "rlimits"):
            raise ValueError(f"sandbox must be 'bwrap' or 'rlimits', not {sandbox!r}.")
        for name, value in [
            ("timeout", timeout),
            ("memory_mb", memory_mb),
            ("max_output_chars", max_output_chars),
            ("workers", workers),
        ]:
            if not 0 < value < math.inf:
                raise ValueError(f"{name} must be a positive number, not {value!r}.")
        self.sandbox = sandbox
        self.timeout = timeout
        self.memory_mb = memory_mb
        self.max_output_chars = max_output_chars
        self.workers = workers
        self._preload = tuple(preload)
        self._slots = threading.BoundedSemaphore(workers)
        config = {
            "timeout": timeout,
            "memory": int(memory_mb * 2**20),
            "namespaces": sandbox == "bwrap",
            "paths": [path for path in site.getsitepackages() if os.path.isdir(path)],
        }
        # Forking a process takes longer the more it has imported, so code that uses none of the modules is spared
        # them.
        self._bare = _Server({**config, "preload": []})
        self._loaded = _Server({**config, "preload": self._preload})
        _open.add(self)
        try:
            for server in (self._bare, self._loaded):
                self._run("", server)  # what does not work here is to be known now and not in the first rollout
        except TransientToolError as error:
            self.close()
            if sandbox == "bwrap":
                raise RuntimeError(f"PythonSandbox cannot use bwrap here: {error} {_WAYS_ON}") from None
            raise

    @tool(deterministic=True)
    def python(self, code: str) -> str:
        """
        Runs Python code and returns what it prints and the value of its last expression.

        Args:
            code: The Python code. Every call starts afresh: nothing is kept from earlier calls.

        Returns:
            The output of the code.
        """
        code = code_to_run(code)
        uses_preloaded = any(name in code for name in self._preload)
        output, report = self._run(code, self._loaded if uses_preloaded else self._bare)
        text = cut_output(output.decode("utf-8", "backslashreplace"), self.max_output_chars)
        kind, _, detail = report.partition(" ")
        if report == f"exit {python_worker.FINISHED}":
            return text or NO_OUTPUT
        if report == f"exit {python_worker.RAISED}" and text:
            raise PythonError(text)
        raise PythonError("\n".join(filter(None, [text, self._explain(kind, detail)])))

    def close(self) -> None:
        """End the sandbox and what runs in it. May be called more than once."""
        _open.discard(self)
        self._bare.close()
        self._loaded.close()

    def __enter__(self) -> "PythonSandbox":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _after_fork(self) -> None:
        self._slots = threading.BoundedSemaphore(self.workers)  # other threads may have held some at the fork
        self._bare.forget()
        self._loaded.forget()

    def _explain(self, kind: str, detail: str) -> str:
        if kind == "exit" and int(detail) == python_worker.RAISED:
            return "The code failed and had closed the output that would have shown why."
        if kind == "exit":
            return f"The code ended the interpreter with exit code {detail} before it had run to its end."
        if kind == "signal":
            return f"The code crashed the interpreter ({signal.strsignal(int(detail))})."
        return {
            "timeout": f"The code ran longer than {self.timeout:g} s and was stopped.",
            "memory": f"The code used more than {self.memory_mb} MB of memory and was stopped.",
            "files": f"The code opened more than {python_worker.MAX_FILES_TOGETHER} files at once and was stopped.",
            "processes": f"The code started more than {python_worker.MAX_PROCESSES} processes and was stopped.",
            "flood": "The code wrote too much output and was stopped.",
        }[kind]

    def _run(self, code: str, server: "_Server") -> tuple[bytes, str]:
        """Run `code`; its output, and how it ended in the words of the worker's supervisor."""
        with self._slots:
            output, output_end = os.pipe()
            report, report_end = os.pipe()
            try:
                try:
                    with tempfile.TemporaryFile() as file:
                        file.write(code.encode("utf-8", "surrogatepass"))
                        file.seek(0)
                        server.send([file.fileno(), output_end, report_end])
                finally:
                    os.close(output_end)
                    os.close(report_end)
                return self._collect(output, report, server)
            finally:
                # Closing them also stops a call that is still running.
                os.close(output)
                os.close(report)

    def _collect(self, output: int, report: int, server: "_Server") -> tuple[bytes, str]:
        text, flood = bytearray(), 4 * self.max_output_chars + _FLOOD_BYTES
        os.set_blocking(output, False)
        poll = select.poll()
        poll.register(output, select.POLLIN)
        poll.register(report, select.POLLIN)
        deadline = time.monotonic() + self.timeout + _GRACE_SECONDS
        while ready := [fd for fd, _ in poll.poll(1000 * max(0, deadline - time.monotonic()))]:
            # The order matters: what was written before the end is in the pipe by the time that the report is.
            if _read_available(output, text, flood) and output in ready:
                poll.unregister(output)
            if len(text) > flood:
                return bytes(text), "flood"
            if report in ready:
                answer = os.read(report, 1000).decode().strip()
                if answer and not answer.startswith("unusable"):
                    return bytes(text), answer
                raise TransientToolError(f"The Python sandbox failed ({answer or 'it ended unexpectedly'}).")
        server.stop()
        raise TransientToolError("The Python sandbox stopped answering and will be restarted.")


_open: "weakref.WeakSet[PythonSandbox]" = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for sandbox in list(_open):
        sandbox.close()


def _forget_all() -> None:
    for sandbox in list(_open):
        sandbox._after_fork()


os.register_at_fork(after_in_child=_forget_all)


class _Server:
    """A worker process that forks for every call; started at the first call and again whenever it has died."""

    def __init__(self, config: dict):
        self._config = config
        self._process: subprocess.Popen | None = None
        self._socket: socket.socket | None = None
        self._closed = False
        self._lock = threading.Lock()

    def send(self, fds: list[int]) -> None:
        """Hand a call to the process."""
        with self._lock:
            if self._closed:
                raise RuntimeError("This PythonSandbox is closed.")
            if self._socket is not None:
                try:
                    socket.send_fds(self._socket, [b"."], fds)
                    return
                except OSError:
                    self._end()
            socket.send_fds(self._start(), [b"."], fds)

    def stop(self) -> None:
        with self._lock:
            self._end()

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._end()

    def forget(self) -> None:
        """In a forked process: leave the worker to the parent, whose child it is, and start another when asked."""
        self._lock = threading.Lock()  # another thread may have held it at the fork
        self._process = None
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _start(self) -> socket.socket:
        ours, theirs = socket.socketpair()
        with theirs, tempfile.TemporaryFile() as errors:
            self._socket = ours
            self._process = subprocess.Popen(
                _bwrap_command(self._config) if self._config["namespaces"] else _plain_command(self._config),
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=errors,
                env={},
                start_new_session=True,
            )
            theirs.close()
            ours.settimeout(_START_SECONDS)
            with contextlib.suppress(OSError):
                if ours.recv(1):
                    ours.settimeout(None)
                    return ours
            self._end()
            errors.seek(0)
            lines = errors.read().decode(errors="replace").strip().splitlines()
            raise TransientToolError(
                f"The Python sandbox did not start ({lines[-1] if lines else 'no reason given'})."
            )

    def _end(self) -> None:
        process, self._process = self._process, None
        connection, self._socket = self._socket, None
        if connection is not None:
            connection.close()
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with bwrap the worker too, and so all of its namespace
            process.wait()


def _read_available(fd: int, into: bytearray, limit: int) -> bool:
    """Read what there is, up to somewhat more than `limit` bytes; whether the end was reached."""
    try:
        while len(into) <= limit:
            if not (chunk := os.read(fd, 1 << 16)):
                return True
            into += chunk
    except BlockingIOError:
        pass
    return False


def code_to_run(code: str) -> str:
    """The code as a model meant it: a Markdown fence around it and indentation of the whole are no part of it."""
    if not isinstance(code, str):
        raise PythonError(f"code must be a string of Python code, not {type(code).__name__}.")
    return source_code(code)


def cut_output(text: str, limit: int) -> str:
    """Leave out what does not fit from the middle of `text`: the end holds the result or the error."""
    text = text.rstrip()
    if len(text) <= limit:
        return text
    tail = limit // 2
    return f"{text[: limit - tail]}\n[... {len(text) - limit} characters left out ...]\n{text[-tail:]}"


def _plain_command(config: dict) -> list[str]:
    return [sys.executable, "-I", "-S", python_worker.__file__, json.dumps(config)]


def _bwrap_command(config: dict) -> list[str]:
    """The command that starts the server in a file system that holds an interpreter and nothing else.

    Everything appears under /python, so that no text a call returns depends on where this machine keeps things.
    """
    bwrap = shutil.which("bwrap")
    if bwrap is None:
        raise TransientToolError("The command bwrap is not installed.")
    machine = os.uname().machine
    if machine not in system_calls.MACHINES:
        raise TransientToolError(f"System calls cannot be filtered on {machine}.")
    base = Path(sys.base_prefix)
    executable = Path(getattr(sys, "_base_executable", sys.executable)).resolve()
    # bwrap would give a folder that it makes for a private file to root alone
    mounts: list[tuple] = [("--dir", folder) for folder in ["/dev", "/python", "/python/bin", "/tmp", "/usr"]]
    mounts += [("--ro-bind", executable, f"/python/bin/{executable.name}")]
    for folder in dict.fromkeys(["lib", sys.platlibdir]):
        mounts.append(("--ro-bind", (base / folder).resolve(), f"/python/{folder}"))
    for folder in ["/usr/lib", "/usr/lib64", "/lib", "/lib64"]:  # libc and what compiled packages link to
        if os.path.islink(folder):
            mounts.append(("--symlink", os.readlink(folder), folder))
        elif os.path.isdir(folder):
            mounts.append(("--ro-bind", folder, folder))
    paths = ["/python/site-packages", *[f"/python/site-packages-{i}" for i in range(1, len(config["paths"]))]]
    mounts += [("--ro-bind", *pair) for pair in zip(config["paths"], paths, strict=True)]
    # /dev/full reads as zeros too, and unlike /dev/zero it cannot be mapped as memory that processes share.
    for device, host in [
        ("null", "null"),
        ("zero", "full"),
        ("full", "full"),
        ("random", "random"),
        ("urandom", "urandom"),
    ]:
        mounts.append(("--dev-bind", f"/dev/{host}", f"/dev/{device}"))
    mounts.append(("--ro-bind", python_worker.__file__, "/python/worker.py"))
    config = {**config, "paths": paths, "filter": system_calls.filter_program(machine).hex()}
    # The worker is the first process of its namespace, so whatever else is in there ends when it does.
    namespaces = ["--unshare-pid", "--as-pid-1", "--unshare-net", "--unshare-ipc", "--unshare-uts"]
    if os.geteuid() != 0:  # root needs no user namespace; one would leave it root, whose processes are not counted
        namespaces += ["--unshare-user", "--cap-drop", "ALL"]
    return [
        *[bwrap, *namespaces, "--unshare-cgroup-try", "--hostname", "sandbox", "--clearenv"],
        *["--setenv", "LD_LIBRARY_PATH", f"/python/{sys.platlibdir}", "--setenv", "OPENBLAS_NUM_THREADS", "1"],
        *["--setenv", "MALLOC_ARENA_MAX", "1"],  # threads would else reserve 64 MiB of address space each
        *[str(part) for mount in mounts for part in mount],
        *["--symlink", "/tmp", "/dev/shm", "--proc", "/proc", "--remount-ro", "/", "--chdir", "/"],
        *[f"/python/bin/{executable.name}", "-I", "-S", "/python/worker.py", json.dumps(config)],
    ]
