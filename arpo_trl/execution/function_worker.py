"""A process that runs one tool, call after call, and can be killed.

The file is also the program of that process: it runs by path, needs the standard library alone, and imports nothing
but the tool's own module, so that a worker starts in tens of milliseconds. Unlike `multiprocessing` it does not run
the main script again.

Requests and answers pass through a socket that the tool could write to as well, by mistake or from a forked child. So
each message carries a secret of its worker, its number, its length and a digest of its content. A worker that sends
anything else is ended and replaced, since no later answer of it could be trusted.

What a tool has started ends with its worker: the processes of its group, and on Linux also those that left the group
but kept the environment. What it does not do: find a process that left the group and cleared its environment.
"""

import contextlib
import hashlib
import importlib
import os
import pickle
import secrets
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

_START_SECONDS = 120.0
# Environment variable that holds the worker's secret, inherited by what the tool starts
_MARK = "ARPO_TRL_TOOL_WORKER"
# Secret, number of the message, length and digest of its content
_HEADER = struct.Struct("!16sQQ16s")


class ForeignMessage(Exception):
    """What was received is not the message that the protocol expects."""


def _send(connection: socket.socket, secret: bytes, number: int, content: bytes) -> None:
    digest = hashlib.blake2b(content, digest_size=16).digest()
    connection.sendall(_HEADER.pack(secret, number, len(content), digest) + content)


def _receive(connection: socket.socket, secret: bytes, number: int) -> bytes:
    """Return the content of message `number`.

    Raises:
        `EOFError`: If the other side has ended.
        `ForeignMessage`: If something else was sent.
    """
    received_secret, received_number, length, digest = _HEADER.unpack(_receive_exactly(connection, _HEADER.size))
    if (received_secret, received_number) != (secret, number):
        raise ForeignMessage
    content = _receive_exactly(connection, length)
    if hashlib.blake2b(content, digest_size=16).digest() != digest:
        raise ForeignMessage
    return content


def _receive_exactly(connection: socket.socket, size: int) -> bytes:
    content = bytearray()
    while len(content) < size:
        piece = connection.recv(min(size - len(content), 1 << 20))
        if not piece:
            raise EOFError
        content += piece
    return bytes(content)


def _kill_marked(secret: bytes) -> None:
    """Kill all processes but this one whose environment holds `secret`. Does nothing where there is no `/proc`."""
    mark = f"{_MARK}={secret.hex()}".encode()
    killed: set[int] = {os.getpid()}
    found = hasattr(os, "pidfd_open") and os.path.isdir("/proc")
    while found:  # again, since a process may have started another before it was killed
        found = False
        for pid in {int(name) for name in os.listdir("/proc") if name.isdigit()} - killed:
            # A process that has ended, or belongs to somebody else
            with contextlib.suppress(OSError):
                if not _is_marked(pid, mark):
                    continue
                descriptor = os.pidfd_open(pid)
                try:
                    if _is_marked(pid, mark):  # the number may have gone to another process in between
                        signal.pidfd_send_signal(descriptor, signal.SIGKILL)
                finally:
                    os.close(descriptor)
                killed.add(pid)
                found = True


def _is_marked(pid: int, mark: bytes) -> bool:
    while True:
        with open(f"/proc/{pid}/environ", "rb") as file:
            environment = file.read()
        if environment:
            return mark in environment.split(b"\0")
        # A process that is being replaced by another program has memory and, for a moment, no environment
        with open(f"/proc/{pid}/stat", "rb") as file:
            state, *fields = file.read().rpartition(b")")[2].split()
        if state in b"ZX" or int(fields[19]) == 0 or int(fields[47]) != 0:  # vsize, env_end
            return False
        time.sleep(0.001)


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
        self._secret = secrets.token_bytes(16)
        self._number = 0
        self._connection, theirs = socket.socketpair()
        with theirs:
            # A session of its own, so that a kill takes what the tool has started and Ctrl-C leaves it to us
            self._process = subprocess.Popen(
                [sys.executable, "-P", __file__, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                env={**os.environ, _MARK: self._secret.hex()},
            )

    def start(self) -> None:
        """Wait until the process has imported the function.

        Raises:
            `RuntimeError`: If it cannot.
        """
        try:
            self._connection.settimeout(_START_SECONDS)
            _send(self._connection, self._secret, 0, pickle.dumps((sys.path, *self._name)))
            error = pickle.loads(_receive(self._connection, self._secret, 0))
            self._connection.settimeout(None)
        except TimeoutError as e:
            raise RuntimeError(f"the worker process did not start within {_START_SECONDS:g} s") from e
        except ForeignMessage as e:
            raise RuntimeError("the tool's module wrote to the socket of its worker process") from e
        except (EOFError, OSError) as e:
            raise RuntimeError("the worker process ended while it started") from e
        if error is not None:
            raise RuntimeError(f"the worker process cannot import the tool: {error}")

    def call(self, arguments: dict[str, Any]) -> str | list:
        """Run the tool and return its answer; raises what the tool raises."""
        content = pickle.dumps(arguments)
        self._number += 1
        try:
            _send(self._connection, self._secret, self._number, content)
            answer = _receive(self._connection, self._secret, self._number)
        except ForeignMessage:
            self.close()
            raise RuntimeError(
                "the tool wrote to the socket of its worker process; its answer is lost, and the process was ended"
            ) from None
        except (EOFError, OSError):
            self.close()
            raise RuntimeError(f"the worker process died with exit status {self._process.returncode}") from None
        result, error = pickle.loads(answer)
        if error is not None:
            raise error
        return result

    @property
    def alive(self) -> bool:
        """Whether the process can take a call: it runs, and has sent nothing that nobody asked for."""
        with self._lock:
            if self._killed:
                return False
            poller = select.poll()
            poller.register(self._connection, select.POLLIN)
            return not poller.poll(0)

    def kill(self) -> None:
        """Kill the process and its group; a `call` that waits for it ends."""
        with self._lock:
            self._killed = True
            if self._process.returncode is None:  # not reaped, so the number is still its own
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(self._process.pid, signal.SIGKILL)
            # A process that the tool has started may hold the other end open
            with contextlib.suppress(OSError):
                self._connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Kill the process and what it started, and leave nothing of it behind."""
        self.kill()
        _kill_marked(self._secret)
        with self._lock:
            self._process.wait()
            self._connection.close()


def as_content(result: Any) -> str | list:
    """
    Return what the model reads of a tool's return value: content blocks (text, images) as they are, for the protocol
    to show, the rest as text.

    TRL takes every list for content blocks, of which a chat template then shows the model none: a list of strings,
    say, would arrive empty. A dictionary with a key `type` need not be a block either; it may be a search result.
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


def error_text(error: BaseException) -> tuple[str, str]:
    """Return the class name and the message of an exception, whatever its own methods do.

    The message is empty where there is none. An exception that is not an `Exception`, such as `SystemExit`, is told as
    a `RuntimeError`: it ends a call and nothing else.
    """
    name = type.__dict__["__name__"].__get__(type(error))
    try:
        text = whole_text(str.__str__(str(error)))
    except BaseException:
        text = "its message cannot be shown"
    if isinstance(error, Exception):
        return name, text if text.strip() else ""
    return "RuntimeError", f"{name}: {text}" if text.strip() else name


def _portable(error: BaseException) -> Exception:
    """Return `error` if it arrives whole on the other side of a pipe, else its text."""
    name, text = error_text(error)
    try:
        if isinstance(error, Exception) and isinstance(pickle.loads(pickle.dumps(error)), type(error)):
            return error
    except BaseException:
        pass
    if not isinstance(error, Exception):
        return RuntimeError(text)
    return RuntimeError(f"{name}: {text}" if text else name)


def _end_with_parent(descriptor: int, secret: bytes) -> None:
    poller = select.poll()
    poller.register(descriptor, 0)  # no event but the hang-up, which is always told
    poller.poll()
    _kill_marked(secret)
    os.killpg(0, signal.SIGKILL)


def _serve(descriptor: int) -> None:
    secret = bytes.fromhex(os.environ[_MARK])
    connection = socket.socket(fileno=descriptor)
    connection.set_inheritable(False)
    # A child that the tool forks answers nobody
    os.register_at_fork(after_in_child=connection.close)
    pid, end = os.getpid(), os.fstat(descriptor)
    threading.Thread(target=_end_with_parent, args=(descriptor, secret), daemon=True).start()
    sys.path[:], module, name = pickle.loads(_receive(connection, secret, 0))
    try:
        function: Any = importlib.import_module(module)
        for part in name.split("."):
            function = getattr(function, part)
    except BaseException as e:
        _send(connection, secret, 0, pickle.dumps(": ".join(filter(None, error_text(e)))))
        return
    _send(connection, secret, 0, pickle.dumps(None))
    number = 0
    while True:
        number += 1
        arguments = pickle.loads(_receive(connection, secret, number))
        try:
            answer = pickle.dumps((as_content(function(**arguments)), None))
        except BaseException as e:
            answer = pickle.dumps((None, _portable(e)))
        # A forked child that returned, or a tool that put something else in the place of the socket
        if os.getpid() != pid or not os.path.samestat(os.fstat(descriptor), end):
            os._exit(1)
        _send(connection, secret, number, answer)


if __name__ == "__main__":
    try:
        _serve(int(sys.argv[1]))
    except (EOFError, OSError, ForeignMessage):
        pass
