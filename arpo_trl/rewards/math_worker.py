"""The process in which answers are compared: reads one JSON question a line, writes one JSON verdict a line.

Started by `mathematics.py` as a plain script, so that it imports neither torch nor the caller's main module. A question
that burns more CPU time than it is given ends the process (SIGPROF's default action needs no cooperation from sympy, and
CPU time, unlike the wall clock, does not depend on what else the machine is doing); one that takes too much memory fails
inside it. The parent reads the end of the stream as "no verdict". The process ends with its parent.
"""

import json
import logging
import math
import os
import resource
import signal
import sys
from typing import Any


def compare(truth: str, answer: str) -> dict[str, bool]:
    """Compare two answers in LaTeX or plain notation; `parsed` is false where the truth could be read as text only."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    config = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]
    gold, target = (
        parse(f"\\boxed{{{text}}}", extraction_config=config, parsing_timeout=None) for text in (truth, answer)
    )
    equal = verify(gold, target, float_rounding=_decimals(gold), timeout_seconds=None)
    return {"equal": bool(equal), "parsed": any(not isinstance(item, str) for item in gold)}


def _decimals(gold: list) -> int:
    """Six decimals, and more where they would leave a small number fewer than four digits: 1e-7 is not 2e-7."""
    try:
        size = abs(float(gold[0]))
    except (TypeError, ValueError, IndexError, OverflowError):
        return 6
    return max(6, 3 - math.floor(math.log10(size))) if 0 < size < 1 else 6


def main() -> None:
    memory = int(sys.argv[1])
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever sympy prints must not pass for a reply
    logging.disable(logging.WARNING)

    def reply(message: dict[str, Any]) -> None:
        replies.write(json.dumps(message) + "\n")

    try:
        compare("1", "2")  # imports everything, before the clock runs
    except Exception as error:
        reply({"broken": f"{type(error).__name__}: {error}"})
        return
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    reply({"ready": True})
    for line in sys.stdin:
        question = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, question["seconds"])
        try:
            verdict = compare(question["truth"], question["answer"])
        except Exception:  # RecursionError, MemoryError, and whatever a parser makes of hostile text
            verdict = {"equal": False, "parsed": False}
        signal.setitimer(signal.ITIMER_PROF, 0)
        reply(verdict)


if __name__ == "__main__":
    main()
