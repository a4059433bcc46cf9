"""Offer a local index to other machines over the `/retrieve` protocol.

```bash
python -m arpo_trl.tools.search.server --index corpus.jsonl --port 8000
```

`--index` is a directory that `BM25Search.save` wrote (memory-mapped, up in seconds), or a JSON Lines or parquet file
(indexed at the start). A dense or hybrid index is served from Python, since it needs its encoder:

```python
serve(HybridSearch.load("index", encoder=model.encode), port=8000).serve_forever()
```

What this server does NOT do: authentication, encryption, or work on several cores; it is meant for a trusted network,
and listens on this machine alone unless `--host` says otherwise.
"""

from __future__ import annotations

import argparse
import json
import reprlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from .bm25 import BM25Search, PassageSearch

# bytes of a request; a thousand long queries are less
_LONGEST_REQUEST = 2**20
# passages of one query, of all queries of a request, and characters of a query
_MOST_PASSAGES = 1000
_MOST_PASSAGES_IN_ALL = 20_000
_LONGEST_QUERY = 10_000
# characters of the passages of an answer, and answers that are made and sent at the same time: together they bound the
# server's memory, at some 5 bytes a character
_LONGEST_ANSWER = 16 * 2**20
_ANSWERS_AT_ONCE = 16


def answer(index: PassageSearch, request: Any) -> dict[str, Any]:
    """Answer one request of the protocol.

    Args:
        index ([`~arpo_trl.tools.search.PassageSearch`]): What to search in.
        request (`dict`): `{"queries": list[str], "topk": int, "return_scores": bool}`; the last two may be left out.

    Returns:
        `dict`: `{"result": [[{"document": {"id", "contents"}, "score"}, ...], ...]}`, one list a query, best first;
        the documents alone without `return_scores`.

    Raises:
        ValueError: If the request is not of that form, or asks for more than the server gives.
    """
    if not isinstance(request, dict):
        raise ValueError(f"The request must be an object, not {type(request).__name__}.")
    queries = request.get("queries")
    if not isinstance(queries, list) or not all(isinstance(query, str) for query in queries):
        raise ValueError("'queries' must be a list of strings.")
    top_k = request.get("topk") or index.top_k
    if type(top_k) is not int or not 1 <= top_k <= _MOST_PASSAGES:
        raise ValueError(f"'topk' must be a whole number from 1 to {_MOST_PASSAGES}, not {reprlib.repr(top_k)}.")
    if len(queries) * top_k > _MOST_PASSAGES_IN_ALL:
        raise ValueError(
            f"{len(queries)} queries with 'topk' {top_k} ask for more than {_MOST_PASSAGES_IN_ALL} passages; "
            "send fewer queries at once."
        )
    longest = max(map(len, queries), default=0)
    if longest > _LONGEST_QUERY:
        raise ValueError(f"A query has {longest} characters; it may have {_LONGEST_QUERY}.")
    length = 0
    result: list[list[dict[str, Any]]] = []
    for query in queries:
        hits = index.retrieve(query, top_k)
        length += sum(len(hit.text) for hit in hits)
        if length > _LONGEST_ANSWER:
            raise ValueError(
                f"The answer is longer than {_LONGEST_ANSWER} characters; send fewer queries at once or lower 'topk'."
            )
        documents = [{"id": str(hit.position), "contents": hit.text} for hit in hits]
        if request.get("return_scores"):
            result.append([{"document": d, "score": hit.score} for d, hit in zip(documents, hits, strict=True)])
        else:
            result.append(documents)
    return {"result": result}


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 512  # a wave of rollouts connects all at once

    def __init__(self, address: tuple[str, int], index: PassageSearch):
        super().__init__(address, _Handler)
        self.index = index
        self.places = threading.Semaphore(_ANSWERS_AT_ONCE)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"  # keeps connections
    timeout = 120  # seconds until an idle connection is closed
    disable_nagle_algorithm = True

    def do_POST(self) -> None:
        try:
            length = int(self.headers.get("Content-Length", ""))
        except ValueError:
            length = -1
        if not 0 <= length <= _LONGEST_REQUEST:
            # the body cannot be skipped, so neither can the connection be used further
            self.close_connection = True
            self._send(
                413 if length > 0 else 411, {"error": f"Content-Length must be given, up to {_LONGEST_REQUEST}."}
            )
            return
        body = self.rfile.read(length)
        if self.path != "/retrieve":
            self._send(404, {"error": "POST to /retrieve."})
            return
        try:
            request = json.loads(body)
        except (ValueError, RecursionError) as error:
            self._send(400, {"error": f"The request is not JSON: {error}"})
            return
        with self.server.places:
            try:
                status, content = 200, answer(self.server.index, request)
            except ValueError as error:
                status, content = 400, {"error": str(error)}
            except Exception as error:  # a failing encoder must not look like a lost connection
                status, content = 500, {"error": f"{type(error).__name__}: {error}"}
            self._send(status, content)

    def do_GET(self) -> None:
        """So that a script can wait until the server is up."""
        self._send(200, {"passages": len(self.server.index.passages)})

    def _send(self, status: int, content: dict[str, Any]) -> None:
        body = json.dumps(content, ensure_ascii=False).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Silent: a training run makes thousands of requests."""


def serve(index: PassageSearch, host: str = "127.0.0.1", port: int = 8000) -> ThreadingHTTPServer:
    """Open a server for an index; call `serve_forever` on it.

    Args:
        index ([`~arpo_trl.tools.search.PassageSearch`]): What to search in.
        host (`str`): Address to listen on; `"0.0.0.0"` for every network that the machine is in.
        port (`int`): Port; 0 picks a free one.

    Returns:
        `ThreadingHTTPServer`: Already listening, not yet answering.
    """
    return _Server((host, port), index)


def open_index(path: str, text_column: str = "contents", top_k: int = 3) -> BM25Search:
    """Load a saved index, or build one from a JSON Lines or parquet file."""
    if Path(path).is_dir():
        return BM25Search.load(path, top_k=top_k)
    if path.endswith(".parquet"):
        return BM25Search.from_parquet(path, text_column, top_k=top_k)
    if path.endswith((".jsonl", ".json")):
        return BM25Search.from_jsonl(path, text_column, top_k=top_k)
    raise ValueError(f"--index must be a saved index, a .jsonl or a .parquet file, not {path!r}.")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m arpo_trl.tools.search.server", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--index", required=True, help="directory of a saved index, or a .jsonl or .parquet file")
    parser.add_argument("--text-column", default="contents", help="key or column that holds the text of a passage")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for every network")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--top-k", type=int, default=3, help="passages a query where the request does not say")
    arguments = parser.parse_args()
    try:
        index = open_index(arguments.index, arguments.text_column, arguments.top_k)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    server = serve(index, arguments.host, arguments.port)
    address = f"http://{arguments.host}:{server.server_port}/retrieve"
    print(f"{len(index.passages)} passages at {address}", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass


if __name__ == "__main__":
    main()
