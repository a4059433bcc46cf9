"""What was repaired in the published data, and which ground truths our own mathematics reward does not read.

`python -m arpo_trl.data FILE…` prints it; `docs/data.md` holds its output.
"""

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..rewards.composite import is_math
from .files import convert_rows
from .rl import convert_rl_row
from .sources import load_rows


def repair_counts(rows: Iterable[dict[str, Any]]) -> Counter[str]:
    """Rows in which each repair was made."""
    return Counter(name for row in rows for name in dict.fromkeys(convert_rl_row(row)["repairs"]))


def unread_truths(rows: Iterable[dict[str, Any]]) -> list[tuple[int, str, str, str]]:
    """
    Ground truths of mathematics rows that are not accepted, as mathematics, against themselves.

    Returns:
        `list[tuple[int, str, str, str]]`: Row index, repaired ground truth, what becomes of it (`"accepted as text"`:
        only the same text scores 1), and why.
    """
    from ..rewards.mathematics import choice_readings, clean_answer, math_reward, shared_verifier

    truths = _math_truths(rows)
    answers = [answer for _, answer in truths]
    cleaned = [choice_readings(clean_answer(answer))[-1] for answer in answers]  # a choice by its value
    verdicts = shared_verifier().compare([(text, text) for text in cleaned])
    completions = [rf"<think></think><answer>\boxed{{{answer}}}</answer>" for answer in answers]
    rewards = math_reward(completions, answer=answers)
    unread = []
    for (index, answer), verdict, reward in zip(truths, verdicts, rewards, strict=True):
        if reward != 1.0 or verdict is None or not verdict.parsed or not verdict.equal:
            outcome = "accepted as text" if reward == 1.0 else "not scored" if reward is None else "rejected"
            unread.append((index, answer, outcome, _why_unread(answer)))
    return unread


def _math_truths(rows: Iterable[dict[str, Any]]) -> list[tuple[Any, str]]:
    """Index and repaired ground truth of mathematics rows, one for each accepted answer."""
    converted = [convert_rl_row(row) for row in rows if is_math(row.get("ability"))]
    return [
        (row["index"], answer)
        for row in converted
        for answer in ([row["answer"]] if isinstance(row["answer"], str) else row["answer"])
    ]


def _why_unread(answer: str) -> str:
    from ..rewards.mathematics import choice_readings

    if not answer:
        return "empty at the source"
    if not _brackets_match(answer):
        return "cut off at the source"
    if len(choice_readings(answer)) > 1:
        return "a choice with its value; either alone is accepted too"
    if re.search(r"\\\{.*\|", answer):
        return "set in builder notation"
    if re.fullmatch(r"[^\\\d^=+]+", answer):
        return "words or signs, no mathematics"
    return "notation that math-verify does not parse"


def suspect_truths(rows: Iterable[dict[str, Any]]) -> list[tuple[int, str]]:
    """
    Ground truths of mathematics rows whose brackets do not match: cut off, or cut out of a formula, at the source.
    """
    return [(index, answer) for index, answer in _math_truths(rows) if not _brackets_match(answer)]


def _brackets_match(answer: str) -> bool:
    """Whether as many brackets close as open; round and square ones count together, for half-open intervals."""
    pairs = ((r"\\\{", r"\\\}"), (r"(?<!\\)\{", r"(?<!\\)\}"), (r"[(\[]", r"[)\]]"), (r"\\left\b", r"\\right\b"))
    return all(len(re.findall(opening, answer)) == len(re.findall(closing, answer)) for opening, closing in pairs)


def report(path: str | Path) -> str:
    """Markdown tables of [`repair_counts`], [`unread_truths`] and [`suspect_truths`] for one RL file."""
    rows = list(load_rows(path, "train"))
    convert_rows(convert_rl_row, rows, path)  # a row that cannot be converted is named
    mathematics = sum(is_math(row.get("ability")) for row in rows)

    def code(text: str) -> str:
        return "`" + text.replace("|", "\\|").replace("\n", " ") + "`" if text else "(empty)"

    lines = [f"### {Path(path).name}: {len(rows):,} rows, {mathematics:,} of mathematics", ""]
    lines += ["| repaired | rows |", "|---|---|"]
    lines += [f"| {name} | {count:,} |" for name, count in sorted(repair_counts(rows).items())]
    unread, suspect = unread_truths(rows), suspect_truths(rows)
    lines += ["", f"Accepted against itself as mathematics: {mathematics - len(unread):,} of {mathematics:,}."]
    if unread:
        lines += ["The others:", "", "| row | ground truth | outcome | why |", "|---|---|---|---|"]
        lines += [f"| {index} | {code(answer)} | {outcome} | {why} |" for index, answer, outcome, why in unread]
    if suspect:
        lines += ["", "Damaged at the source (brackets do not match) and left as they are:", ""]
        lines += ["| row | ground truth |", "|---|---|"]
        lines += [f"| {index} | {code(answer)} |" for index, answer in suspect]
    return "\n".join(lines)
