"""Replay of recorded web searches: training without a network, a bill, or results that change from run to run.

What this module does NOT do: understand a query. "Who directed X" and "X film director" are near; a synonym, another
language, or a misspelt name is not.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from os import PathLike

from ...execution.options import tool
from .bm25 import BM25Search, words
from .passages import NO_RESULTS


class ReplaySearch:
    """Answers a query with what was recorded for it, or for the nearest recorded query.

    The nearest query is sought with BM25 and accepted by similarity: the words that the two queries share over the
    words that either has, each word weighted by its inverse document frequency over the recorded queries. So "Who
    directed X?" is far from "Who directed Y?", although most of their words agree.

    Args:
        recorded (`Mapping[str, str]`): Results by query.
        min_similarity (`float`): Least similarity, from 0 to 1, at which another query's results are given; the result
            then names that query. At 1 the words must be the same, in any order and case.

    Example:

    ```python
    search = ReplaySearch.from_json("search_cache.json")
    trainer = ARPOTrainer(..., tools=[search.search])
    ```
    """

    def __init__(self, recorded: Mapping[str, str], min_similarity: float = 0.7):
        if not 0 < min_similarity <= 1:
            raise ValueError(f"min_similarity must be above 0 and at most 1, not {min_similarity}.")
        bad = [query for query, text in recorded.items() if not isinstance(query, str) or not isinstance(text, str)]
        if bad:
            raise ValueError(f"recorded must map queries to result texts; the entry of {bad[0]!r} does not.")
        self.recorded = {query.strip(): text for query, text in recorded.items()}
        self.min_similarity = min_similarity
        queries = list(self.recorded)
        # ten candidates: BM25 knows nothing of the words that a recorded query has beyond those asked for
        self._index = BM25Search(queries, top_k=10)
        self._counts = Counter(word for query in queries for word in set(words(query)))

    @classmethod
    def from_json(cls, path: str | PathLike, min_similarity: float = 0.7) -> ReplaySearch:
        """Read recorded searches from a JSON file, `{query: "Page 1: ...\\nPage 2: ..."}`."""
        with open(path, encoding="utf-8") as file:
            recorded = json.load(file)
        if not isinstance(recorded, dict):
            raise ValueError(f"{path} holds a {type(recorded).__name__}; expected an object of texts by query.")
        return cls(recorded, min_similarity)

    def similarity(self, query: str, other: str) -> float:
        """Share of the words of two queries that they have in common, weighted by how rare the words are."""
        a, b = set(words(query)), set(words(other))
        union = sum(map(self._weight, a | b))
        return sum(map(self._weight, a & b)) / union if union else 0.0

    def nearest(self, query: str) -> tuple[str, float] | None:
        """Find the recorded query nearest to a query, however far.

        Args:
            query (`str`): The query.

        Returns:
            `tuple[str, float]` or `None`: The recorded query and its similarity; `None` if none shares a word.
        """
        candidates = [passage.text for passage in self._index.retrieve(query)]
        scored = [(candidate, self.similarity(query, candidate)) for candidate in candidates]
        return max(scored, key=lambda pair: pair[1], default=None)

    @tool(deterministic=True)
    def search(self, query: str) -> str:
        """Search the web and return the pages that fit the query best.

        Args:
            query: What to look for, in a few words.

        Returns:
            Excerpts of the pages found, best first.
        """
        if isinstance(query, str) and query.strip() in self.recorded:
            return self.recorded[query.strip()]
        nearest = self.nearest(query)
        # a miss is an answer and not an error: the same query will miss again, and real searches find nothing at times
        if nearest is None or nearest[1] < self.min_similarity:
            return NO_RESULTS
        return f'Results for "{nearest[0]}":\n{self.recorded[nearest[0]]}'

    def _weight(self, word: str) -> float:
        n, count = len(self.recorded), self._counts[word]
        return math.log(1 + (n - count + 0.5) / (count + 0.5))
