"""Search by meaning: dense embeddings, alone or fused with BM25.

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("intfloat/e5-base-v2")
index = HybridSearch.from_jsonl(
    "corpus.jsonl",
    encoder=lambda texts: model.encode([f"passage: {text}" for text in texts]),
    query_encoder=lambda texts: model.encode([f"query: {text}" for text in texts]),
)
trainer = ARPOTrainer(..., tools=[index.search])
```

What this module does NOT do: approximate search. Every query is compared with every passage, one matrix-vector
product (4 bytes x passages x dimensions read per query); beyond a few million passages run a vector database behind
[`~arpo_trl.tools.search.http.RetrieveClient`].
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path
from typing import Self

import numpy as np
import pyarrow as pa

from .bm25 import BM25Search, PassageSearch, top_positions
from .passages import iterate, load_passages

Encoder = Callable[[list[str]], np.ndarray]

# passages handed to the encoder at once; it may cut them further
_ENCODE_BATCH = 1024


class DenseSearch(PassageSearch):
    """Search by the cosine of embeddings.

    Args:
        passages (`Sequence[str]` or `pa.Array`): Texts to search in.
        encoder (`Callable[[list[str]], np.ndarray]`): Makes one vector of each text, shape (n, d); for instance the
            `encode` of a `SentenceTransformer`. Called by one thread at a time.
        top_k (`int`): Passages that a search returns at most.
        query_encoder (`Callable[[list[str]], np.ndarray]`, *optional*): Encodes queries, for models that treat them
            differently; defaults to `encoder`.
    """

    def __init__(
        self,
        passages: Sequence[str] | pa.Array,
        encoder: Encoder,
        top_k: int = 3,
        query_encoder: Encoder | None = None,
    ):
        super().__init__(passages, top_k)
        batches, batch = [], []
        for text in iterate(self.passages):
            batch.append(text)
            if len(batch) == _ENCODE_BATCH:
                batches.append(encode(encoder, batch))
                batch = []
        if batch:
            batches.append(encode(encoder, batch))
        self._set(np.concatenate(batches), query_encoder or encoder)

    def _set(self, embeddings: np.ndarray, query_encoder: Encoder) -> None:
        self._embeddings = embeddings
        self._query_encoder = query_encoder
        self._encoding = threading.Lock()

    def rank(self, query: str, top_k: int) -> list[tuple[int, float]]:
        with self._encoding:
            vector = encode(self._query_encoder, [query])[0]
        if vector.shape[0] != self._embeddings.shape[1]:
            raise ValueError(
                f"The encoder gives {vector.shape[0]} dimensions and the index has {self._embeddings.shape[1]}; "
                "use the encoder that the index was built with."
            )
        return top_positions(self._embeddings @ vector, top_k, np.arange(len(self._embeddings)))

    def _save(self, directory: Path) -> None:
        np.save(directory / "embeddings.npy", self._embeddings)

    @classmethod
    def load(
        cls, directory: str | PathLike, encoder: Encoder, top_k: int = 3, query_encoder: Encoder | None = None
    ) -> Self:
        """Open a saved index, memory-mapped.

        Args:
            directory (`str` or `PathLike`): What `save` wrote.
            encoder, top_k, query_encoder: As in the constructor; the encoder is not saved.
        """
        search = cls.__new__(cls)
        PassageSearch.__init__(search, load_passages(directory), top_k)
        search._set(np.load(Path(directory) / "embeddings.npy", mmap_mode="r"), query_encoder or encoder)
        return search


class HybridSearch(PassageSearch):
    """Search by words and by meaning, fused by [reciprocal rank](https://dl.acm.org/doi/10.1145/1571941.1572114).

    A passage at rank r of one of the two lists gets 1 / (60 + r) from it; passages are ordered by the sum.

    Args:
        passages (`Sequence[str]` or `pa.Array`): Texts to search in.
        encoder, query_encoder: As in [`DenseSearch`].
        top_k (`int`): Passages that a search returns at most.
        depth (`int`): Length of the two lists that are fused, if that is more than `top_k`.
    """

    def __init__(
        self,
        passages: Sequence[str] | pa.Array,
        encoder: Encoder,
        top_k: int = 3,
        query_encoder: Encoder | None = None,
        depth: int = 100,
    ):
        super().__init__(passages, top_k)
        self._parts = (BM25Search(self.passages), DenseSearch(self.passages, encoder, query_encoder=query_encoder))
        self.depth = depth

    def rank(self, query: str, top_k: int) -> list[tuple[int, float]]:
        return reciprocal_rank_fusion([part.rank(query, max(self.depth, top_k)) for part in self._parts])[:top_k]

    def _save(self, directory: Path) -> None:
        for part in self._parts:
            part._save(directory)

    @classmethod
    def load(
        cls,
        directory: str | PathLike,
        encoder: Encoder,
        top_k: int = 3,
        query_encoder: Encoder | None = None,
        depth: int = 100,
    ) -> Self:
        """Open a saved index, memory-mapped.

        Args:
            directory (`str` or `PathLike`): What `save` wrote.
            encoder, top_k, query_encoder, depth: As in the constructor; the encoder is not saved.
        """
        search = cls.__new__(cls)
        PassageSearch.__init__(search, load_passages(directory), top_k)
        search._parts = (
            BM25Search.load(directory),
            DenseSearch.load(directory, encoder, query_encoder=query_encoder),
        )
        search.depth = depth
        return search


def reciprocal_rank_fusion(rankings: Sequence[list[tuple[int, float]]], k: int = 60) -> list[tuple[int, float]]:
    """Fuse rankings: a position scores the sum of 1 / (k + rank) over the rankings that hold it, ranks from 1.

    Args:
        rankings (`Sequence[list[tuple[int, float]]]`): Positions and scores, best first; only the order counts.
        k (`int`): How little the first ranks stand out.

    Returns:
        `list[tuple[int, float]]`: Positions and fused scores, best first; of equal scores the lower position first.
    """
    fused: dict[int, float] = {}
    for ranking in rankings:
        for rank, (position, _) in enumerate(ranking, 1):
            fused[position] = fused.get(position, 0.0) + 1 / (k + rank)
    return sorted(fused.items(), key=lambda item: (-item[1], item[0]))


def encode(encoder: Encoder, texts: list[str]) -> np.ndarray:
    """Encode texts into unit vectors.

    Args:
        encoder (`Callable[[list[str]], np.ndarray]`): Makes one vector of each text.
        texts (`list[str]`): Texts.

    Returns:
        `np.ndarray`: Vectors of length 1 (0 for a text that the encoder maps to 0), shape (n, d), float32.
    """
    vectors = np.asarray(encoder(texts), dtype=np.float32)
    if vectors.ndim != 2 or len(vectors) != len(texts):
        raise ValueError(f"encoder must return an array of shape ({len(texts)}, d), not {vectors.shape}.")
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(norms > 0, norms, 1)
