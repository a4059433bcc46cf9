"""Local search at scale: build time, size on disk, load time, and latency of a query, on one core.

    python benchmarks/search.py                      # 1,000,000 passages; about 4 GB of memory
    python benchmarks/search.py --passages 100000 --json outputs/search.json

Passages are synthetic: words drawn by Zipf's law from a vocabulary of 500,000, 60 words a passage. A query is six
words of one passage, so there is a right answer, and the share of queries that find it is printed too. The reference
is bm25s called directly on the same index (`retrieve`, one query at a time), so that the two latencies come from one
run.

Times are CPU seconds, which other work on the machine disturbs least, except for load, which is wall-clock time.
"""

import argparse
import json
import os
import resource
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import bm25s
import numpy as np

from arpo_trl.tools.search import BM25Search, words

VOCABULARY, LENGTH = 500_000, 60


def make_passages(count: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    cumulative = np.cumsum(1 / np.arange(1, VOCABULARY + 1))
    vocabulary = np.array([f"w{i:x}" for i in range(VOCABULARY)])
    passages: list[str] = []
    while len(passages) < count:
        draws = rng.random((min(10_000, count - len(passages)), LENGTH)) * cumulative[-1]
        passages.extend(" ".join(row) for row in vocabulary[np.searchsorted(cumulative, draws)])
    return passages


def make_queries(passages: list[str], count: int, seed: int = 1) -> list[tuple[int, str]]:
    """Positions of passages and six words of each."""
    rng = np.random.default_rng(seed)
    positions = rng.integers(len(passages), size=count)
    return [(int(i), " ".join(rng.choice(passages[i].split(), 6, replace=False))) for i in positions]


def latencies(function, queries: list[str]) -> np.ndarray:
    """Milliseconds of each call, after a few that warm the caches."""
    for query in queries[:5]:
        function(query)
    times = []
    for query in queries:
        start = time.process_time()
        function(query)
        times.append(1000 * (time.process_time() - start))
    return np.array(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--passages", type=int, default=1_000_000)
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--json", type=Path, help="write the numbers here too")
    arguments = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})

    result: dict[str, float] = {}

    def report(name: str, value: float, unit: str = "") -> None:
        result[name] = value
        print(f"{name:<36}{value:>12,.2f} {unit}", flush=True)

    passages = make_passages(arguments.passages)
    queries = make_queries(passages, arguments.queries)
    report("passages", len(passages))
    report("text", sum(map(len, passages)) / 1e6, "MB")
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "index"
        start = time.process_time()
        index = BM25Search(passages)
        report("build", time.process_time() - start, "s")
        report("peak memory", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, "GiB")
        start = time.process_time()
        index.save(directory)
        report("save", time.process_time() - start, "s")
        del index
        report("index on disk", sum(path.stat().st_size for path in (directory / "bm25").iterdir()) / 1e6, "MB")
        report("passages on disk", (directory / "passages.arrow").stat().st_size / 1e6, "MB")
        start = time.perf_counter()
        index = BM25Search.load(directory)
        report("load, memory-mapped", time.perf_counter() - start, "s")

        texts = [query for _, query in queries]
        found = [index.retrieve(query, 1)[0].position == position for position, query in queries]
        report("queries whose passage comes first", 100 * np.mean(found), "%")
        plain = bm25s.BM25.load(directory / "bm25", mmap=True, show_progress=False)
        for name, function in (
            ("search", index.search),
            ("bm25s alone", lambda query: plain.retrieve([words(query)], k=3, show_progress=False)),
        ):
            times = latencies(function, texts)
            report(f"{name}, median", np.median(times), "ms")
            report(f"{name}, 95th percentile", np.percentile(times, 95), "ms")
        report("search / bm25s alone", result["search, median"] / result["bm25s alone, median"], "x")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
