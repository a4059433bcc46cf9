"""The process that runs model-written code for [`~arpo_trl.tools.python.PythonSandbox`]; standard library only.

It is started once, as a script inside the sandbox, imports what calls are likely to import, and then forks for every
call, so a call neither pays for an interpreter nor meets what an earlier call left behind:

    server       waits on the socket that is its standard input; never reads code or output
    └ supervisor one per call: makes the namespaces, enforces time-out and memory, reports how the call ended
      └ child    process 1 of its own namespaces: gives up every privilege, then runs the code

The three file descriptors of a call (code, output, report) come with its request and pass straight to those who use
them. The child holds only the output by the time foreign code runs, so nothing that it does can forge a report, speak
to the server, or reach another call.
"""

import contextlib
import ctypes
import gc
import importlib
import json
import os
import resource
import select
import shutil
import signal
import site
import socket
import struct
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

# Exit codes of a child whose code ran to its end or raised; any other means that the code ended the process itself.
FINISHED, RAISED = 100, 101

MAX_PROCESSES = 32  # threads count as well
MAX_FILES = 256  # open files of a process
MAX_FILES_TOGETHER = 1024  # of all processes of a call
MAX_FILE_BYTES = 64 << 20  # one file, and /tmp as a whole
UNPRIVILEGED_ID = 65534
WATCH_SECONDS = 0.05  # between two looks at a call
WATCH_MANY_SECONDS = 0.01  # if it has several processes, which can take memory faster than one


def run_cell(source: str) -> bool:
    """Run `source` as a notebook runs a cell: show the last expression's value, or the traceback of what was raised.

    Imports what it needs itself, because its source text alone is sent to remote sandboxes.

    Args:
        source (`str`): Python code.

    Returns:
        `bool`: Whether the code ran to its end.
    """
    import ast
    import linecache
    import sys
    import traceback
    import types

    name = "<python>"

    def forget_library_frames(error: traceback.TracebackException) -> traceback.TracebackException:
        # They show nothing that the model wrote, and where things are on this machine
        error.stack[:] = [f for f in error.stack if f.filename.startswith("<") and "<frozen" not in f.filename]
        for inner in [error.__cause__, error.__context__, *(getattr(error, "exceptions", None) or [])]:
            if inner is not None:
                forget_library_frames(inner)
        return error

    main = sys.modules["__main__"] = types.ModuleType("__main__")
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    stdout = sys.stdout
    try:
        tree = ast.parse(source, name)
        last = tree.body[-1] if tree.body else None
        if isinstance(last, ast.Expr):
            del tree.body[-1]
        exec(compile(tree, name, "exec"), main.__dict__)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), name, "eval"), main.__dict__)
            if value is not None:
                print(repr(value))
        sys.stdout.flush()
        return True
    except SystemExit as stop:
        text = "" if stop.code in (None, 0) else f"SystemExit: {stop.code}\n"
    except BaseException as error:
        try:
            below = error.__traceback__ and error.__traceback__.tb_next
            shown = traceback.TracebackException(type(error), error, below)
            text = "".join(forget_library_frames(shown).format())
        except BaseException:  # an exception class of the model's own can fail at being printed, too
            text = f"{type(error).__name__}\n"
    sys.stdout.flush()
    stdout.write(text)
    stdout.flush()
    return not text


# ---------------------------------------------------------------------------------------------------------------------
# Linux calls that Python 3.11 has no name for


def _libc(function: str, *args: object) -> None:
    if getattr(ctypes.CDLL(None, use_errno=True), function)(*args) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{function}: {os.strerror(error)}")


def _prctl(option: int, value: int, argument: object = 0) -> None:
    _libc("prctl", option, value, argument, 0, 0)


_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 1, 4, 22, 36, 38
_CLONE_NEWNS, _CLONE_NEWIPC, _CLONE_NEWUSER, _CLONE_NEWPID, _CLONE_NEWNET = (
    0x00020000, 0x08000000, 0x10000000, 0x20000000, 0x40000000,
)  # fmt: skip
_MS_RDONLY, _MS_NOSUID, _MS_NODEV = 1, 2, 4


def _filter_system_calls(program: bytes) -> None:
    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_char_p)]

    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    _prctl(_PR_SET_SECCOMP, 2, ctypes.byref(Program(len(program) // 8, program)))


def _drop_capabilities() -> None:
    _libc("capset", ctypes.c_char_p(struct.pack("=Ii", 0x20080522, 0)), ctypes.c_char_p(bytes(24)))


def _enter_namespaces() -> None:
    """A user namespace for this process and a process namespace for the child that it forks next."""
    uid, gid = os.getuid(), os.getgid()
    _libc("unshare", _CLONE_NEWUSER | _CLONE_NEWPID)
    for file, text in [
        ("setgroups", "deny"),
        ("uid_map", f"{UNPRIVILEGED_ID} {uid} 1"),
        ("gid_map", f"{UNPRIVILEGED_ID} {gid} 1"),
    ]:
        with open(f"/proc/self/{file}", "w") as f:
            f.write(text)


def _mount_tmpfs(path: bytes, flags: int, options: str) -> None:
    _libc("mount", b"tmpfs", path, b"tmpfs", flags, options.encode())


# ---------------------------------------------------------------------------------------------------------------------
# The child


def _limit_resources(config: dict) -> None:
    with open("/proc/self/statm") as f:
        own_memory = int(f.read().split()[0]) * resource.getpagesize()
    for limit, value in [
        (resource.RLIMIT_AS, own_memory + config["memory"]),
        (resource.RLIMIT_CPU, int(config["timeout"]) + 1),
        (resource.RLIMIT_FSIZE, MAX_FILE_BYTES),
        (resource.RLIMIT_NOFILE, MAX_FILES),
        (resource.RLIMIT_CORE, 1),  # 0 does not stop core dumps that go to a program of the host; 1 does
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_RTPRIO, 0),
        (resource.RLIMIT_NICE, 0),
        # Counted for each user namespace; without one of its own they would count all that the user runs.
        *([(resource.RLIMIT_NPROC, MAX_PROCESSES)] if config["namespaces"] else []),
        *([(resource.RLIMIT_SIGPENDING, 256)] if config["namespaces"] else []),
    ]:
        hard = resource.getrlimit(limit)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (value, value))


def _child(config: dict, code_fd: int, output_fd: int, report_fd: int, home: str) -> None:
    try:
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        os.setsid()
        with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as f:
            f.write("1000")  # where memory does run out, the kernel takes this process and not the training run
        _limit_resources(config)
        if config["namespaces"]:
            _libc("unshare", _CLONE_NEWNS | _CLONE_NEWIPC | _CLONE_NEWNET)
            _mount_tmpfs(b"/tmp", _MS_NOSUID | _MS_NODEV, f"size={MAX_FILE_BYTES},nr_inodes=4096,mode=0777")
            _mount_tmpfs(b"/proc", _MS_NOSUID | _MS_NODEV | _MS_RDONLY, "size=4096,nr_inodes=1,mode=0555")
            _drop_capabilities()
        _prctl(_PR_SET_DUMPABLE, 0)
        if config["namespaces"]:
            _filter_system_calls(bytes.fromhex(config["filter"]))
        os.chdir(home)
        with open(code_fd, encoding="utf-8", errors="surrogatepass") as f:
            source = f.read()
        os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
        os.dup2(output_fd, 1)
        os.dup2(output_fd, 2)
        sys.stdin = open(0, closefd=False)
        sys.stdout = open(1, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)
        sys.stderr = open(2, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)
        sys.argv = [""]
        os.environ.clear()
        os.environ.update(HOME=home, LANG="C.UTF-8", OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")
        if "numpy.random" in sys.modules:
            sys.modules["numpy.random"].seed()  # `random` reseeds itself after a fork
    except BaseException as error:
        os.write(report_fd, f"unusable: {error}\n".encode())
        os._exit(1)
    os.closerange(3, 4096)
    try:
        finished = run_cell(source)
    except BaseException:  # its output was closed
        finished = False
    os._exit(FINISHED if finished else RAISED)


# ---------------------------------------------------------------------------------------------------------------------
# The supervisor

_KIB_PER_FILE = 32  # a full pipe holds 64 KiB and has two ends


def _descendants(pid: int) -> list[int]:
    """`pid` and all that descend from it. Orphans belong to their namespace's first process, so none is missed."""
    found = [pid]
    for parent in found:
        try:
            for thread in os.listdir(f"/proc/{parent}/task"):
                with open(f"/proc/{parent}/task/{thread}/children") as f:
                    found += map(int, f.read().split())
        except OSError:
            pass  # it has ended
    return found


class _Use(NamedTuple):
    """What a process takes, as far as `/proc` shows it to anyone; sizes in bytes."""

    resident: int = 0  # pages that it does not share with files
    writable: int = 0  # pages that it has mapped and may touch at any moment, between two looks
    other: int = 0  # what the kernel keeps for it
    files: int = 0  # how many are open; 0 before Linux 6.2
    parent: int = 0

    def memory(self, base: "_Use") -> int:
        """Bytes that the process, a fork of the one that `base` describes, has or could have in the next moment."""
        return max(self.resident, base.resident + self.writable - base.writable) + self.other


def _use_of(pid: int) -> _Use:
    status = {}
    try:
        with open(f"/proc/{pid}/status") as f:
            for line in f:
                name, _, text = line.partition(":")
                status[name] = text.split()
        files = os.stat(f"/proc/{pid}/fd").st_size
    except OSError:
        return _Use()  # it has ended
    size, data, stack, tables, swapped, private, shared, file_table, parent = [
        int(status.get(name, "0")[0])
        for name in ("VmSize", "VmData", "VmStk", "VmPTE", "VmSwap", "RssAnon", "RssShmem", "FDSize", "PPid")
    ]
    # The kernel keeps up to 512 bytes for a mapping, which may be a single page that cannot be written to.
    kib = tables + (size - data - stack) // 8 + (files or file_table) * _KIB_PER_FILE
    return _Use((private + shared + swapped) << 10, (data + stack) << 10, kib << 10, files, parent)


def _counted_twice(uses: dict[int, _Use], base: _Use) -> int:
    """Bytes of processes that are about to become a program: till then they run in the memory of their parent, one of
    whose threads waits for that (`vfork`) and looks as if it waited for a disk."""
    found = 0
    for pid, use in uses.items():
        twins = [other for other in uses.values() if other.parent == pid and other.writable == use.writable]
        with contextlib.suppress(OSError):
            threads = [f"/proc/{pid}/task/{thread}/stat" for thread in os.listdir(f"/proc/{pid}/task") if twins]
            waiting = sum(Path(thread).read_text().rpartition(") ")[2][:1] == "D" for thread in threads)
            found += sum(twin.memory(base) for twin in twins[:waiting])
    return found


def _sockets(pid: int) -> int:
    """The number of sockets in the network namespace of the process, with those that only wait in another's buffer."""
    try:
        with open(f"/proc/{pid}/net/sockstat") as f:
            return int(f.readline().split()[-1])
    except OSError:
        return 0  # it has ended


def _wait(pid: int, report_fd: int, config: dict) -> str:
    """Wait for the child's end, or bring it about, and say how it ended."""
    base = _use_of(os.getpid())  # every process of the call starts as a copy of this one; the first is not charged it
    deadline = time.monotonic() + config["timeout"]
    ended = os.pidfd_open(pid)
    poll = select.poll()
    poll.register(ended, select.POLLIN)
    poll.register(report_fd, 0)  # wakes when nobody waits for the report any more
    reason, watch = "", WATCH_SECONDS
    while not reason:
        left = deadline - time.monotonic()
        events = [fd for fd, _ in poll.poll(1000 * max(0, min(left, watch)))]
        if ended in events:
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            return f"signal {-code}" if code < 0 else f"exit {code}"
        processes = _descendants(pid)
        uses = {process: _use_of(process) for process in processes}
        memory = sum(use.memory(base) for use in uses.values()) - base.memory(base)
        if config["namespaces"]:
            memory += _sockets(pid) * config["socket_bytes"]
        watch = WATCH_SECONDS if len(processes) == 1 else WATCH_MANY_SECONDS
        if events:
            reason = "abandoned"
        elif left <= 0:
            reason = "timeout"
        elif len(processes) > MAX_PROCESSES:
            reason = "processes"
        elif sum(use.files for use in uses.values()) > MAX_FILES_TOGETHER:
            reason = "files"
        elif memory > config["memory"] and memory - _counted_twice(uses, base) > config["memory"]:
            reason = "memory"
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return reason


def _supervise(config: dict, code_fd: int, output_fd: int, report_fd: int) -> None:
    report = "unusable: unknown"
    home = "/tmp"
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.dup2(os.open("/dev/null", os.O_RDONLY), 0)  # lets go of the server's socket
    try:
        if config["namespaces"]:
            _enter_namespaces()
        else:
            _prctl(_PR_SET_CHILD_SUBREAPER, 1)  # daemons that the code leaves behind become children of this process
            home = tempfile.mkdtemp(prefix="arpo-python-")
        if (pid := os.fork()) == 0:
            _child(config, code_fd, output_fd, report_fd, home)
        os.close(output_fd)
        report = _wait(pid, report_fd, config)
        if not config["namespaces"]:
            while leftovers := _descendants(os.getpid())[1:]:
                for pid in leftovers:
                    with contextlib.suppress(ProcessLookupError, ChildProcessError):
                        os.kill(pid, signal.SIGKILL)
                        os.waitpid(pid, 0)  # descendants further down become children when their parents end
            shutil.rmtree(home, ignore_errors=True)
    except BaseException as error:
        report = f"unusable: {error}"
    finally:
        with contextlib.suppress(OSError):
            os.write(report_fd, f"{report}\n".encode())
        os._exit(0)


# ---------------------------------------------------------------------------------------------------------------------
# The server


# What `run_cell` needs, and what short calculations tend to import
_STANDARD = (
    "ast linecache traceback types collections datetime decimal fractions itertools math random re statistics".split()
)
# Modules that do much of their importing at first use
_WARM_UP = {
    "numpy": "import numpy.random",
    "sympy": "from sympy import *; x = Symbol('x'); solve(x**2 - 2), integrate(x * sin(x), x), simplify(x / x), "
    "latex(x)",
}


def serve(config: dict) -> None:
    """Answer requests until the other end of standard input is closed, which also happens when its owner dies.

    Args:
        config (`dict`): `timeout` in seconds, `memory` in bytes, `namespaces` (whether calls get their own, which
            asks for the sandbox that `bwrap` makes), the `filter` of system calls in hexadecimal digits for those that
            do, `paths` to import from, names of the modules to `preload`.
    """
    if os.geteuid() == 0 and config["namespaces"]:
        # The kernel does not hold root to a number of processes.
        os.setgroups([])
        os.setresgid(*[UNPRIVILEGED_ID] * 3)
        os.setresuid(*[UNPRIVILEGED_ID] * 3)
        _prctl(_PR_SET_DUMPABLE, 1)  # gives it back its own /proc/self
    sys.path += config["paths"]
    for name in [*_STANDARD, *config["preload"]]:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
            exec(_WARM_UP.get(name, ""), {})
    site.setquit()  # `exit()`, which an interpreter without site packages lacks
    gc.freeze()  # keeps the collector of a child from copying the pages that it shares with this process
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # supervisors need no burial
    requests = socket.socket(fileno=0)
    # A socket may hold its whole buffer and one message more, which is no larger.
    config["socket_bytes"] = 2 * requests.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
    requests.sendall(b"+")
    while True:
        message, fds, _, _ = socket.recv_fds(requests, 1, 3)
        if not message:
            os._exit(0)
        try:
            if os.fork() == 0:
                _supervise(config, *fds)
        except OSError as error:
            os.write(fds[2], f"unusable: {error}\n".encode())
        for fd in fds:
            os.close(fd)


if __name__ == "__main__":
    serve(json.loads(sys.argv[1]))
