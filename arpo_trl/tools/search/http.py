"""Search over HTTP: a retrieval server of your own, or the web.

```python
from arpo_trl.tools.search.http import RetrieveClient, SerperSearch

local = RetrieveClient("http://127.0.0.1:8000/retrieve")  # as served by Search-R1, verl, arpo_trl.tools.search.server
web = SerperSearch()  # key from the environment variable SERPER_API_KEY
trainer = ARPOTrainer(..., tools=[local.search])
```

What may pass by itself (rate limits, server errors, lost connections, time-outs, half an answer) raises
[`~arpo_trl.execution.errors.TransientToolError`]; anything else a `RuntimeError`. Neither is ever returned as a
result.

What this module does NOT do: repeat a request or remember an answer, which is the executor's part
(`tool(web.search, retries=3, cache="cache.sqlite")`); or defend against the server it is pointed at, as
[`~arpo_trl.tools.web.browse.Browser`] does.
"""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx2

from ...execution.errors import TransientToolError
from ...execution.options import tool
from ...execution.retries import is_transient, retry_after
from .passages import NO_RESULTS, format_passages

# bytes; a search result is some kilobytes
_LONGEST_ANSWER = 10 * 2**20


class RetrieveClient:
    """Searches with a server that speaks the `/retrieve` protocol of
    [Search-R1](https://huggingface.co/papers/2503.09516), which verl and others share.

    The request is `{"queries": [...], "topk": 3, "return_scores": true}` and the answer
    `{"result": [[{"document": {"id": ..., "contents": ...}, "score": ...}, ...], ...]}`, one list a query.

    Args:
        url (`str`): Full address, for instance `"http://127.0.0.1:8000/retrieve"`.
        top_k (`int`): Passages that a search returns at most.
        timeout (`float`): Seconds that one request may take.
    """

    def __init__(self, url: str, top_k: int = 3, timeout: float = 30.0):
        self.top_k = _checked_top_k(top_k)
        self._http = _JSONClient(url, timeout)

    def retrieve(self, queries: list[str], top_k: int | None = None) -> list[list[str]]:
        """Send several queries in one request.

        Args:
            queries (`list[str]`): What to look for.
            top_k (`int`, *optional*): Passages a query; defaults to that of the client.

        Returns:
            `list[list[str]]`: Texts of the passages of each query, best first.
        """
        top_k = self.top_k if top_k is None else top_k
        answer = self._http.post({"queries": queries, "topk": top_k, "return_scores": True})
        try:
            # a server that ignores return_scores sends the documents alone
            texts = [[hit.get("document", hit)["contents"] for hit in hits] for hits in answer["result"]]
        except (AttributeError, KeyError, TypeError):
            texts = None
        if (
            texts is None
            or len(texts) != len(queries)
            or not all(isinstance(text, str) for row in texts for text in row)
        ):
            raise RuntimeError(
                f"{self._http.url} does not speak the /retrieve protocol; it answered {_excerpt(answer)}"
            )
        return [row[:top_k] for row in texts]

    @tool(deterministic=True)
    def search(self, query: str) -> str:
        """Search a collection of passages and return those that fit the query best.

        Args:
            query: What to look for, in a few words.

        Returns:
            The passages found, best first.
        """
        return format_passages(self.retrieve([_checked_query(query)])[0])


class SerperSearch:
    """Searches the web with Google through [Serper](https://serper.dev).

    Args:
        api_key (`str`, *optional*): Key; defaults to the environment variable `SERPER_API_KEY`.
        top_k (`int`): Pages that a search returns at most.
        timeout (`float`): Seconds that one request may take.
        base_url (`str`): Address of the service, for a proxy or a test.
    """

    def __init__(
        self,
        api_key: str | None = None,
        top_k: int = 10,
        timeout: float = 30.0,
        base_url: str = "https://google.serper.dev",
    ):
        api_key = api_key or os.environ.get("SERPER_API_KEY")
        if not api_key:
            raise ValueError("SerperSearch needs a key: set the environment variable SERPER_API_KEY or pass api_key.")
        self.top_k = _checked_top_k(top_k)
        self._http = _JSONClient(base_url.rstrip("/") + "/search", timeout, {"X-API-KEY": api_key})

    @tool(deterministic=True)
    def search(self, query: str) -> str:
        """Search the web and return the pages that fit the query best.

        Args:
            query: What to look for, in a few words.

        Returns:
            Title, address and excerpt of the pages found, best first.
        """
        answer = self._http.post({"q": _checked_query(query), "num": self.top_k})
        # none of these is another service, or an error sent as a success; an empty list is a true answer
        if not isinstance(answer, dict) or not {"organic", "answerBox", "knowledgeGraph"} & answer.keys():
            raise RuntimeError(f"{self._http.url} sent no search results; it answered {_excerpt(answer)}")
        pages = [answer.get("answerBox"), answer.get("knowledgeGraph"), *(answer.get("organic") or [])]
        pages = [page for page in pages if isinstance(page, dict)]
        return format_passages([_describe(page) for page in pages[: self.top_k]]) if pages else NO_RESULTS


def _describe(page: dict[str, Any]) -> str:
    """One line for a page or an entry of the knowledge graph: title, address, date, excerpt and facts it has."""
    link = page.get("link") or page.get("website") or page.get("descriptionLink")
    title = " ".join(str(part) for part in (page.get("title"), f"({link})" if link else None) if part)
    excerpt = page.get("answer") or page.get("snippet") or page.get("description")
    attributes = page.get("attributes")
    facts = [f"{name}: {value}" for name, value in attributes.items()] if isinstance(attributes, dict) else []
    return " · ".join(str(part) for part in (title, page.get("type"), page.get("date"), excerpt, *facts) if part)


class _JSONClient:
    """Posts JSON to one address and reads JSON, on connections that are kept and shared by threads."""

    def __init__(self, url: str, timeout: float, headers: dict[str, str] | None = None):
        if not re.match(r"https?://[^/]", url):
            raise ValueError(f"url must start with http:// or https:// and name a host, not {url!r}.")
        if timeout <= 0:
            raise ValueError(f"timeout must be above 0 seconds, not {timeout}.")
        self.url = url
        self.timeout = timeout
        # how many calls run at once is the executor's to limit; no redirects: they would carry the key elsewhere
        self._client = httpx2.Client(
            headers=headers,
            timeout=timeout,
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=64),
            follow_redirects=False,
        )

    def post(self, payload: dict[str, Any]) -> Any:
        """Return what the server answers to `payload`.

        Raises:
            TransientToolError: If the request may succeed a little later.
            RuntimeError: If it will not.
        """
        _request.deadline = time.monotonic() + self.timeout
        try:
            with self._client.stream("POST", self.url, json=payload, extensions={"trace": _limit}) as response:
                body = self._read(response)
            if response.status_code != 200:
                raise httpx2.HTTPStatusError(
                    f"HTTP {response.status_code}: {_excerpt(body.decode(errors='replace'))}",
                    request=response.request,
                    response=response,
                )
        except httpx2.HTTPError as error:
            what = str(error) or type(error).__name__
            if isinstance(error, httpx2.TimeoutException):
                what = f"timed out: no complete answer within {self.timeout} s"
            sentence = f"{self.url} failed: {what}"
            if not is_transient(error):
                raise RuntimeError(sentence) from error
            status = response.status_code if isinstance(error, httpx2.HTTPStatusError) else None
            raise TransientToolError(sentence, status, retry_after(error) or None) from error
        try:
            return json.loads(body)
        except (ValueError, RecursionError):
            # a body without a length that was cut short looks like this, and so does the error page of a proxy
            raise TransientToolError(
                f"{self.url} did not answer with JSON but with {_excerpt(body.decode(errors='replace'))}", 200
            ) from None

    def _read(self, response: httpx2.Response) -> bytearray:
        body = bytearray()
        for piece in response.iter_bytes():
            body += piece
            if time.monotonic() > _request.deadline:
                raise httpx2.ReadTimeout("", request=response.request)
            if len(body) > _LONGEST_ANSWER:
                raise httpx2.HTTPError(f"the answer is longer than {_LONGEST_ANSWER} bytes")
        return body


# The time by which the request that this thread makes must be over
_request = threading.local()


def _limit(event: str, info: dict[str, Any]) -> None:
    """Hold every wait on a new connection to the deadline of the request that it serves.

    The client's own time-out starts anew with every byte, also within the headers. The client tells of its connections
    through the `trace` extension of a request.
    """
    if not event.endswith(("connect_tcp.complete", "start_tls.complete")):
        return
    stream = info["return_value"]

    def limited(operation: Callable) -> Callable:
        def wait(data: Any, timeout: float | None = None) -> Any:
            left = max(1e-3, _request.deadline - time.monotonic())  # 0 would mean not to wait
            return operation(data, left if timeout is None else min(timeout, left))

        return wait

    stream.read, stream.write = limited(stream.read), limited(stream.write)


def _checked_query(query: str) -> str:
    if not isinstance(query, str):
        raise TypeError(f"query must be one string, not {type(query).__name__}; search once for each query.")
    return query


def _checked_top_k(top_k: int) -> int:
    if top_k < 1:
        raise ValueError(f"top_k must be at least 1, not {top_k}.")
    return top_k


def _excerpt(answer: Any) -> str:
    return repr(answer)[:200]
