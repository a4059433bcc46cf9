"""Segments sampled by a vLLM server, outside of training: over HTTP, without TRL's client, which needs vLLM here too.

The server is `vllm serve`, or TRL's, whose `/v1/completions` takes and gives tokens. Another server that speaks the
protocol of OpenAI gives text alone.

What is not here: entropies, log-probabilities, and weights, which are those that the server has loaded.
"""

import json
import os
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Sequence
from http.client import HTTPException
from typing import Any, NamedTuple

import tenacity

from ...execution.retries import is_transient
from .generation_settings import NO_LIMIT
from .parts import Request
from .vllm import Answer, Ask, Asked, _stops, server_by_row

# Rows of a request: what is sampled again if its connection is lost
_ROWS = 64
_ATTEMPTS = 6


class ServedModel(NamedTuple):
    """
    A model that a vLLM server has loaded: see [`find_served_model`].

    Args:
        url (`str`): Address of the server, without `/v1`.
        name (`str`): Name of the model there.
        context_length (`int`): Tokens that it can read.
    """

    url: str
    name: str
    context_length: int


def find_served_model(url: str) -> ServedModel:
    """
    The model of a vLLM server.

    Args:
        url (`str`): Address of the server, with or without `/v1`. A server that wants a key gets that of the
            environment variable `VLLM_API_KEY`.

    Raises:
        RuntimeError: There is no such server, or it answers something else.
    """
    if not url.startswith(("http://", "https://")):
        raise ValueError(
            f"`model` is {url!r}, which is no address: give the model itself, or the address of a vLLM server such as "
            "'http://127.0.0.1:8000'."
        )
    url = url.rstrip("/").removesuffix("/v1")
    try:
        served = _ask(f"{url}/v1/models")["data"][0]
        return ServedModel(url, served["id"], served.get("max_model_len") or NO_LIMIT)
    except (LookupError, TypeError, AttributeError) as error:
        raise RuntimeError(f"{url}/v1/models does not answer as a vLLM server does ({error!r}).") from error


def ask_server(model: ServedModel, sampling: dict[str, Any], stop: Sequence[str], ends: Sequence[int]) -> Ask:
    """
    Ask a vLLM server, without log-probabilities: all rows at the same time.

    Args:
        model ([`ServedModel`]): The model.
        sampling (`dict[str, Any]`): Fields of `vllm.SamplingParams`.
        stop (`Sequence[str]`): Text at which a segment ends.
        ends (`Sequence[int]`): End-of-turn tokens.
    """
    settings = sampling | _stops(stop) | {"stop_token_ids": list(ends)}
    settings |= {"model": model.name, "return_token_ids": True}

    retrying = tenacity.Retrying(
        stop=tenacity.stop_after_attempt(_ATTEMPTS),
        wait=tenacity.wait_exponential_jitter(initial=0.5, max=30),
        retry=tenacity.retry_if_exception(lambda error: is_transient(error.__cause__ or error)),
        reraise=True,
    )

    def generate(prompts: list[list[int]], max_tokens: int, logprobs: int) -> dict[str, list[Any]]:
        asked = settings | {"prompt": prompts, "max_tokens": max_tokens}
        choices = retrying.copy()(_ask, f"{model.url}/v1/completions", asked)
        try:
            choices = sorted(choices["choices"], key=lambda choice: choice["index"])
            return {"ids": [list(choice["token_ids"]) for choice in choices]}
        except (LookupError, TypeError) as error:
            raise RuntimeError(
                f"{model.url}/v1/completions does not tell the tokens that were sampled (`token_ids`): it has to be "
                "vLLM, 0.22 or later."
            ) from error

    def ask(requests: list[Request], lookups: Counter[str], images: Sequence[Sequence[Any]] = ()) -> Answer | None:
        if not requests:
            return None
        by_row = server_by_row(generate, [Asked(*request[1:]) for request in requests], _ROWS)
        return Answer(by_row([request.context for request in requests])["ids"])

    return ask


def _ask(url: str, asked: dict[str, Any] | None = None) -> Any:
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("VLLM_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    data = None if asked is None else json.dumps(asked).encode()
    try:
        # A segment takes as long as it takes
        with urllib.request.urlopen(urllib.request.Request(url, data, headers)) as answer:
            return json.loads(answer.read())
    except urllib.error.HTTPError as error:
        with error:
            told = error.read(2000).decode(errors="replace")
        raise RuntimeError(f"{url} answers {error.code}: {told}") from error
    except (OSError, HTTPException) as error:
        raise RuntimeError(f"{url} does not answer ({error}). Is the server running?") from error
    except ValueError as error:
        raise RuntimeError(f"{url} answers something that is no JSON ({error}).") from error
