"""
Rows of published data: from a local file or the Hub, for one of the two built-in protocols, and messages in
them.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from datasets import DatasetDict, load_dataset

from .files import read_rows

ToolProtocolName = Literal["tags", "chat_template"]


def check_protocol(protocol: str) -> None:
    if protocol not in ("tags", "chat_template"):
        raise ValueError(f"protocol={protocol!r} is unknown: use 'tags' or 'chat_template'.")


def load_rows(path: str | Path, split: str) -> Sequence[dict[str, Any]]:
    file = Path(path)
    if file.is_file():
        if file.suffix not in (".parquet", ".json", ".jsonl"):
            raise ValueError(f"{path} has the unknown suffix {file.suffix!r}: use .parquet, .json or .jsonl.")
        return read_rows(file)
    loaded = load_dataset(str(path), split=split)
    if isinstance(loaded, DatasetDict):
        raise ValueError(f"split={split!r} of {path} holds several splits: name one.")
    return loaded


# Report: what the converters repaired, and what the mathematics reward makes of the ground truths


def text_messages(messages: Any, column: str) -> list[dict[str, str]]:
    """`messages` as a list of `{role, content}` of text; a text alone is the user's."""
    if isinstance(messages, str):
        return [{"role": "user", "content": messages}]
    messages = messages.tolist() if hasattr(messages, "tolist") else messages
    if not isinstance(messages, Sequence) or not messages:
        raise ValueError(f"`{column}` is {str(messages)[:80]!r}: expected a list of messages with role and content.")
    for message in messages:
        if not isinstance(message, Mapping) or not all(
            isinstance(message.get(key), str) for key in ("role", "content")
        ):
            raise ValueError(
                f"`{column}` holds the message {str(message)[:80]!r}: expected a role and a content, both text."
            )
    return list(messages)
