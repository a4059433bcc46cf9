"""Tools that worker processes import by name; the standard library alone, so that they start quickly."""

import os
import subprocess
import sys
import time


def add(a: int, b: int = 1) -> int:
    """Add two numbers.

    Args:
        a: One number.
        b: Another.
    """
    return a + b


def worker_id() -> int:
    return os.getpid()


def hang() -> None:
    time.sleep(3600)


def hang_with_child(path: str) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
    with open(path, "w") as file:
        file.write(f"{os.getpid()} {child.pid}")
    time.sleep(3600)


def die() -> None:
    os._exit(3)


def leave() -> None:
    sys.exit(4)


class TwoPartError(Exception):
    """Cannot be unpickled: its constructor takes two arguments and keeps one."""

    def __init__(self, first: str, second: str):
        super().__init__(f"{first} {second}")


def fail(kind: str) -> None:
    if kind == "two parts":
        raise TwoPartError("two", "parts")
    raise KeyError(kind)


def entities():
    return [{"type": "person", "name": "Ada"}]


# --- what disturbs a worker process ---


def sockets() -> list[int]:
    """Descriptors of this process that are sockets: in a worker, the one that its answers go through."""
    import stat

    numbers = [int(name) for name in os.listdir("/proc/self/fd")]
    return [
        number
        for number in numbers
        if os.path.exists(f"/proc/self/fd/{number}") and stat.S_ISSOCK(os.fstat(number).st_mode)
    ]


def write_and_answer(content: bytes, x: int) -> int:
    for number in sockets():
        os.write(number, content)
    return x


def write_later_and_answer(content: bytes, x: int) -> int:
    """Writes once the answer is on its way, from a thread."""
    import threading

    def write() -> None:
        time.sleep(0.05)
        for number in sockets():
            os.write(number, content)

    threading.Thread(target=write).start()
    return x


def fork_and_answer(x: int) -> str:
    """Both processes return, the child first."""
    child = os.fork()
    if child:
        os.waitpid(child, 0)
    return f"{x} of the {'parent' if child else 'child'}"


def fork_and_raise(x: int) -> None:
    child = os.fork()
    if child:
        os.waitpid(child, 0)
    raise ValueError(f"{x} of the {'parent' if child else 'child'}")


def close_everything(x: int) -> int:
    os.closerange(3, 4096)  # a worker of a process with many open files has a high number
    return x


def put_a_file_in_its_place(path: str) -> str:
    (number,) = sockets()
    with open(path, "wb") as file:
        os.dup2(file.fileno(), number)
    return "answer"


_SLEEP = [sys.executable, "-c", "import time; time.sleep(3600)"]


def daemons(path: str, then: str) -> None:
    """Starts a process in this group and one that leaves group and session, and ends as `then` says."""
    children = [subprocess.Popen(_SLEEP), subprocess.Popen(_SLEEP, start_new_session=True)]
    with open(path, "w") as file:
        file.write(" ".join(str(child.pid) for child in children))
    if then == "die":
        os._exit(3)
    if then == "hang":
        time.sleep(3600)


class SilentError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("cannot be shown")


class SilentExit(BaseException):
    def __str__(self) -> str:
        raise SystemExit("cannot be shown")


def fail_silently(kind: str) -> None:
    raise {"error": SilentError, "exit": SilentExit, "no text": ValueError}[kind]()


# --- readers of pages ---


def read_for_ever(page: object) -> str:
    while True:
        time.sleep(1)


def read_and_die(page: object) -> str:
    os._exit(3)


def read_and_exhaust_memory(page: object) -> str:
    import resource

    resource.setrlimit(resource.RLIMIT_DATA, (2**28, resource.getrlimit(resource.RLIMIT_DATA)[1]))
    return str(len(bytearray(2**29)))
