"""A process that runs one tool, call after call, and can be killed.

The file is also the program of that process: it runs by path, needs the standard library alone, and imports nothing but
the tool's own module, so that a worker starts in tens of milliseconds. Unlike `multiprocessing` it does not run the
main script again.
"""

import importlib
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

_START_SECONDS = 120.0


def importable_name(function: Callable) -> tuple[str, str]:
    """Return the module and qualified name under which a worker finds `function`.

    Raises:
        `ValueError`: If it cannot be found by name: a lambda, a nested function, a method of an object, `__main__`.
    """
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", None)
    if not module or not name or module == "__main__" or "<" in name or hasattr(function, "__self__"):
        raise ValueError(
            f"`process=True` needs a function that a worker process can import by name, not {function!r}. Move it to "
            "the top level of a module, or leave `process` out."
        )
    return module, name


class Worker:
    """One worker process, for one function.

    Args:
        function (`Callable`): A function that can be imported by its name.
    """

    def __init__(self, function: Callable):
        self._name = importable_name(function)
        self._lock = threading.Lock()
        self._killed = False
        ours, theirs = socket.socketpair()
        with theirs:
            # A session of its own, so that a kill takes what the tool has started and Ctrl-C leaves it to us
            self._process = subprocess.Popen(
                [sys.executable, "-P", __file__, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        self._connection = Connection(ours.detach())

    def start(self) -> None:
        """Wait until the process has imported the function.

        Raises:
            `RuntimeError`: If it cannot.
        """
        try:
            self._connection.send((sys.path, *self._name))
            if not self._connection.poll(_START_SECONDS):
                raise RuntimeError(f"the worker process did not start within {_START_SECONDS:g} s")
            error = self._connection.recv()
        except (EOFError, OSError) as e:
            raise RuntimeError("the worker process ended while it started") from e
        if error is not None:
            raise RuntimeError(f"the worker process cannot import the tool: {error}")

    def call(self, arguments: dict[str, Any]) -> str | list:
        """Run the tool and return its answer; raises what the tool raises."""
        try:
            self._connection.send(arguments)
            result, error = self._connection.recv()
        except (EOFError, OSError):
            self.close()
            raise RuntimeError(f"the worker process died with exit status {self._process.returncode}") from None
        if error is not None:
            raise error
        return result

    @property
    def alive(self) -> bool:
        with self._lock:
            return not self._killed and self._process.poll() is None

    def kill(self) -> None:
        """Kill the process and what it started; a `call` that waits for it ends."""
        with self._lock:
            self._killed = True
            if self._process.returncode is None:  # not reaped, so the number is still its own
                os.killpg(self._process.pid, signal.SIGKILL)

    def close(self) -> None:
        """Kill the process and leave nothing of it behind."""
        self.kill()
        with self._lock:
            self._process.wait()
        self._connection.close()


def as_content(result: Any) -> str | list:
    """
    Return what the model reads of a tool's return value: content blocks (text, images) as they are, for the protocol to
    show, the rest as text.

    TRL takes every list for content blocks, of which a chat template then shows the model none: a list of strings, say,
    would arrive empty. A dictionary with a key `type` need not be a block either; it may be a search result.
    """
    if isinstance(result, list) and result and all(map(_is_block, result)):
        return result
    if isinstance(result, bytes):
        try:
            return result.decode()
        except UnicodeDecodeError:
            pass
    return whole_text(str(result))


def _is_block(block: Any) -> bool:
    if not isinstance(block, dict) or not isinstance(block.get("type"), str):
        return False
    if block["type"] == "text":
        return set(block) == {"type", "text"} and isinstance(block["text"], str)
    return block["type"] == "image" and "image" in block


def whole_text(text: str) -> str:
    """`text` with surrogates paired where they can be and replaced where not; tokenizers and files refuse them."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _portable(error: BaseException) -> Exception:
    """Return `error` if it arrives whole on the other side of a pipe, else its text."""
    try:
        if isinstance(error, Exception) and isinstance(pickle.loads(pickle.dumps(error)), type(error)):
            return error
    except Exception:
        pass
    return RuntimeError(f"{type(error).__name__}: {error}")


def _end_with_parent(descriptor: int) -> None:
    poller = select.poll()
    poller.register(descriptor, 0)  # no event but the hang-up, which is always told
    poller.poll()
    os.killpg(0, signal.SIGKILL)


def _serve(descriptor: int) -> None:
    connection = Connection(descriptor)
    threading.Thread(target=_end_with_parent, args=(descriptor,), daemon=True).start()
    sys.path[:], module, name = connection.recv()
    try:
        function: Any = importlib.import_module(module)
        for part in name.split("."):
            function = getattr(function, part)
    except BaseException as e:
        connection.send(f"{type(e).__name__}: {e}")
        return
    connection.send(None)
    while True:
        arguments = connection.recv()
        answer: tuple[str | list | None, Exception | None]
        try:
            answer = (as_content(function(**arguments)), None)
        except BaseException as e:
            answer = (None, _portable(e))
        try:
            connection.send(answer)
        except (pickle.PicklingError, TypeError, AttributeError) as e:  # content blocks that cannot be sent
            connection.send((None, _portable(e)))


if __name__ == "__main__":
    try:
        _serve(int(sys.argv[1]))
    except (EOFError, OSError):
        pass
