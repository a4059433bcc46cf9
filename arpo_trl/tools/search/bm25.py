"""Search in a local collection of passages.

```python
from arpo_trl.tools.search import BM25Search

index = BM25Search.from_jsonl("corpus.jsonl", top_k=3)
trainer = ARPOTrainer(..., tools=[index.search])

index.save("index")  # and in another process, memory-mapped:
index = BM25Search.load("index")
```

[`BM25Search`] matches words; [`~arpo_trl.tools.search.dense.DenseSearch`] compares embeddings;
[`~arpo_trl.tools.search.dense.HybridSearch`] joins the two. All offer the same tool, `search`.

What this module does NOT do: stem words, cut text without spaces into words (Chinese, Japanese, Thai: use a dense
search), correct spelling, or change an index once it is built.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
from datasets import Dataset

from ...execution.options import tool
from .passages import (
    Passage,
    format_passages,
    iterate,
    load_passages,
    read_dataset,
    read_jsonl,
    read_parquet,
    save_passages,
    to_array,
)

try:
    import bm25s
    from bm25s.stopwords import STOPWORDS_EN
except ImportError as error:
    raise ImportError("Local search needs bm25s: pip install 'arpo-trl[search]'.") from error

_WORD = re.compile(r"\w+")
_STOPWORDS = frozenset(STOPWORDS_EN)


class PassageSearch:
    """What every local search shares: the passages, the readers, and the tool itself.

    A subclass says how it ranks (`rank`), what it saves beside the passages (`_save`), and how that is opened
    (`load`).

    Args:
        passages (`Sequence[str]` or `pa.Array`): Texts to search in.
        top_k (`int`): Passages that a search returns at most.
    """

    def __init__(self, passages: Sequence[str] | pa.Array, top_k: int = 3):
        if top_k < 1:
            raise ValueError(f"top_k must be at least 1, not {top_k}.")
        self.passages = to_array(passages)
        self.top_k = top_k

    @classmethod
    def from_jsonl(cls, path: str | PathLike, text_column: str = "contents", **kwargs: Any) -> Self:
        """Index a JSON Lines file, one passage a line under the key `text_column`."""
        return cls(read_jsonl(path, text_column), **kwargs)

    @classmethod
    def from_parquet(cls, path: str | PathLike, text_column: str = "contents", **kwargs: Any) -> Self:
        """Index a parquet file, one passage a row in the column `text_column`."""
        return cls(read_parquet(path, text_column), **kwargs)

    @classmethod
    def from_dataset(cls, dataset: Dataset, text_column: str = "contents", **kwargs: Any) -> Self:
        """Index a [`~datasets.Dataset`], one passage a row in the column `text_column`."""
        return cls(read_dataset(dataset, text_column), **kwargs)

    def save(self, directory: str | PathLike) -> None:
        """Write the index and its passages to a new directory, for `load` of the same class.

        Args:
            directory (`str` or `PathLike`): Must be empty or not exist: a process that has an index mapped into memory
                would crash if its files were written anew.
        """
        directory = Path(directory)
        if directory.exists() and any(directory.iterdir()):
            raise FileExistsError(f"{directory} is not empty; save the index to a new directory.")
        directory.mkdir(parents=True, exist_ok=True)
        self._save(directory)
        # last, as the sign that the save is complete
        save_passages(self.passages, directory)

    def _save(self, directory: Path) -> None:
        raise NotImplementedError

    def rank(self, query: str, top_k: int) -> list[tuple[int, float]]:
        """Find the passages that fit a query.

        Args:
            query (`str`): What to look for.
            top_k (`int`): How many passages at most.

        Returns:
            `list[tuple[int, float]]`: Positions and scores, best first; of equal scores the earlier passage first.
        """
        raise NotImplementedError

    def retrieve(self, query: str, top_k: int | None = None) -> list[Passage]:
        """Find the passages that fit a query, with their texts and scores.

        Args:
            query (`str`): What to look for.
            top_k (`int`, *optional*): How many passages at most; defaults to that of the index.

        Returns:
            `list[Passage]`: Best first.
        """
        if not isinstance(query, str):
            raise TypeError(f"query must be one string, not {type(query).__name__}; search once for each query.")
        found = self.rank(query, self.top_k if top_k is None else top_k)
        return [Passage(position, self.passages[position].as_py(), score) for position, score in found]

    @tool(deterministic=True)
    def search(self, query: str) -> str:
        """Search a collection of passages and return those that fit the query best.

        Args:
            query: What to look for, in a few words.

        Returns:
            The passages found, best first.
        """
        return format_passages(passage.text for passage in self.retrieve(query))


class BM25Search(PassageSearch):
    """Search by the words of the query, weighted by [BM25](https://dx.doi.org/10.1561/1500000019).

    Words are lower-cased runs of letters and digits without the commonest English function words. The index is
    [bm25s](https://huggingface.co/papers/2407.03618)'s.

    Args:
        passages (`Sequence[str]` or `pa.Array`): Texts to search in.
        top_k (`int`): Passages that a search returns at most.
        k1 (`float`): How soon repeating a word stops to count.
        b (`float`): How much long passages are held back, from 0 to 1.
    """

    def __init__(self, passages: Sequence[str] | pa.Array, top_k: int = 3, k1: float = 1.5, b: float = 0.75):
        super().__init__(passages, top_k)
        vocabulary: dict[str, int] = {}
        token_ids = [
            [vocabulary.setdefault(word, len(vocabulary)) for word in words(text)] for text in iterate(self.passages)
        ]
        if not vocabulary:
            raise ValueError("passages hold no word at all; there is nothing to index.")
        self._index = bm25s.BM25(k1=k1, b=b, backend="numpy")
        self._index.index((token_ids, vocabulary), show_progress=False)

    def rank(self, query: str, top_k: int) -> list[tuple[int, float]]:
        tokens = words(query)
        if not tokens:
            return []
        scores = self._index.get_scores(tokens)
        # a passage that shares no word with the query is no result
        return top_positions(scores, top_k, np.flatnonzero(scores))

    def _save(self, directory: Path) -> None:
        self._index.save(directory / "bm25", show_progress=False)

    @classmethod
    def load(cls, directory: str | PathLike, top_k: int = 3) -> Self:
        """Open a saved index, memory-mapped: processes on one machine share its pages.

        Args:
            directory (`str` or `PathLike`): What `save` wrote.
            top_k (`int`): Passages that a search returns at most.
        """
        search = cls.__new__(cls)
        PassageSearch.__init__(search, load_passages(directory), top_k)
        search._index = bm25s.BM25.load(Path(directory) / "bm25", mmap=True, show_progress=False)
        return search


def words(text: str) -> list[str]:
    """Cut a text into the words that BM25 counts."""
    return [word for word in _WORD.findall(text.lower()) if word not in _STOPWORDS]


def top_positions(scores: np.ndarray, top_k: int, candidates: np.ndarray) -> list[tuple[int, float]]:
    """Pick the highest scores, of equal ones the earlier.

    Args:
        scores (`np.ndarray`): Scores, shape (N,).
        top_k (`int`): How many at most.
        candidates (`np.ndarray`): Positions to choose from, ascending.

    Returns:
        `list[tuple[int, float]]`: Positions and scores, best first.
    """
    chosen = scores[candidates]
    if len(chosen) > top_k:
        # argpartition alone would keep any of the passages that are tied for the last place
        kept = chosen >= np.partition(chosen, -top_k)[-top_k]
        candidates, chosen = candidates[kept], chosen[kept]
    order = np.argsort(-chosen, kind="stable")[:top_k]
    return [(int(candidates[i]), float(chosen[i])) for i in order]
