"""Published RL sets (ARPO's, Search-R1's, verl's recipes) as data sets for `GRPOTrainer` and `ARPOTrainer`, for both
protocols.

A row without a ground truth keeps an empty answer, for which reward functions return `None`.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset

from ..rewards.completions import accepted_answers
from .files import convert_rows, holds_several, to_dataset
from .repair import repair_answer, repair_text
from .sources import ToolProtocolName, check_protocol, load_rows, text_messages

CHAT_SYSTEM_PROMPT = (
    "You solve the user's question step by step. Search for facts that you do not know for certain, and run Python "
    "code for whatever has to be computed. State the final, exact answer once, at the end, in \\boxed{}."
)


def convert_rl_row(row: dict[str, Any], protocol: ToolProtocolName = "tags") -> dict[str, Any]:
    r"""
    One row of the published RL sets for TRL.

    Args:
        row (`dict`): Columns `prompt` (messages), `ability`, `data_source`, `reward_model.ground_truth`, `extra_info`.
            The ground truth is whatever [`~rewards.completions.accepted_answers`] reads, or such a list or dict as
            JSON, as in Skywork's sets.
        protocol (`str`): `"tags"` keeps the published system prompt, which teaches the tags; `"chat_template"` puts
            [`CHAT_SYSTEM_PROMPT`] in its place, since there the template tells the model about its tools.

    Returns:
        `dict`: `prompt` (messages), `answer` (`str`, or `list[str]` where the ground truth is a list or a dict),
        `question`, `ability`, `data_source`, `index`, and `repairs`, what was repaired in the row.

    Raises:
        `ValueError`: The prompt is neither messages of text nor text, or the ground truth does not tell its answers.
    """
    check_protocol(protocol)
    prompt: list[dict[str, str]] = []
    repairs: list[str] = []
    for message in text_messages(row.get("prompt"), "prompt"):
        content, found = repair_text(message["content"])
        if message["role"] == "system" and protocol == "chat_template":
            content = CHAT_SYSTEM_PROMPT
        else:
            repairs += [f"{message['role']} message: {name}" for name in found]
        prompt.append({"role": message["role"], "content": content})
    reward_model = row.get("reward_model")
    if not isinstance(reward_model, Mapping) or "ground_truth" not in reward_model:
        raise ValueError(
            f"`reward_model` is {str(reward_model)[:80]!r}: expected a dict that holds the accepted answers under "
            "`ground_truth`."
        )
    truth = _decoded(reward_model["ground_truth"])
    truths = [repair_answer(text) for text in ([truth] if isinstance(truth, str) else accepted_answers(truth))]
    repairs += [f"ground truth: {name}" for name in dict.fromkeys(name for _, found in truths for name in found)]
    answers = [text for text, _ in truths]
    extra = row.get("extra_info")
    return {
        "prompt": prompt,
        "answer": answers if holds_several(truth) else answers[0] if answers else "",
        "question": prompt[-1]["content"],
        "ability": row.get("ability"),
        "data_source": row.get("data_source"),
        "index": extra.get("index") if isinstance(extra, Mapping) else None,
        "repairs": repairs,
    }


def _decoded(truth: Any) -> Any:
    """`truth`, read as JSON where that is a list of texts or a dict of answers; any other text stays as it is."""
    if isinstance(truth, str) and re.match(r'\s*(\[\s*"|\{\s*")', truth):
        try:
            accepted_answers(decoded := json.loads(truth))
        except (ValueError, RecursionError):
            return truth
        if isinstance(decoded, dict) or all(isinstance(item, str) for item in decoded):
            return decoded
    return truth


def load_rl(path: str | Path, protocol: ToolProtocolName = "tags", split: str = "train") -> Dataset:
    """
    A published RL set as a TRL dataset.

    Args:
        path (`str`): Local file (parquet, JSON, JSONL) or a dataset id on the Hub.
        protocol (`str`): Tool protocol of the training run, see [`convert_rl_row`].
        split (`str`): Split of a dataset on the Hub; a local file is one split.

    Returns:
        `Dataset`: Rows as [`convert_rl_row`] makes them, without `repairs`. `answer` is a text in all rows, or where
        some row has several answers a list in all of them; a row without an answer holds an empty one.

    Raises:
        `ValueError`: The file cannot be read, is no RL set, or a row cannot be converted, which is named.
    """
    check_protocol(protocol)
    rows = load_rows(path, split)
    missing = {"prompt", "ability", "data_source", "reward_model"} - {name for row in rows for name in row}
    if missing:
        raise ValueError(f"{path} is no RL set: it lacks the columns {', '.join(sorted(missing))}.")
    converted = convert_rows(lambda row: convert_rl_row(row, protocol), rows, path)
    for row in converted:
        del row["repairs"]
    return to_dataset(converted, path)
