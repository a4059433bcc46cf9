"""Latency and throughput of the Python tool, next to a fresh interpreter for every call.

    python benchmarks/python_tool.py

A fresh `python -c` is what the released ARPO code runs, without isolation; a fresh interpreter in bubblewrap is the
simplest safe tool. All ways run the same code in the same session. What is compared is the time until the answer.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from arpo_trl.tools.python import PythonSandbox

CODES = {
    "trivial": "print(1987 - 1934)",
    "numpy": "import numpy as np\nprint(np.linalg.det(np.eye(3)))",
    "sympy": "from sympy import *\nx = symbols('x')\nprint(solve(x**2 - 5*x + 6))",
}
BWRAP = [
    *["bwrap", "--unshare-all", "--ro-bind", "/", "/", "--dev", "/dev", "--proc", "/proc", "--tmpfs", "/tmp"],
    *["--clearenv", "--cap-drop", "ALL", "--die-with-parent"],
]


def fresh(command: list[str]) -> Callable[[str], str]:
    return lambda code: subprocess.run([*command, sys.executable, "-c", code], capture_output=True, text=True).stdout


def latencies(run: Callable[[str], str], code: str, calls: int) -> list[float]:
    run(code)
    seconds = []
    for _ in range(calls):
        start = time.perf_counter()
        run(code)
        seconds.append(time.perf_counter() - start)
    return sorted(seconds)


def throughput(run: Callable[[str], str], code: str, rows: int) -> float:
    with ThreadPoolExecutor(rows) as pool:
        start = time.perf_counter()
        list(pool.map(run, [code] * rows))
        return rows / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=50, help="calls of each kind")
    parser.add_argument("--rows", type=int, default=64, help="simultaneous calls when throughput is measured")
    args = parser.parse_args()

    with PythonSandbox() as bwrap, PythonSandbox("rlimits") as rlimits:
        ways = {
            "python -c": fresh([]),
            "bwrap python -c": fresh(BWRAP),
            "PythonSandbox, rlimits": rlimits.python,
            "PythonSandbox, bwrap": bwrap.python,
        }
        print(f"{'':24}{'code':10}{'median ms':>10}{'p95 ms':>10}{'faster':>9}")
        for name, code in CODES.items():
            reference = None
            for way, run in ways.items():
                seconds = latencies(run, code, args.calls)
                median = statistics.median(seconds)
                reference = reference or median
                p95 = seconds[int(0.95 * len(seconds))]
                print(f"{way:24}{name:10}{1000 * median:10.1f}{1000 * p95:10.1f}{reference / median:8.1f}x")
        print(f"\n{args.rows} trivial calls at once")
        for way, run in ways.items():
            print(f"{way:24}{throughput(run, CODES['trivial'], args.rows):8.1f} calls/s")


if __name__ == "__main__":
    main()
