"""From records to the page.

Every step's trees are one gzipped, base64-encoded block that the page unpacks when it is looked at, so a page of
thousands of trajectories opens as fast as one of ten, and no byte of a record is ever parsed as HTML. A
Content-Security-Policy lets the page's own script and style in by their hashes, and nothing else.

What it does not do: it does not shorten texts.
"""

import base64
import gzip
import hashlib
import html
import json
import math
import os
import re
from collections.abc import Iterable, Iterator
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from string import Template
from typing import Any

from ..execution.images import images_of
from ..rollout.record import call_kind
from .records import Row, find_benchmarks, find_steps, group_rows, question_groups, read_file, step_metrics

MAX_TRAJECTORIES = 20_000
IMAGE_BYTES = 64 << 20
"""Bytes of image files that a page holds."""
QUESTIONS = 250
"""Questions of a benchmark that are looked at together, as the groups of a training step are."""

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
_FRAME_ENDS, _FRAME_STARTS = re.compile(r"[\n>\]]|^\w{1,20}: ", re.MULTILINE), re.compile(r"[\n<\[]")
_HASH = re.compile("[0-9a-f]{64}")
_HEAD = 60  # characters of a result by which it is found in what the model read


def render(run_dir: str | Path, tokenizer: Any = None, max_trajectories: int = MAX_TRAJECTORIES) -> str:
    """
    Make the page of a run.

    Args:
        run_dir (`str` or `Path`):
            `output_dir` of a run with `log_rollouts=True`, or of `examples/evaluate.py`. Where a run has both rollouts
            and `records/` of evaluations, the page has the rollouts, and that of `run_dir/records` the evaluations.
        tokenizer (`str`, `Path` or tokenizer, *optional*):
            Decodes the token ids. By default the one saved in `run_dir` or in its last checkpoint; where there is
            none, the page shows token ids.
        max_trajectories (`int`, *optional*, defaults to `20000`):
            Trees are kept for evenly spaced steps, up to about this many trajectories. Metrics cover every step.

    Returns:
        `str`: HTML that needs nothing else.

    Raises:
        FileNotFoundError: If `run_dir` has no records.
        ValueError: If a file holds something else, or nothing could be read.
    """
    run_dir = Path(run_dir)
    if max_trajectories < 1:
        raise ValueError(f"max_trajectories={max_trajectories} must be at least 1.")
    decoder = _load_tokenizer(run_dir, tokenizer)
    notes: list[str] = []
    overview: list[dict] = []
    blocks: list[tuple[str, list[dict]]] = []
    read_steps = _evaluation_steps if find_benchmarks(run_dir) else _training_steps
    for step, name, kept, groups in read_steps(run_dir, max_trajectories, notes):
        has_tree = kept or not blocks  # the first step may be an empty file
        overview.append({"step": step, "name": name, "tree": has_tree, "metrics": step_metrics(groups)})
        if has_tree:
            blocks.append((f"step-{step}", [_group(group, decoder) for group in groups]))
    if not overview:
        raise ValueError(f"run_dir={str(run_dir)!r}: no rollout record could be read. {' '.join(notes)}")
    if len(blocks) < len(overview):
        notes.append(
            f"Trees of {len(blocks)} evenly spaced steps out of {len(overview)}: the run has more trajectories than "
            f"max_trajectories={max_trajectories}."
        )
    if decoder is None:
        notes.append("No tokenizer in the run dir: token ids are shown instead of text. Give one with --tokenizer.")

    shown = [group for _, groups in blocks for group in groups]
    _add_previews(shown)
    index = {"notes": notes, "steps": overview, "scales": _scales(shown), "images": _images(run_dir, shown, notes)}
    return _assemble(run_dir.resolve().name, [("index", index), *blocks])


def show(run_dir: str | Path, tokenizer: Any = None, height: int = 840) -> None:
    """
    Show the page of a run in a notebook's output.

    Args:
        run_dir (`str` or `Path`):
            As for [`render`].
        tokenizer (`str`, `Path` or tokenizer, *optional*):
            As for [`render`].
        height (`int`, *optional*, defaults to `840`):
            Height in pixels.
    """
    from IPython.display import display

    page = html.escape(render(run_dir, tokenizer))
    # `sandbox` without `allow-same-origin`: the page cannot reach the notebook around it
    style = f"width: 100%; height: {height}px; border: 1px solid #8888"
    frame = f'<iframe sandbox="allow-scripts" title="Rollouts" style="{style}" srcdoc="{page}"></iframe>'
    display({"text/html": frame, "text/plain": f"rollouts of {run_dir}"}, raw=True)


def _load_tokenizer(run_dir: Path, tokenizer: Any) -> Any:
    """The tokenizer given, loaded if it is a name; else the one of the run or of its last checkpoint; else `None`."""
    if tokenizer is None:
        checkpoints = sorted(run_dir.glob("checkpoint-*"), key=lambda path: path.stat().st_mtime, reverse=True)
        folders = (run_dir, run_dir.parent, *checkpoints) if run_dir.name == "rollouts" else (run_dir, *checkpoints)
        tokenizer = next((f for f in folders if any((f / name).is_file() for name in _TOKENIZER_FILES)), None)
    if isinstance(tokenizer, str | Path):
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(tokenizer)
        except Exception as error:  # an OSError, a ValueError, or what `tokenizers` raises of a file that is cut off
            raise ValueError(f"tokenizer={str(tokenizer)!r} could not be loaded: {error}") from error
    return tokenizer


Step = tuple[int, str, bool, list[list[Row]]]
"""Number and name of what is looked at together, whether its trees are kept, and its groups."""


def _training_steps(run_dir: Path, max_trajectories: int, notes: list[str]) -> Iterator[Step]:
    """The steps of a training run."""
    steps = find_steps(run_dir)
    kept = _steps_with_trees(steps, max_trajectories)
    for step, paths in steps.items():
        groups = group_rows([_read(path, notes) for path in paths])
        if groups:
            yield step, f"step {step}", step in kept, groups


def _evaluation_steps(run_dir: Path, max_trajectories: int, notes: list[str]) -> Iterator[Step]:
    """The benchmarks of an evaluation, long ones in parts."""
    files = find_benchmarks(run_dir)
    stride = _stride(files, max_trajectories)
    step = 0
    for path in files:
        groups = question_groups(_read(path, notes))
        for start in range(0, len(groups), QUESTIONS):
            part = groups[start : start + QUESTIONS]
            name = path.stem if len(groups) <= QUESTIONS else f"{path.stem} {start + 1}–{start + len(part)}"
            yield step, name, step % stride == 0, part
            step += 1


def _read(path: Path, notes: list[str]) -> list[Row]:
    rows, skipped = read_file(path)
    if skipped:
        notes.append(f"{path.name}: {skipped} line{'s' * (skipped > 1)} skipped, not whole (a killed run leaves one).")
    return rows


def _steps_with_trees(steps: dict[int, list[Path]], max_trajectories: int) -> set[int]:
    """Evenly spaced steps, the first and the last among them, whose records stay within `max_trajectories`."""
    stride = _stride((path for paths in steps.values() for path in paths), max_trajectories)
    names = list(steps)
    return {*names[::stride], names[-1]}


def _stride(paths: Iterable[Path], max_trajectories: int) -> int:
    """Of how many steps one is kept, so that the trajectories of all that are kept stay within `max_trajectories`."""
    return -(-sum(path.read_bytes().count(b"\n") for path in paths) // max_trajectories) or 1  # ceiling


def _group(rows: list[Row], tokenizer: Any) -> dict:
    """One group as the page draws it: the prompt once, and for each row the pieces that it does not share."""
    present = {row["row"] for row in rows}
    starts = [row["fork_token"] if row["kind"] == "fork" and row["parent"] in present else 0 for row in rows]
    spans = [_spans(row, start) for row, start in zip(rows, starts, strict=True)]
    ids = [row["completion_ids"][s:e] for row, own in zip(rows, spans, strict=True) for s, e, _ in own]
    prompt, *decoded = _decode([rows[0]["prompt_ids"], *ids], tokenizer)
    texts = iter(decoded)
    asked = {}
    if "question" in rows[0]:
        answer = rows[0].get("answer")
        accepted = answer if isinstance(answer, list) else [answer] if answer is not None else None
        asked = {key: rows[0][key] for key in ("prompt_index", "question")}
        asked["answer"] = accepted and [_text(each) for each in accepted]
    return asked | {
        "example": next((row["example"] for row in rows if row.get("example")), None),
        "prompt": prompt,
        "prompt_tokens": len(rows[0]["prompt_ids"]),
        "images": _prompt_images(rows[0]),
        "rows": [
            {
                "row": row["row"],
                "kind": row["kind"],
                "parent": row["parent"] if start else None,
                "fork": start,
                "length": len(row["completion_ids"]),
                "truncated": row["truncated"],
                "out_of_turns": row.get("out_of_turns"),
                "rewards": row["rewards"],
                "advantage": row["advantage"],
                "shared_advantages": row["shared_advantages"],
                "prediction": None if row.get("prediction") is None else _text(row["prediction"]),
                "parts": _parts(row, own, [next(texts) for _ in own], start),
            }
            for row, own, start in zip(rows, spans, starts, strict=True)
        ],
    }


def _spans(row: Row, start: int) -> list[tuple[int, int, dict | None]]:
    """`(start, end, segment)` of all pieces from token `start` on; the gaps between segments belong to tools."""
    ends = [(0, 0, None), *((s["start"], s["end"], s) for s in row["segments"])]
    ends.append((len(row["completion_ids"]), len(row["completion_ids"]), None))
    spans = []
    for (_, gap_start, _), following in pairwise(ends):
        if following[0] > gap_start:
            spans.append((gap_start, following[0], None))
        if following[2] is not None:
            spans.append(following)
    return [span for span in spans if span[0] >= start]


def _parts(row: Row, spans: list, texts: list[str], start: int) -> list[dict]:
    """The row's own pieces: model segments with their readings, tool results with their calls."""
    calls = [call for call in row["tool_calls"] if not (start and call["shared"])]
    gaps = [text for (_, _, segment), text in zip(spans, texts, strict=True) if segment is None]
    placed, unread = _place_calls(calls, gaps)
    results = iter(placed)
    parts = []
    for (begin, end, segment), text in zip(spans, texts, strict=True):
        part = {"start": begin, "end": end, "text": text}
        if segment is None:
            parts.append(part | {"kind": "tool", "calls": [_call(call) for call in next(results)]})
            continue
        readings = {
            "kind": "model",
            "entropy": segment["entropy"],
            "gap": segment["entropy_gap"],
            "probability": segment["branch_probability"],
            "forks": segment["forks"],
        }
        parts.append(part | readings)
    if unread:
        end = len(row["completion_ids"])
        parts.append({"kind": "tool", "start": end, "end": end, "text": "", "calls": [_call(call) for call in unread]})
    return parts


def _place_calls(calls: list[dict], gaps: list[str]) -> tuple[list[list[dict]], list[dict]]:
    """
    Which stretch of tool tokens answers which calls; a record keeps no more than the order of both.

    One call a stretch is the rule. Where a turn made several, they are found by how their results begin. The second
    list holds the calls that no stretch is left for: the row ended before it could read them.
    """
    if len(calls) == len(gaps):
        return [[call] for call in calls], []
    placed: list[list[dict]] = [[] for _ in gaps]
    unread = []
    gap = position = 0
    for call in calls:
        head = _text(call["result"]).removeprefix("<image>\n")[:_HEAD].strip()
        for candidate in range(gap, len(gaps)):
            found = gaps[candidate].find(head, position if candidate == gap else 0) if head else -1
            if found >= 0:
                gap, position = candidate, found + len(head)
                break
        else:
            gap, position = next((index for index in range(gap, len(gaps)) if not placed[index]), len(gaps)), 0
        if gap < len(gaps):
            placed[gap].append(call)
        else:
            unread.append(call)
    return placed, unread


def _call(call: dict) -> dict:
    """A call as the page shows it."""
    keys = ("name", "arguments", "error", "seconds")
    shown = {"kind": call_kind(call), "result": _text(call["result"]), "images": _hashes(images_of(call["result"]))}
    return {key: call[key] for key in keys} | shown


def _hashes(values: Any) -> list[str]:
    """The hashes of images among some values."""
    return [value for value in values if isinstance(value, str) and _HASH.fullmatch(value)]


def _prompt_images(row: Row) -> list[str]:
    """Hashes of the images of a prompt: a row's images but those of its results."""
    images = _hashes(row.get("images") or [])
    read = [image for call in row["tool_calls"] for image in _hashes(images_of(call["result"]))]
    # A row that ended before it could read its last results has read the first ones
    return images[: next(n for n in range(len(images) + 1) if images[n:] == read[: len(images) - n])]


def _images(run_dir: Path, groups: list[dict], notes: list[str]) -> dict[str, str]:
    """Each image of some groups once, as an address that holds it, by its hash; the first of them, up to a limit."""
    parts = [part for group in groups for row in group["rows"] for part in row["parts"]]
    calls = [call for part in parts for call in part.get("calls", [])]
    names = dict.fromkeys(name for holder in (*groups, *calls) for name in holder["images"])
    folders = [run_dir / "rollouts" / "images", run_dir / "records" / "images", run_dir / "images"]
    images, room = {}, IMAGE_BYTES
    for name in names:
        path = next((path for folder in folders if (path := folder / f"{name}.png").is_file()), None)
        if path is not None and path.stat().st_size <= room:
            room -= path.stat().st_size
            images[name] = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
    if len(images) < len(names):
        notes.append(
            f"{len(names) - len(images)} of {len(names)} images are not shown: their files are missing, or the page "
            f"would hold more than {IMAGE_BYTES >> 20} MiB of them."
        )
    return images


def _text(result: Any) -> str:
    """A result as text; of content blocks the texts, and of each image that there is one."""
    if isinstance(result, list) and images_of(result):
        texts = [block.get("text", "") if isinstance(block, dict) else str(block) for block in result]
        result = "\n".join(str(text) or "<image>" for text in texts)
    return "" if result is None else result if isinstance(result, str) else json.dumps(result, ensure_ascii=False)


def _decode(ids: list[list[int]], tokenizer: Any) -> list[str]:
    """Text of each list of token ids, special tokens included; the ids themselves without a tokenizer."""
    if tokenizer is None:
        return [" ".join(map(str, tokens)) for tokens in ids]
    try:
        return tokenizer.batch_decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    except Exception as error:  # ids that are not of its vocabulary, as a rule
        raise ValueError(
            f"The tokenizer cannot decode the records ({error}): give theirs with --tokenizer."
        ) from error


def _add_previews(groups: list[dict]) -> None:
    """Give each group the part of its prompt that tells it from the others: all share a system prompt and a frame."""
    prompts = sorted({group["prompt"] for group in groups})
    start = end = 0
    if len(prompts) > 1:
        # Questions may begin and end alike too: a frame ends and begins at a line, a role, a tag or a special token
        shared = os.path.commonprefix(prompts)
        start = max((match.end() for match in _FRAME_ENDS.finditer(shared)), default=0)
        shared = os.path.commonprefix([prompt[:start:-1] for prompt in prompts])[::-1]
        frame = _FRAME_STARTS.search(shared)
        end = len(shared) - frame.start() if frame else 0
    for group in groups:
        prompt = group["prompt"]
        preview = prompt[start : len(prompt) - end].strip() if len(prompts) > 1 else prompt[-300:].strip()
        group["preview"] = group.get("question", preview)[:300]


def _scales(groups: list[dict]) -> dict[str, float]:
    """Upper end of each colour scale, one for all steps so that colours can be compared between them."""
    rows = [row for group in groups for row in group["rows"]]
    parts = [part for row in rows for part in row["parts"]]
    values = {
        "entropy": [part.get("entropy") for part in parts],
        "gap": [part.get("gap") for part in parts],
        "advantage": [row["advantage"] for row in rows],
    }
    return {name: _upper(numbers) for name, numbers in values.items()} | {"probability": 1.0}


def _upper(values: list[float | None]) -> float:
    """Size that 2 % exceed: under the maximum, one outlier would make all the others look alike."""
    sizes = sorted(abs(value) for value in values if value)
    return sizes[math.ceil(0.98 * (len(sizes) - 1))] if sizes else 1.0


def _assemble(title: str, blocks: list[tuple[str, Any]]) -> str:
    """Fill the template."""
    folder = files(__package__)
    names = ("viewer.html", "viewer.css", "tree.js", "viewer.js", "distributions.js")
    template, style, *scripts = ((folder / name).read_text("utf-8") for name in names)
    script = "\n".join(scripts)
    policy = (
        f"default-src 'none'; img-src data:; script-src {_hash(script)}; style-src {_hash(style)}; base-uri 'none'"
    )
    data = "\n".join(f'<script type="text/plain" id="{name}">{_pack(block)}</script>' for name, block in blocks)
    values = {"policy": policy, "title": html.escape(title), "style": style, "script": script, "data": data}
    return Template(template).substitute(values)


def _hash(source: str) -> str:
    """Source expression that lets an inline script or style of exactly this text in."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}'"


def _pack(block: Any) -> str:
    """Compressed JSON in an alphabet that means nothing in HTML."""
    return base64.b64encode(gzip.compress(json.dumps(block).encode(), compresslevel=6, mtime=0)).decode()
