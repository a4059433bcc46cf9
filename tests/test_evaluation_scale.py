"""Evaluation of many questions: a server that gets all of them at once, and processes that share them."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from evaluation_script import QUESTIONS, agent, score
from scripted import END, PROMPT, VOCAB, character_tokenizer, plan

from arpo_trl.evaluation import Agent, evaluate
from arpo_trl.viewer.records import find_benchmarks

ROOT = Path(__file__).parents[1]
PLANS = {"A": plan("A<s>q</s>yes"), "B": plan("Bno")}


def s(query: str) -> str:
    """
    Search.

    Args:
        query: What to look for.
    """
    return "found " + query


class VLLM(ThreadingHTTPServer):
    """A stand-in for `vllm serve`: odd questions follow plan A and even ones B, a row's tokens are those of its plan.

    It answers as soon as it has `expected` rows at the same time, and fails the first `failures` requests.
    """

    request_queue_size = 128
    daemon_threads = True

    def __init__(self, expected: int = 0, failures: int = 0):
        super().__init__(("127.0.0.1", 0), Handler)
        self.expected, self.failures = expected, failures
        self.rows, self.most, self.asked = 0, 0, []
        self.changed = threading.Condition()
        self.tokenizer = character_tokenizer()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()

    def sample(self, context: list[int], asked: dict) -> list[int]:
        question, _, text = self.tokenizer.decode(context).partition(PROMPT)
        while "<result>" in text:
            head, tail = text.split("<result>", 1)
            text = head + tail.split("</result>", 1)[1]
        items = PLANS["A" if int(question) % 2 else "B"]
        ids = []
        while len(ids) < asked["max_tokens"]:
            ids.append(VOCAB.index(items[len(text) + len(ids)]))
            written = self.tokenizer.decode(ids)
            if ids[-1] in asked["stop_token_ids"] or any(stop in written for stop in asked["stop"]):
                break
        return ids


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        assert self.path == "/v1/models"
        self.reply({"data": [{"id": "served", "max_model_len": 300}]})

    def do_POST(self):
        asked, server = json.loads(self.rfile.read(int(self.headers["Content-Length"]))), self.server
        with server.changed:
            server.asked.append(asked)
            if server.failures:
                server.failures -= 1
                self.reply({"error": "busy"}, 503)
                return
            server.rows += len(asked["prompt"])
            server.most = max(server.most, server.rows)
            server.changed.notify_all()
            server.changed.wait_for(lambda: server.most >= server.expected, timeout=10)
            server.rows -= len(asked["prompt"])
        choices = [
            {"index": index, "text": "", "token_ids": server.sample(context, asked)}
            for index, context in enumerate(asked["prompt"])
        ]
        self.reply({"choices": choices[::-1]})

    def reply(self, value, status=200):
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_server_gets_all_questions_at_once_and_answers_with_tools(tmp_path):
    rows = [{"prompt": f"{number}{PROMPT}", "answer": "yes"} for number in range(150)]
    with VLLM(expected=300, failures=1) as server:
        served = Agent(server.url + "/v1", character_tokenizer(), [s], tool_protocol="tags", temperature=0.7)
        records = evaluate(served, rows, score, num_generations=2, records_path=tmp_path / "records.jsonl")
        served.close()
    assert [record["scores"] for record in records] == [[0.0] * 2, [1.0] * 2] * 75
    assert records[1]["completions"][0] == "A<s>q</s><result>found q</result>yes"
    assert [len(calls) for calls in records[1]["tool_calls"]] == [1, 1] and not any(records[1]["truncated"])
    assert server.most == 300, "all completions were asked for at the same time"
    assert {len(asked["prompt"]) for asked in server.asked if len(asked["prompt"]) > 1} <= {64, 44, 22}
    asked = server.asked[0]
    assert (asked["model"], asked["temperature"], asked["stop"]) == ("served", 0.7, ["</s>"])
    assert asked["stop_token_ids"] == [VOCAB.index(END)] and asked["return_token_ids"]
    written = lines(tmp_path / "records.jsonl")
    assert {record["sampling"]["model"] for record in written} == {"served"}
    # Questions that end in the first wave are written before those that call a tool
    assert [record["prompt_index"] % 2 for record in written] == [0] * 150 + [1] * 150


def test_a_server_that_is_none_is_told_at_construction():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    for model, told in (
        (f"http://127.0.0.1:{port}", "does not answer .* Is the server running"),
        ("Qwen/Qwen3-0.6B", "`model` is 'Qwen/Qwen3-0.6B', which is no address"),
    ):
        with pytest.raises((RuntimeError, ValueError), match=told):
            Agent(model, character_tokenizer(), tool_protocol="tags")


def test_what_is_sampled_is_kept_where_scoring_fails(tmp_path):
    rows = [{"prompt": f"{number}{PROMPT}", "answer": "yes"} for number in range(4)]

    def failing(completions, **columns):
        raise RuntimeError("no judge")

    with VLLM() as server:
        served = Agent(server.url, character_tokenizer(), [s], tool_protocol="tags")
        with pytest.raises(RuntimeError, match="no judge"):
            evaluate(served, rows, failing, records_path=tmp_path / "records.jsonl")
        assert [record["score"] for record in lines(tmp_path / "records.jsonl")] == [None] * 4, "also the later ones"
        requests = len(server.asked)
        records = evaluate(served, rows, score, records_path=tmp_path / "records.jsonl")
        assert [record["scores"] for record in records] == [[0.0], [1.0]] * 2 and len(server.asked) == requests
        served.close()


def launch(folder: Path, mode: str) -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--num_processes", "2"]
    command += ["--mixed_precision", "no", "--main_process_port", str(port)]
    command += ["--config_file", str(ROOT / "examples" / "accelerate_configs" / "multi_gpu.yaml")]
    command += [str(ROOT / "tests" / "evaluation_script.py"), str(folder), mode]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, start_new_session=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        try:
            return process.wait(300)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def test_two_processes_share_the_questions_and_any_number_goes_on_after_a_kill(tmp_path):
    (tmp_path / "records").mkdir()
    folder = tmp_path / "records"
    assert launch(folder, "dies") != 0
    parts = {path.name: lines(path) for path in folder.glob("records.jsonl.part-*")}
    assert not (folder / "records.jsonl").exists() and "records.jsonl.part-1" in parts
    # The killed one had answered its first question and sampled its second
    assert {record["prompt_index"] for record in parts["records.jsonl.part-1"]} == {1}
    assert find_benchmarks(tmp_path) == {} or not list(find_benchmarks(tmp_path))
    before = sorted(record["prompt_index"] for part in parts.values() for record in part)

    code = launch(folder, "lives")
    assert code == 0, (folder / "log").read_text()[-4000:]
    facts = [json.loads((folder / f"process-{process}.json").read_text()) for process in (0, 1)]
    again = [prompt for fact in facts for prompt in fact["asked"]]
    left = [row["prompt"] for index, row in enumerate(QUESTIONS) if index not in before]
    assert sorted(again) == sorted(left * 2), "each question that was left, twice: by one of both"
    assert abs(len(facts[0]["asked"]) - len(facts[1]["asked"])) <= 2
    assert facts[0]["returned"] == facts[1]["returned"]
    returned = facts[0]["returned"]
    assert [question["index"] for question in returned] == list(range(7))
    assert [question["scores"] for question in returned] == [[float(index % 2)] * 2 for index in range(7)]
    assert sorted(path.name for path in folder.glob("records*")) == ["records.jsonl"], "the parts are joined"
    assert len(lines(folder / "records.jsonl")) == 14

    alone = agent()
    assert evaluate(alone, QUESTIONS, score, 2, folder / "records.jsonl") is not None
    assert alone.model.batches == []
    # A kill between joining and deleting, and one in the middle of a line
    written = (folder / "records.jsonl").read_text().splitlines(keepends=True)
    (folder / "records.jsonl.part-0").write_text("".join(written[:4]))
    (folder / "records.jsonl.part-1").write_text("".join(written[10:]))
    (folder / "records.jsonl").write_text("".join(written[:11]) + written[11][:30])
    assert len(evaluate(alone, QUESTIONS, score, 2, folder / "records.jsonl")) == 7
    assert alone.model.batches == [] and len(lines(folder / "records.jsonl")) == 14
    assert sorted(path.name for path in folder.glob("records*")) == ["records.jsonl"]
    alone.close()
