"""A real HTTP server on loopback that answers as told, byte for byte: also wrongly, partly, slowly, or not at all."""

import contextlib
import socket
import ssl
import threading
from collections.abc import Callable
from dataclasses import dataclass


@dataclass
class Request:
    line: str
    headers: dict[str, str]
    body: bytes

    @property
    def path(self) -> str:
        return self.line.split()[1]


Answer = bytes | Callable[[socket.socket, Request], None]


def http(body: bytes | str = b"", status: str = "200 OK", **headers: str) -> bytes:
    """A well-formed answer; `Content_Type="text/html"` writes the header `Content-Type`."""
    body = body.encode() if isinstance(body, str) else body
    fields = {"Content-Length": str(len(body)), "Connection": "close"}
    fields |= {name.replace("_", "-"): value for name, value in headers.items()}
    head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    return f"HTTP/1.1 {status}\r\n{head}\r\n".encode() + body


class Loopback:
    """Serves `answers` by path, the path `*` standing for all others; a function is given the socket and the request.

    `requests` holds what was asked, `connections` how often somebody connected.
    """

    def __init__(self, answers: dict[str, Answer], host: str = "127.0.0.1", tls: ssl.SSLContext | None = None):
        self.answers = answers
        self.requests: list[Request] = []
        self.connections = 0
        self.tls = tls
        # set when the test is over, so that answers that hang can let go
        self.over = threading.Event()
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, 0), family=family, backlog=128)
        self.port = self._listener.getsockname()[1]
        self.url = f"{'https' if tls else 'http'}://{f'[{host}]' if ':' in host else host}:{self.port}"

    def __enter__(self):
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.over.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection:
            if self.tls:
                connection = self.tls.wrap_socket(connection, server_side=True)
            with contextlib.closing(connection), connection.makefile("rb") as stream:
                line = stream.readline().decode().strip()
                headers = {}
                while field := stream.readline().strip():
                    name, _, value = field.decode().partition(":")
                    headers[name.lower()] = value.strip()
                request = Request(line, headers, stream.read(int(headers.get("content-length", 0))))
                if not line:
                    return
                self.requests.append(request)
                answer = self.answers.get(request.path, self.answers.get("*", http(status="404 Not Found")))
                if callable(answer):
                    answer(connection, request)
                else:
                    connection.sendall(answer)

    def hang(self, connection: socket.socket, request: Request) -> None:
        """Answer nothing until the test is over."""
        self.over.wait(60)

    def drip(self, data: bytes, pause: float = 0.05) -> Callable[[socket.socket, Request], None]:
        """Answer one byte at a time, for ever if `data` runs out."""

        def answer(connection: socket.socket, request: Request) -> None:
            for i in range(10**6):
                connection.sendall(data[i : i + 1] or b"x")
                if self.over.wait(pause):
                    return

        return answer
