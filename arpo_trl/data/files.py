"""Rows of local files, and data sets made of them: JSON lines, JSON, parquet and CSV, each value as it is written.

`datasets` reads JSON into columns of one type, and makes numbers of the texts in a column where types are mixed ("004"
becomes 4). Here a value keeps its type, and a file that is damaged is one error that says where.

What is not here: files that do not fit into memory.
"""

import csv
import io
import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow.parquet
from datasets import Dataset

from ..rewards.completions import ANSWER_COLUMNS, accepted_answers

Row = dict[str, Any]

SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")

_SURROGATE = re.compile(r"[\ud800-\udfff]")


def read_rows(path: str | Path) -> list[Row]:
    """
    The rows of a file.

    Args:
        path (`str` or `Path`): A .jsonl, .json (a list of objects, or JSON lines), .parquet or .csv file. Text is
            UTF-8, with or without a byte order mark. Half of a surrogate pair, which no tokenizer takes, becomes
            U+FFFD.

    Returns:
        `list[dict]`: The rows. Those of a .csv file hold texts alone.

    Raises:
        ValueError: The file is damaged, or of another kind than its suffix says.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path} has the unknown suffix {path.suffix!r}: use one of {', '.join(SUFFIXES)}.")
    try:
        if path.suffix == ".parquet":
            return _parquet(path)
        text = _text(path)
        rows = _csv(text, path) if path.suffix == ".csv" else _json_rows(text, path)
        # a row of JSON may hold an escape of one half, which the raw text does not show
        return [_whole(row) for row in rows] if re.search(r"\\u[dD][89a-fA-F]", text) else rows
    except RecursionError as error:
        raise ValueError(f"{path} is nested too deep to be read.") from error


def place_of(path: str | Path, row: int) -> str:
    """Where a row of a file is, for messages: its line where a row is one, else its number."""
    path = Path(path)
    if path.suffix in (".jsonl", ".json") and path.is_file():
        lines = [number for number, line in enumerate(_text(path).split("\n"), start=1) if line.strip()]
        if not _is_list(_text(path), path) and row < len(lines):
            return f"{path}, line {lines[row]}"
    return f"{path}, row {row}"


def convert_rows(convert: Callable[[Any], Any], rows: Iterable[Any], path: str | Path) -> list[Any]:
    """Every row converted; an error says which row it is about."""
    converted = []
    for place, row in enumerate(rows):
        try:
            converted.append(convert(row))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{place_of(path, place)}: {error}") from error
    return converted


def to_dataset(rows: list[dict[str, Any]], path: str | Path) -> Dataset:
    """
    Rows as a dataset.

    Args:
        rows (`list[dict]`): Rows of [`read_rows`]; ground truths (`answer`, `solution`, `ground_truth`) in any shape
            that [`~rewards.completions.accepted_answers`] reads.
        path (`str` or `Path`): Where they are from, for messages.

    Returns:
        `Dataset`: The rows. A column has one type: ground truths that are not all text become text, or lists of text
        where some row has several. "004" stays "004".

    Raises:
        `ValueError`: A ground truth does not tell its answers, or another column has several types.
    """
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = {name: [row.get(name) for row in rows] for name in names}
    truths = next((name for name in ANSWER_COLUMNS if name in columns), "")  # the one that reward functions read
    if any(not isinstance(value, str | None) for value in columns.get(truths, [])):
        answers = convert_rows(accepted_answers, columns[truths], path)
        several = any(map(holds_several, columns[truths]))
        columns[truths] = answers if several else [own[0] if own else None for own in answers]
    if any(isinstance(index, str) for index in columns.get("index", [])):  # DAPO's are texts, others numbers
        columns["index"] = [None if index is None else str(index) for index in columns["index"]]
    arrays = {}
    for name, values in columns.items():
        try:
            arrays[name] = pyarrow.array(values, from_pandas=False)
        except (pyarrow.ArrowException, OverflowError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(
                f"{path}: the values of the column `{name}` are not of one type that a data set can hold ({error}). "
                "Make them so, or take the column out."
            ) from error
    return Dataset(pyarrow.table(arrays))


def holds_several(truth: Any) -> bool:
    """Whether a ground truth is a list or a dict, also where that holds one answer."""
    return not isinstance(truth, str) and (isinstance(truth, Iterable) or getattr(truth, "ndim", 0) > 0)


def _text(path: Path) -> str:
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {line} is no UTF-8 text ({error.reason}): save the file as UTF-8.") from error


def _parquet(path: Path) -> list[Row]:
    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError, TypeError, OverflowError, MemoryError) as error:
        raise ValueError(f"{path} is no parquet file that can be read: {error} Write it again.") from error


def _csv(text: str, path: Path) -> list[Row]:
    limit = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # of the whole process: put back below
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""))
        rows = []
        for row in reader:
            if None in row:
                raise ValueError(
                    f"{path}, line {reader.line_num} has more fields than the header: put quotes around a field that "
                    "holds a comma."
                )
            rows.append(row)
        return rows
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num} is no CSV: {error}") from error
    finally:
        csv.field_size_limit(limit)


def _is_list(text: str, path: Path) -> bool:
    return path.suffix == ".json" and text.lstrip().startswith("[")


def _json_rows(text: str, path: Path) -> list[Row]:
    if _is_list(text, path):
        rows = _json(text, f"{path}")
        places = [f"{path}, row {row}" for row in range(len(rows))]
    else:
        # not `splitlines`, which also cuts at the line separators that JSON allows inside a string
        lines = [(f"{path} line {n}", line) for n, line in enumerate(text.split("\n"), start=1) if line.strip()]
        rows = [_json(line, where) for where, line in lines]
        places = [where for where, _ in lines]
    for where, row in zip(places, rows, strict=True):
        if not isinstance(row, dict):
            raise ValueError(f"{path} must hold one JSON object a row; {where} is {str(row)[:60]!r}.")
    return rows


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where} is no JSON: {error}") from error


def _whole(value: Any) -> Any:
    """`value` without halves of surrogate pairs."""
    if isinstance(value, str):
        return _SURROGATE.sub("\ufffd", value)
    if isinstance(value, dict):
        return {_whole(key): _whole(item) for key, item in value.items()}
    return [_whole(item) for item in value] if isinstance(value, list) else value
