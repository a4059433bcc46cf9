"""Passages to search in: reading them, keeping them on disk, and showing them to a model.

Passages are kept as one Arrow array: compact in memory, and memory-mapped from disk, so that several processes on a
machine share one copy.

What this module does NOT do: cut documents into passages, or clean their text.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet
from datasets import Dataset

NO_RESULTS = "No results found."

_FILE = "passages.arrow"


class Passage(NamedTuple):
    """A passage that a search found.

    Args:
        position (`int`): Its place in the collection, from 0.
        text (`str`): Its text.
        score (`float`): How well it fits the query; the scale depends on the search.
    """

    position: int
    text: str
    score: float


def format_passages(texts: Iterable[str]) -> str:
    """Write passages as the model reads them: `Page 1: ...`, `Page 2: ...`, best first.

    Args:
        texts (`Iterable[str]`): Texts of the passages, best first.

    Returns:
        `str`: One numbered paragraph a passage, or a sentence that says that there is none.
    """
    return "\n".join(f"Page {i}: {text}" for i, text in enumerate(texts, 1)) or NO_RESULTS


def to_array(passages: Sequence[str] | pa.Array | pa.ChunkedArray, name: str = "passages") -> pa.LargeStringArray:
    """Keep passages as one Arrow array.

    Args:
        passages (`Sequence[str]`, `pa.Array` or `pa.ChunkedArray`): Texts; at least one, none of them null.
        name (`str`): What to call them in an error.

    Returns:
        `pa.LargeStringArray`: The same texts.

    Raises:
        ValueError: If there are none, or one is not a string.
    """
    if isinstance(passages, str):
        raise ValueError(f"{name} must be a sequence of strings, not one string; read a file with `from_jsonl`.")
    if isinstance(passages, pa.ChunkedArray):
        if not (pa.types.is_string(passages.type) or pa.types.is_large_string(passages.type)):
            raise ValueError(f"{name} holds {passages.type}; name a column of strings as text_column.")
        # before they are put together: an array of plain strings overflows at 2 GiB
        passages = passages.cast(pa.large_string()).combine_chunks()
    elif not isinstance(passages, pa.LargeStringArray):
        try:
            passages = pa.array(passages, pa.large_string())
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise ValueError(f"{name} must be a sequence of strings: {error}") from None
    if passages.null_count:
        raise ValueError(f"{name} holds {passages.null_count} nulls; drop those rows first.")
    if not len(passages):
        raise ValueError(f"{name} is empty; a search needs at least one passage.")
    return passages


def iterate(passages: pa.LargeStringArray) -> Iterator[str]:
    """Go through the texts, a batch at a time: fast, and never all in memory as Python strings."""
    for start in range(0, len(passages), 10_000):
        yield from passages[start : start + 10_000].to_pylist()


def read_jsonl(path: str | PathLike, text_column: str = "contents") -> pa.LargeStringArray:
    """Read one passage from each line of a JSON Lines file.

    Args:
        path (`str` or `PathLike`): The file.
        text_column (`str`): Key that holds the text. The default is that of the corpora published with Search-R1.

    Returns:
        `pa.LargeStringArray`: The texts, in the order of the file.
    """
    texts = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number} is not JSON: {error}") from None
            if not isinstance(row, dict) or not isinstance(row.get(text_column), str):
                keys = list(row) if isinstance(row, dict) else type(row).__name__
                raise ValueError(
                    f"{path}, line {number} has no string under text_column={text_column!r}; it has {keys}."
                )
            texts.append(row[text_column])
    return to_array(texts, str(path))


def read_parquet(path: str | PathLike, text_column: str = "contents") -> pa.LargeStringArray:
    """Read one passage from each row of a parquet file.

    Args:
        path (`str` or `PathLike`): The file.
        text_column (`str`): Column that holds the text.

    Returns:
        `pa.LargeStringArray`: The texts, in the order of the file.
    """
    columns = pyarrow.parquet.read_schema(path).names
    _check_column(path, text_column, columns)
    return to_array(pyarrow.parquet.read_table(path, columns=[text_column])[text_column], f"{path}[{text_column!r}]")


def read_dataset(dataset: Dataset, text_column: str = "contents") -> pa.LargeStringArray:
    """Take one passage from each row of a dataset.

    Args:
        dataset ([`~datasets.Dataset`]): The dataset.
        text_column (`str`): Column that holds the text.

    Returns:
        `pa.LargeStringArray`: The texts, in the order of the dataset.
    """
    _check_column("the dataset", text_column, dataset.column_names)
    # through the Arrow format, and not `dataset.data`, so that a selection or a shuffle is honoured
    table = dataset.select_columns(text_column).with_format("arrow")[:]
    return to_array(table[text_column], f"dataset[{text_column!r}]")


def _check_column(source: str | PathLike, text_column: str, columns: Sequence[str]) -> None:
    if text_column not in columns:
        raise ValueError(f"{source} has no column text_column={text_column!r}; it has {list(columns)}.")


def save_passages(passages: pa.LargeStringArray, directory: str | PathLike) -> None:
    """Write passages to `<directory>/passages.arrow`, for [`load_passages`]."""
    table = pa.table({"text": passages})
    with pa.OSFile(str(Path(directory) / _FILE), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


def load_passages(directory: str | PathLike) -> pa.LargeStringArray:
    """Map what [`save_passages`] wrote into memory, without reading it.

    Raises:
        FileNotFoundError: If there is none, which is also what an interrupted save leaves.
    """
    path = Path(directory) / _FILE
    if not path.is_file():
        raise FileNotFoundError(f"{directory} holds no saved index (no {_FILE}); build one and save it there.")
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()["text"].chunk(0)
