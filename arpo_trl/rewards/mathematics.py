r"""Answers in mathematics, compared as mathematics by math-verify: "-3" is not "3", "1/2" is "0.5".

Three steps: `math_notation.py` writes both answers in the LaTeX that math-verify reads, `math_readings.py` settles
what text can settle (units, times, bases, choices, words), and the rest is compared in a few worker processes
(`math_worker.py`). math-verify's own time-out uses SIGALRM, which fails off the main thread, where TRL may run reward
functions; a worker ends itself when a question takes too much CPU time, is ended when it takes too much time, and is
replaced.

What is not here: sets in builder notation that are no interval are compared as text, and math-verify takes the pair
"(1, 2)" for equal to the set of the two.
"""

import atexit
import importlib.util
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from .completions import final_answers, ground_truths, mean
from .math_notation import MAX_LENGTH, normalise
from .math_readings import choice_readings as choice_readings
from .math_readings import readings

_START_SECONDS = 300.0


class Verdict(NamedTuple):
    """`equal`, whether the answers agree; `parsed`, whether the truth was read as mathematics rather than as text."""

    equal: bool
    parsed: bool


class MathVerifier:
    """
    Worker processes that compare answers. Safe to use from any thread.

    Args:
        workers (`int`): Processes, started when first needed.
        timeout (`float`): Seconds of CPU time for one comparison.
        memory_mb (`int`): Address space of a process, in MiB.
        wall_timeout (`float`): Seconds that may pass before a comparison is given up, whatever the process is doing.
    """

    def __init__(self, workers: int = 4, timeout: float = 5.0, memory_mb: int = 2048, wall_timeout: float = 60.0):
        if importlib.util.find_spec("math_verify") is None:
            raise ImportError("Mathematics rewards need math-verify: pip install 'arpo-trl[math]'")
        self.timeout = timeout
        self.wall_timeout = wall_timeout
        self._memory = memory_mb * 2**20
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="arpo-math")
        self._idle: queue.LifoQueue[subprocess.Popen | None] = queue.LifoQueue()
        for _ in range(workers):
            self._idle.put(None)

    def compare(self, pairs: Sequence[tuple[str, str]]) -> list[Verdict | None]:
        """
        Compare (ground truth, answer) pairs.

        Args:
            pairs (`Sequence[tuple[str, str]]`): Pairs in LaTeX or plain notation. Equal pairs are compared once.

        Returns:
            `list[Verdict | None]`: One per pair; `None` where the comparison was given up (time, memory, a crash).
        """
        distinct = list(dict.fromkeys(pairs))
        verdicts = dict(zip(distinct, self._threads.map(self._compare_one, distinct), strict=True))
        return [verdicts[pair] for pair in pairs]

    def _compare_one(self, pair: tuple[str, str]) -> Verdict | None:
        process = self._idle.get()
        try:
            if process is None or process.poll() is not None:
                process = self._start()
            question = {"truth": pair[0], "answer": pair[1], "seconds": self.timeout}
            try:
                assert process.stdin and process.stdout
                with _killed_after(self.wall_timeout, process):
                    process.stdin.write(json.dumps(question) + "\n")
                    process.stdin.flush()
                    reply = process.stdout.readline()
            except BrokenPipeError:
                reply = ""
            if not reply.endswith("\n"):
                _stop(process)
                process = None
                return None
            return Verdict(**json.loads(reply))
        finally:
            self._idle.put(process)

    def _start(self) -> subprocess.Popen:
        # -P: the folder of the script holds modules of ours, none of which is meant for import by their bare names
        command = [sys.executable, "-P", str(Path(__file__).with_name("math_worker.py")), str(self._memory)]
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="utf-8",
            errors="surrogatepass",
            env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        )
        assert process.stdout
        with _killed_after(_START_SECONDS, process):
            greeting = json.loads(process.stdout.readline() or '{"broken": "it ended without a word"}')
        if "broken" in greeting:
            _stop(process)
            raise RuntimeError(f"The process that compares mathematics does not start: {greeting['broken']}")
        return process

    def close(self) -> None:
        """End the worker processes."""
        self._threads.shutdown()
        while not self._idle.empty():
            _stop(self._idle.get())


@contextmanager
def _killed_after(seconds: float, process: subprocess.Popen) -> Iterator[None]:
    """A process that is stopped, or waits, burns no CPU time: its end is what ends the waiting for it here."""
    alarm = threading.Timer(seconds, process.kill)
    alarm.daemon = True
    alarm.start()
    try:
        yield
    finally:
        alarm.cancel()


def _stop(process: subprocess.Popen | None) -> None:
    if process is not None:
        process.kill()
        process.communicate()


_shared_lock = threading.Lock()


@cache
def _make_shared_verifier() -> MathVerifier:
    verifier = MathVerifier(workers=min(4, os.cpu_count() or 1))
    atexit.register(verifier.close)
    return verifier


def shared_verifier() -> MathVerifier:
    """The verifier of this Python process that reward functions share."""
    with _shared_lock:
        return _make_shared_verifier()


def clean_answer(text: str) -> str:
    """`text` in the LaTeX that is compared ([`~rewards.math_notation.normalise`])."""
    return normalise(text)


def _read(truth: str, answer: str) -> bool | list[tuple[str, str]]:
    """As [`readings`]; an answer that is too long to be read is right if it is the same text."""
    return truth == answer if max(len(truth), len(answer)) > MAX_LENGTH else readings(truth, answer)


def math_reward(
    completions: list,
    model_text: list[str] | None = None,
    log_metric: Callable[[str, float], None] | None = None,
    verifier: MathVerifier | None = None,
    **kwargs: Any,
) -> list[float | None]:
    r"""
    1 for a row whose boxed answer is equal, as mathematics, to one of its ground truths, else 0.

    Args:
        completions (`list`): Strings or messages; the answer is the last `\boxed{}` of `<answer>`, or of the last
            turn.
        model_text (`list[str]`, *optional*): What the model wrote, as [`ARPOTrainer`] passes it.
        log_metric (`Callable`, *optional*): Provided by the trainer. Logged are the mean and `math_reward/given_up`,
            the comparisons that ran out of time or memory, which score 0.
        verifier ([`~rewards.MathVerifier`], *optional*): The processes that compare; shared ones by default.
        **kwargs: The dataset's columns; `answer` (or `solution`, `ground_truth`) holds a string or a list per row.

    Returns:
        `list[float]`: One value per row; `None` for a row without ground truth.
    """
    truths = [[clean_answer(truth) for truth in row] for row in ground_truths(kwargs)]
    answers = [answer and clean_answer(answer) for answer in final_answers(completions, model_text)]
    rewards: list[float | None] = []
    asked: list[tuple[int, tuple[str, str]]] = []
    for i, (row, answer) in enumerate(zip(truths, answers, strict=True)):
        found = [_read(truth, answer) for truth in row] if answer else []
        rewards.append(float(True in found) if row else None)
        if rewards[-1] == 0.0:
            asked += [(i, pair) for pairs in found if not isinstance(pairs, bool) for pair in pairs]
    verdicts = (verifier or shared_verifier()).compare([pair for _, pair in asked]) if asked else []
    for (i, _), verdict in zip(asked, verdicts, strict=True):
        if verdict is not None and verdict.equal:
            rewards[i] = 1.0
    if log_metric is not None:
        log_metric("math_reward/mean", mean([reward for reward in rewards if reward is not None]))
        log_metric("math_reward/given_up", verdicts.count(None))
    return rewards
