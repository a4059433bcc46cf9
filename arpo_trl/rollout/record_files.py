"""
Files of rollout records: compressed lines of JSON, one a trajectory, which leave out what an earlier row of the group
has told (format: docs/records.md).

A row begins like the row that it left, or like the first of its group: their prompts are one, and a fork has the
tokens, segments and calls of its parent up to where it left, or further. [`shortened`] leaves that out, and the mask
that follows from the segments; [`whole`] puts it back. What the lists have in common is found by comparing them, so a
record comes back as it was.

What it does not do: it does not judge what it reads (`viewer/checks.py` does).
"""

import gzip
import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..execution.images import image_saver

Record = dict[str, Any]

# Lists of a record of which a later one need not repeat the beginning
_LISTS = ("prompt_ids", "completion_ids", "segments", "tool_calls")

# Of rows of 32k tokens, level 6 takes half as long again for 2 % less, and level 4 half as long for 5 % more
_LEVEL = 5


def shortened(records: Sequence[Record]) -> Iterator[Record]:
    """The records, in order, without what an earlier one of the same group holds; [`whole`] undoes it."""
    groups: dict[int, dict[int, Record]] = {}
    for record in records:
        earlier = groups.setdefault(record["prompt_index"], {})
        like = earlier.get(record["parent"]) or next(iter(earlier.values()), None)
        earlier[record["row"]] = record
        line = dict(record)
        if record["tool_mask"] == _mask(record):
            del line["tool_mask"]
        if like is not None:
            common = {name: _common(_beginning(like, name, record), record[name]) for name in _LISTS}
            line |= {name: record[name][count:] for name, count in common.items()}
            line["begins_like"] = {"row": like["row"], **common}
        yield line


def whole(line: Record, earlier: Mapping[int, Record]) -> Record:
    """
    A record with what was left out.

    Args:
        line (`dict[str, Any]`): A line's object.
        earlier (`Mapping[int, dict[str, Any]]`): The whole records of its group that stand before it, by `row`.

    Raises:
        ValueError: It says to begin like something that is not there.
    """
    record = dict(line)
    common = record.pop("begins_like", None)
    if common is not None:
        like = earlier.get(common["row"]) if isinstance(common, dict) and isinstance(common.get("row"), int) else None
        if like is None:
            raise ValueError("begins_like names no earlier row of the group")
        for name in _LISTS:
            count, known, rest = common.get(name), _beginning(like, name, record), record.get(name)
            if type(count) is not int or not 0 <= count <= len(known) or not isinstance(rest, list):
                raise ValueError(f"begins_like.{name} is not a number of items that row {common['row']} has")
            record[name] = known[:count] + rest
    if "tool_mask" not in record and {"completion_ids", "segments"} <= record.keys():
        try:
            record["tool_mask"] = _mask(record)
        except (TypeError, KeyError) as error:
            raise ValueError("it has no tool_mask, and its segments tell none") from error
    return record


def _mask(record: Record) -> list[int]:
    """The mask that follows from the segments: 1 in them, 0 in tool results."""
    size = len(record["completion_ids"])
    mask = [0] * size
    for segment in record["segments"]:
        start, end = segment["start"], min(segment["end"], size)
        mask[start:end] = [1] * (end - start)
    return mask


def _beginning(like: Record, name: str, record: Record) -> list[Any]:
    """A list of one record as another one may begin with it: calls that a fork shares say so."""
    if name != "tool_calls" or record.get("kind") != "fork":
        return like[name]
    return [{**call, "shared": True} for call in like[name]]


def _common(left: list[Any], right: list[Any]) -> int:
    """Items with which both begin. Halves are compared at once, since rows have thousands of tokens."""
    start, end = 0, min(len(left), len(right))
    while start < end:
        middle = (start + end + 1) // 2
        if left[start:middle] == right[start:middle]:
            start = middle
        else:
            end = middle - 1
    return start


def write_records(
    output_dir: str | os.PathLike, records: Sequence[Record], step: int, rank: int, world_size: int, append: bool
) -> None:
    """
    Write `records` to `<output_dir>/rollouts/step-<step>.jsonl.gz`, or to a file of this process's own if there are
    more.

    Without `append` what the file held goes, also one that an earlier version wrote: a run that was killed after its
    last checkpoint does the step once more.

    Records hold the prompts and whatever tools returned, which a push of the model should not publish by itself: the
    first one leaves a `.gitignore` in `output_dir`, unless there is one, by which the Hub leaves `rollouts/` out.

    Raises:
        `OSError`: the file cannot be written, for instance because the disk is full.
    """
    suffix = f"-rank{rank}" if world_size > 1 else ""
    path = Path(output_dir) / "rollouts" / f"step-{step:06d}{suffix}.jsonl.gz"
    path.parent.mkdir(parents=True, exist_ok=True)
    ignored = Path(output_dir) / ".gitignore"
    if rank == 0 and not ignored.exists():
        ignored.write_text("rollouts/\n", encoding="utf-8")
    saved = image_saver(path.parent / "images")
    lines = (json.dumps(record, default=saved, separators=(",", ":")) + "\n" for record in shortened(records))
    # Appended to a file, a compressed text goes on with what stands there
    compressed = gzip.compress("".join(lines).encode(), compresslevel=_LEVEL, mtime=0)
    with path.open("ab" if append else "wb") as file:
        file.write(compressed)
    if not append:
        path.with_suffix("").unlink(missing_ok=True)


def lines_of(path: Path) -> Iterator[bytes]:
    """
    Lines of a file of records, compressed or not. The last one of a file that was cut off is not whole.
    """
    if path.suffix != ".gz":
        with path.open("rb") as file:
            yield from file
        return
    with gzip.open(path, "rb") as file:
        rest = b""
        try:
            while piece := file.read1():
                *lines, rest = (rest + piece).split(b"\n")
                yield from lines
        except (EOFError, zlib.error, gzip.BadGzipFile):
            yield rest + b"\xff"  # no JSON, whatever the rest is
        else:
            yield rest
