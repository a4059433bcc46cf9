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
