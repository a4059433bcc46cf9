"""The file of records of an evaluation: written as questions are done, read when it goes on.

A line holds what it takes to notice that it is not of this evaluation: the tokens of the prompt, how the completion
was sampled (`sampling`), and what it was scored with (`scored_with`). Completions of another prompt or of other
settings are refused; those that were scored with another function or another ground truth are scored again, without
being sampled.

Of several processes each fills a part, and the main one joins them.

What is not here: locks. Two evaluations must not write into one file.
"""

import glob
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import CellType, CodeType, FunctionType, MethodType
from typing import Any

from .. import __version__
from ..execution.images import image_hash, image_saver
from ..rewards.judge import last_user_text

_CONSTANTS = (type(None), bool, int, float, complex, str, bytes, type(Ellipsis))


def question_text(row: Mapping[str, Any]) -> str:
    """The question of a row: its column `question`, or what the user says last in the prompt."""
    return row.get("question") or last_user_text(row["prompt"])


def sampling_settings(agent: Any) -> dict[str, Any]:
    """What decides about the completions of an [`~evaluation.Agent`] besides the prompt, as JSON holds it."""
    config = getattr(agent.model, "config", None) or getattr(
        getattr(agent.model, "llm_engine", None), "model_config", None
    )
    served = getattr(agent.model, "name", None) if config is None else None  # by a server
    settings = {
        "model": getattr(config, "name_or_path", None) or getattr(config, "model", None) or served,
        "tool_protocol": type(agent.protocol).__name__,
        "tools": sorted(agent.tools),
        "max_completion_length": agent.limits.completion,
        "max_tool_calling_iterations": agent.limits.tool_turns,
        **agent.sampling,
        "chat_template_kwargs": agent.chat_template_kwargs,
    }
    return json.loads(json.dumps(settings, default=str))


def scoring_hashes(functions: Sequence[Callable], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """
    For each row a hash of what a score follows from besides the completion: the functions and the columns of the row.

    A function is known by its name, its code, that of the functions of its module that it calls, and the constants
    that it closes over or takes by default. This package's own are also known by its version.
    """
    seen: set[int] = set()
    identity = json.dumps([__version__, [_identity(function, seen) for function in functions]])
    hashes = []
    for row in rows:
        columns = sorted((name, value) for name, value in row.items() if name != "prompt")
        text = identity + json.dumps(columns, default=_as_json, skipkeys=True)
        hashes.append(hashlib.sha256(text.encode()).hexdigest()[:16])
    return hashes


def _as_json(value: Any) -> Any:
    if hasattr(value, "getpalette"):
        return image_hash(value)
    return value.tolist() if hasattr(value, "tolist") else type(value).__qualname__


def _identity(value: Any, seen: set[int]) -> Any:
    """What tells `value` apart between two runs: no addresses, no order of sets, nothing that a function changes."""
    if isinstance(value, _CONSTANTS):
        return repr(value)
    if isinstance(value, tuple):
        return [_identity(item, seen) for item in value]
    if isinstance(value, frozenset):
        return sorted(repr(item) for item in value)
    if isinstance(value, CodeType):
        return [value.co_code.hex(), _identity(value.co_consts, seen), value.co_names]
    if isinstance(value, partial):
        keywords = [[name, _identity(item, seen)] for name, item in sorted(value.keywords.items())]
        return [_identity(value.func, seen), _identity(value.args, seen), keywords]
    if isinstance(value, MethodType):
        return [_identity(value.__func__, seen), _instance(value.__self__, seen)]
    if isinstance(value, FunctionType):
        return _function(value, seen)
    return _instance(value, seen) if callable(value) else type(value).__qualname__


def _function(function: FunctionType, seen: set[int]) -> list[Any]:
    name = [function.__module__, function.__qualname__]
    if id(function) in seen:
        return name
    seen.add(id(function))
    used = [function.__globals__.get(name) for name in sorted(set(function.__code__.co_names))]
    own = [value for value in used if isinstance(value, _CONSTANTS) or _module(value) == function.__module__]
    closed = [_content(cell) for cell in function.__closure__ or ()]
    defaults = (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
    return [name, _identity(function.__code__, seen), *(_identity(item, seen) for item in (*own, *closed, *defaults))]


def _module(value: Any) -> str | None:
    return value.__module__ if isinstance(value, FunctionType) else None


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # nothing was put into it yet
        return None


def _instance(value: Any, seen: set[int]) -> list[Any]:
    """A callable object, by its class and the constants among its attributes."""
    kind = value if isinstance(value, type) else type(value)
    attributes = {} if isinstance(value, type) else getattr(value, "__dict__", {})
    constants = [[name, repr(item)] for name, item in sorted(attributes.items()) if isinstance(item, _CONSTANTS)]
    call = getattr(kind, "__call__", None)  # noqa: B004
    code = _identity(call, seen) if isinstance(call, FunctionType) else None
    return [kind.__module__, kind.__qualname__, getattr(value, "__name__", None), code, constants]


def resume(
    path: Path,
    rows: Sequence[Mapping[str, Any]],
    num_generations: int,
    sampling: Mapping[str, Any],
    tokenize: Callable[[Any], list[int]],
    scored_with: Sequence[str],
    fill_scores: Callable[[Sequence[dict], Sequence[Mapping[str, Any]]], None],
) -> dict[int, list[dict]]:
    """
    The questions that a file of records holds, by their index. What a killed run left half done is taken out of the
    file, what its processes had written into parts is put in, and completions without a score, or whose score is of
    another function or another row, are scored again.

    Args:
        path (`Path`): The file; it need not exist.
        rows (`Sequence[Mapping]`): The questions that are asked.
        num_generations (`int`): Completions for each.
        sampling (`Mapping`): [`sampling_settings`] of the agent.
        tokenize (`Callable`): Tokens of a prompt.
        scored_with (`Sequence[str]`): [`scoring_hashes`] of the rows.
        fill_scores (`Callable`): Scores records in place, given them and `rows`.

    Raises:
        ValueError: The file holds other questions, prompts or settings, more completions, or lines that are no
        records.
    """
    parts = _parts(path)
    if not path.exists() and not parts:
        return {}
    found, damaged = _read(path) if path.exists() else ({}, False)
    for part in parts:
        for index, group in _read(part)[0].items():
            if len(found.get(index, [])) < num_generations:  # else the parts were joined, and are still there
                found[index] = group
    kept = {index: group for index, group in found.items() if len(group) >= num_generations}
    asked = {index: group for index, group in kept.items() if index < len(rows)}
    for index, group in kept.items():
        if len(group) > num_generations:
            raise ValueError(
                f"{path} holds {len(group)} completions of a question, and num_generations is {num_generations}: "
                "evaluate into another file, or ask for as many as before."
            )
        if index in asked:
            _check_group(path, index, group, rows[index], sampling, tokenize)
    stale = [r for i in asked for r in asked[i] if r["score"] is None or r.get("scored_with") != scored_with[i]]
    if stale:
        fill_scores(stale, rows)
    if stale or damaged or parts or len(kept) < len(found):
        whole = path.with_suffix(".tmp")
        write_records(whole, [record for index in sorted(kept) for record in kept[index]], "w")
        os.replace(whole, path)
    for part in parts:
        part.unlink()
    return asked


def part_path(path: Path, process: int) -> Path:
    """The file that one of several processes fills."""
    return path.with_name(f"{path.name}.part-{process}")


def _parts(path: Path) -> list[Path]:
    return sorted(path.parent.glob(glob.escape(path.name) + ".part-*"))


def join_parts(path: Path, answered: Mapping[int, Sequence[dict]]) -> None:
    """Add what all processes have answered to the file, in the order of the questions, and delete their parts."""
    write_records(path, [record for index in sorted(answered) for record in answered[index]], "a")
    for part in _parts(path):
        part.unlink()


def _read(path: Path) -> tuple[dict[int, list[dict]], bool]:
    """The records of a file by question, and whether a line is half written."""
    found: dict[int, list[dict]] = {}
    *lines, rest = path.read_bytes().split(b"\n")
    damaged = bool(rest)  # the line that a killed run was writing
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):  # such a line with more behind it
            damaged = True
            continue
        if not _is_record(record):
            raise ValueError(
                f"{path}, line {number} is no record of an evaluation: evaluate into another file, or take the line "
                "out."
            )
        found.setdefault(record["prompt_index"], []).append(record)
    return found, damaged


def _is_record(record: Any) -> bool:
    keys = ("prompt_ids", "completion_ids", "tool_mask", "tool_calls", "truncated", "question", "completion", "score")
    index = record.get("prompt_index") if isinstance(record, dict) else None
    return type(index) is int and index >= 0 and all(key in record for key in keys)


def _check_group(
    path: Path,
    index: int,
    group: Sequence[dict],
    row: Mapping[str, Any],
    sampling: Mapping[str, Any],
    tokenize: Callable[[Any], list[int]],
) -> None:
    prompt_ids = tokenize(row["prompt"])
    for record in group:
        if record["question"] != question_text(row):
            raise ValueError(
                f"{path} holds other questions: number {index} was {record['question'][:80]!r}. Evaluate into another "
                "file, or delete this one."
            )
        if record["prompt_ids"] != prompt_ids:
            raise ValueError(
                f"{path} holds completions of another prompt to question number {index}: its system prompt, the chat "
                "template, the tools or the tokenizer were others. Evaluate into another file, or delete this one."
            )
        before = record.get("sampling") or {}  # absent in files of version 0.1.0
        changed = [name for name in before if before[name] != sampling.get(name)]
        if changed:
            told = ", ".join(f"{name} was {before[name]!r} and is {sampling.get(name)!r}" for name in changed)
            raise ValueError(f"{path} holds completions of other settings: {told}. Evaluate into another file.")


def write_records(path: Path, records: Sequence[dict], mode: str) -> None:
    """Write `records` as lines of JSON; `mode` is that of `open`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    saved = image_saver(path.parent / "images")
    with path.open(mode, encoding="utf-8") as file:
        file.write("".join(json.dumps(record, default=saved) + "\n" for record in records))
