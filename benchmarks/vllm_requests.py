"""
What vLLM's answers cost this side: bytes, parsing and requests, with K log-probabilities at every token, with K where
entropy is read, and with none.

    python benchmarks/vllm_requests.py

Segments of 1,000 tokens with K = 20 and k = 20. The server is a stand-in on loopback that writes what `vllm serve`
writes on `/v1/completions`, read by TRL's own client; a colocated engine's outputs are read by TRL's own
`extract_logprobs`. Both are followed by what makes segments of them. Neither samples: a model's time is not in it.
"""

import argparse
import json
import pickle
import random
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import requests
from trl.generation.vllm_client import VLLMClient
from trl.generation.vllm_generation import extract_logprobs

from arpo_trl.rollout.engines.parts import Request, StopStrings
from arpo_trl.rollout.engines.vllm import Answer, Asked, VLLMEngine, server_by_row

VOCABULARY, TOP_K, WINDOW = 151_936, 20, 20
SIDES = ("none", "where it is read", "everywhere")


class Tokens:
    """Log-probabilities of the tokens of a segment: the K likeliest and, where it is none of them, the sampled one."""

    def __init__(self, seed: int = 0):
        self._random = random.Random(seed)

    def position(self, top_k: int) -> list[tuple[int, float]]:
        count = max(top_k, 1)
        tokens = self._random.sample(range(1000, VOCABULARY), count)
        return [(token, -0.1 - 0.7 * rank - 1e-9 * self._random.random()) for rank, token in enumerate(tokens)]


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 1024

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.bytes = self.requests = 0
        self.rows = self.most = 0
        self.pause = 0.0
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        asked, server = json.loads(self.rfile.read(int(self.headers["Content-Length"]))), self.server
        assert isinstance(server, Server)
        rows, tokens = len(asked["prompt"]), Tokens()
        with server.lock:
            server.requests += 1
            server.rows += rows
            server.most = max(server.most, server.rows)
        time.sleep(server.pause)
        choices = []
        for index, context in enumerate(asked["prompt"]):
            positions = [tokens.position(asked["logprobs"]) for _ in range(asked["max_tokens"])]
            ids = [position[0][0] for position in positions]
            choices.append(
                {
                    "index": index,
                    "text": "",
                    "token_ids": ids,
                    "prompt_token_ids": context,
                    "finish_reason": "length",
                    "logprobs": {
                        "tokens": [f"token_id:{token}" for token in ids],
                        "token_logprobs": [position[0][1] for position in positions],
                        "text_offset": list(range(len(ids))),
                        "top_logprobs": [{f"token_id:{token}": value for token, value in row} for row in positions],
                    },
                }
            )
        body = json.dumps({"choices": choices}).encode()
        with server.lock:
            server.bytes += len(body)
            server.rows -= rows
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


class Client(VLLMClient):
    """TRL's, without vLLM and without a look at the server; counts the CPU seconds in which answers are read."""

    def __init__(self, url: str):
        self.base_url, self.model, self.session = url, "model", requests.Session()

    def _post(self, url: str, **kwargs: Any) -> dict:
        response = self.session.post(url, **kwargs)
        self.began = time.process_time()
        return response.json()


def on_server(server: Server, client: Client) -> Callable:
    def ask(asked: list[Request], lookups: Any, images: Sequence[Sequence[Any]] = ()) -> Answer | None:
        if not asked:
            return None
        answer = server_by_row(client.generate, [Asked(*request[1:]) for request in asked])(
            [request.context for request in asked], generation_kwargs={}
        )
        del answer["prompt_ids"]
        ask.seconds += time.process_time() - client.began
        return Answer(*answer.values())

    ask.seconds = 0.0
    return ask


def colocated() -> Callable:
    tokens = Tokens()

    def output(request: Request) -> SimpleNamespace:
        positions = [tokens.position(request.top_k) for _ in range(request.limit)]
        told = [
            {token: SimpleNamespace(logprob=value, rank=rank) for rank, (token, value) in enumerate(position, start=1)}
            for position in positions
        ]
        ids = [position[0][0] for position in positions]
        return SimpleNamespace(outputs=[SimpleNamespace(token_ids=ids, logprobs=told)])

    def ask(asked: list[Request], lookups: Any, images: Sequence[Sequence[Any]] = ()) -> Answer | None:
        if not asked:
            return None
        outputs = [output(request) for request in asked]
        began = time.process_time()
        logprobs, told = extract_logprobs(outputs)
        ask.seconds += time.process_time() - began
        ids = [output.outputs[0].token_ids for output in outputs]
        ask.bytes += len(pickle.dumps((ids, logprobs, told)))
        return Answer(ids, logprobs, told)

    ask.seconds, ask.bytes = 0.0, 0
    return ask


class TimedEngine(VLLMEngine):
    """Counts the CPU seconds in which segments are made of answers."""

    seconds = 0.0

    def samples(self, answer: Answer) -> list:
        began = time.process_time()
        samples = super().samples(answer)
        self.seconds += time.process_time() - began
        return samples


def parsing(where: str, side: str, rows: int, length: int) -> dict[str, float]:
    """Bytes and CPU seconds of a thousand tokens."""
    stops = StopStrings((), str)
    top_k = 0 if side == "none" else TOP_K
    server = Server() if where == "server" else None
    ask = colocated() if server is None else on_server(server, Client(f"http://127.0.0.1:{server.server_port}"))
    engine = TimedEngine(
        ask, 10**6, VOCABULARY, top_k, WINDOW, stops=lambda: stops if side == "where it is read" else None
    )
    samples = engine.sample([[1] * 500] * rows, [length] * rows)
    assert all(len(sample.ids) == length and len(sample.entropies) == min(top_k, WINDOW) for sample in samples)
    answered = ask.bytes if server is None else server.bytes
    if server is not None:
        server.shutdown()
        server.server_close()
    # The tokens of prompts come back as well; they are short here and not what is compared
    return {"bytes": answered / rows / length, "seconds": (ask.seconds + engine.seconds) / rows / length}


def one_token_each(url: str) -> Callable:
    def generate(prompts: list, max_tokens: int, logprobs: int) -> dict[str, list]:
        asked = {"prompt": prompts, "max_tokens": 1, "logprobs": logprobs}
        choices = requests.post(f"{url}/v1/completions", json=asked).json()["choices"]
        return {"ids": [choice["token_ids"] for choice in choices]}

    def ask(asked: list[Request], lookups: Any, images: Sequence[Sequence[Any]] = ()) -> Answer | None:
        by_row = server_by_row(generate, [Asked(*request[1:]) for request in asked])
        return Answer(by_row([request.context for request in asked])["ids"])

    return ask


def concurrency(rows: int) -> list[dict[str, Any]]:
    """Requests of a wave whose rows have limits of their own, and how many rows a server has at the same time."""
    limits = [8192 - 200 - (row * 1361) % 2800 for row in range(rows)]
    lines = []
    for few in (False, True):
        server = Server()
        server.pause = 0.5

        ask = one_token_each(f"http://127.0.0.1:{server.server_port}")
        VLLMEngine(ask, 10**6, VOCABULARY, 0, WINDOW, few_limits=few).sample([[1]] * rows, limits)
        lines.append({"limits": "few" if few else "own", "requests": server.requests, "rows at once": server.most})
        server.shutdown()
        server.server_close()
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=1000, help="tokens of a segment")
    parser.add_argument("--wave", type=int, default=2048, help="rows of a wave, for the number of requests")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    args = parser.parse_args()
    lines = []
    print(f"{'':<12}{'K log-probabilities':<22}{'bytes a token':>15}{'':>8}{'µs a token':>15}")
    for where in ("server", "colocated"):
        # Sides take turns, so that other work on the machine meets all of them
        runs = [{side: parsing(where, side, args.rows, args.length) for side in SIDES} for _ in range(args.repeats)]
        first = None
        for side in SIDES:
            told = {name: statistics.median(run[side][name] for run in runs) for name in ("bytes", "seconds")}
            first = first or told
            lines.append({"where": where, "side": side, **told})
            ratios = [f"{told[name] / first[name]:.2f}×" for name in ("bytes", "seconds")]
            micro = 1e6 * told["seconds"]
            print(f"{where:<12}{side:<22}{told['bytes']:>15.0f}{ratios[0]:>8}{micro:>15.2f}{ratios[1]:>8}", flush=True)
    wave = concurrency(args.wave)
    print(f"\n{args.wave} rows, each with a limit of its own")
    for line in wave:
        print(f"limits {line['limits']}: {line['requests']} requests, at most {line['rows at once']} rows at once")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"parsing": lines, "wave": wave}, indent=2) + "\n")


if __name__ == "__main__":
    main()
