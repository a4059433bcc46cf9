"""Cold-start traces as data sets for `SFTTrainer`, for both protocols; loss never on tool results."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Json, Value
from transformers import PreTrainedTokenizerBase

from ..protocols import encode_onward, encode_plain
from ..rewards.completions import result_spans
from ..source_code import trimmed, unindented
from .files import convert_rows
from .repair import repair_text
from .rl import CHAT_SYSTEM_PROMPT
from .sources import ToolProtocolName, check_protocol, load_rows, text_messages

TOOL_ARGUMENTS = {"search": "query", "python": "code"}
"""Parameter that takes the text between the tags, by tool."""

TOOL_SCHEMAS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": description,
            "parameters": {
                "type": "object",
                "properties": {TOOL_ARGUMENTS[name]: {"type": "string", "description": argument}},
                "required": [TOOL_ARGUMENTS[name]],
            },
        },
    }
    for name, description, argument in (
        ("search", "Search for passages on a topic.", "What to search for."),
        ("python", "Run Python code and return what it prints.", "The code."),
    )
]
"""Tools of the cold-start traces, as the chat template renders them. Pass your own where yours differ."""


def sharegpt_messages(row: dict[str, Any]) -> list[dict[str, str]]:
    """
    The messages of a ShareGPT row, repaired.

    Args:
        row (`dict`): `conversations`, a list of turns `{from: human|gpt, value}` or `{role: user|assistant, content}`,
            and possibly `system`.

    Returns:
        `list[dict]`: `{role, content}` messages, the system prompt first.

    Raises:
        `ValueError`: A turn has another role, or is no such dict of texts.
    """
    roles = {"human": "user", "gpt": "assistant"}
    system = row.get("system")
    messages = text_messages([{"role": "system", "content": system}], "system") if system else []
    turns = row.get("conversations")
    if not isinstance(turns, Sequence) or not all(isinstance(turn, Mapping) for turn in turns):
        raise ValueError(f"`conversations` is {str(turns)[:80]!r}: expected a list of turns with from and value.")
    for turn in turns:
        role, content = turn.get("from") or turn.get("role"), turn.get("value") or turn.get("content") or ""
        role = roles.get(role, role) if isinstance(role, str) else role
        if role not in ("system", "user", "assistant"):
            raise ValueError(f"A turn has the role {role!r}: expected human, gpt, user, assistant or system.")
        if role == "system" and messages:
            continue  # some exports repeat the system prompt as the first turn
        messages += text_messages([{"role": role, "content": content}], "conversations")
    return [{"role": message["role"], "content": repair_text(message["content"])[0]} for message in messages]


def trace_messages(trace: str) -> list[dict[str, Any]]:
    r"""
    A trace of the tags protocol as the turns of the chat-template protocol.

    Every `<search>…</search>` (or `<python>`, or any other tag) that is followed by a `<result>` becomes a call of the
    assistant turn that holds the text before it, the result a tool turn; the `<answer>` tags come off.

    Args:
        trace (`str`): An assistant turn of the cold-start set.

    Returns:
        `list[dict]`: Assistant turns (`content`, `tool_calls`) and tool turns (`name`, `content`).
    """
    turns: list[dict[str, Any]] = []
    position = 0
    for name, start, end in result_spans(trace):
        before = trace[position:start].rpartition(f"</{name}>")[0]
        text, opened, body = before.rpartition(f"<{name}>")
        if opened:
            function = {"name": name, "arguments": {TOOL_ARGUMENTS.get(name, "text"): unindented(body)}}
            call = {"type": "function", "function": function}
            turns.append({"role": "assistant", "content": text.strip(), "tool_calls": [call]})
            result = trimmed(trace[start:end].removeprefix("<result>").removesuffix("</result>"))
            turns.append({"role": "tool", "name": name, "content": result})
            position = end
    text = re.sub(
        r"\s*</?answer>\s*", lambda tag: "\n\n" if tag.group().strip() == "<answer>" else "", trace[position:]
    )
    return [*turns, {"role": "assistant", "content": text.strip()}] if text.strip() else turns


def load_cold_start(
    path: str | Path,
    protocol: ToolProtocolName = "tags",
    split: str = "train",
    tools: Sequence[dict[str, Any]] = TOOL_SCHEMAS,
) -> Dataset:
    """
    A ShareGPT cold-start set for SFT, with no loss on tool output.

    Args:
        path (`str`): Local file (JSON, JSONL, parquet) or a dataset id on the Hub.
        protocol (`str`): `"chat_template"`: train with `SFTConfig(assistant_only_loss=True)`, which leaves tool turns
            out. `"tags"`: the rows go through [`tags_sft_features`], which gives the mask.
        split (`str`): Split of a dataset on the Hub; a local file is one split.
        tools (`Sequence[dict]`): Tool schemas of the column `tools`, for the chat template.

    Returns:
        `Dataset`: `messages`, and for `"chat_template"` also `tools` (JSON). A conversation with several assistant
        turns becomes one row per turn for `"tags"`, in which the last turn is the one to learn.
    """
    check_protocol(protocol)
    source = load_rows(path, split)
    if not any("conversations" in row for row in source):
        raise ValueError(f"{path} is no ShareGPT set: it has no column `conversations`.")
    conversations = convert_rows(sharegpt_messages, source, path)
    if protocol == "tags":
        rows = [{"messages": part} for messages in conversations for part in _up_to_each_answer(messages)]
        return Dataset.from_list(rows)
    schemas = json.dumps(list(tools))
    structured = [{"messages": _structured(messages), "tools": schemas} for messages in conversations]
    # as Json a call keeps its own arguments; as Arrow structs it would get those of all other tools too, as None
    return Dataset.from_list(structured, features=Features({"messages": [Json()], "tools": Value("string")}))


def _up_to_each_answer(messages: list[dict[str, str]]) -> Iterable[list[dict[str, str]]]:
    return (messages[: i + 1] for i, message in enumerate(messages) if message["role"] == "assistant")


def _structured(messages: list[dict[str, str]]) -> list[dict[str, Any]]:
    structured: list[dict[str, Any]] = []
    for message in messages:
        if message["role"] == "system":
            structured.append({"role": "system", "content": CHAT_SYSTEM_PROMPT})
        elif message["role"] == "assistant":
            structured += trace_messages(message["content"])
        else:
            structured.append(message)
    return structured


def tags_sft_features(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> dict[str, list[int]]:
    """
    Tokens of a conversation of the tags protocol, and a mask that leaves tool output out of the loss.

    The tokens are those of a rollout: the prompt through the chat template, model text and results encoded one by one,
    results without special tokens (a page that holds `<|im_end|>` ends nothing), and the end-of-sequence token.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Tokenizer with a chat template.
        messages (`list[dict]`): Conversation whose last message is the assistant turn to learn.

    Returns:
        `dict`: `input_ids` (`list[int]`) and `completion_mask` (`list[int]`), 1 on tokens that carry loss: the last
        turn outside its `<result>…</result>` spans, and the end-of-sequence token. `SFTTrainer` takes both as they
        are.
    """
    if not messages or messages[-1]["role"] != "assistant":
        raise ValueError("The last message must be the assistant turn to learn.")
    prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, tokenize=False)
    ids = tokenizer.encode(prompt, add_special_tokens=False)
    mask = [0] * len(ids)
    text, position = messages[-1]["content"], 0
    for start, end in [(start, end) for _, start, end in result_spans(text)] + [(len(text), len(text))]:
        written = encode_onward(tokenizer, text[position:start])
        result = encode_plain(tokenizer, text[start:end])
        ids += written + result
        mask += [1] * len(written) + [0] * len(result)
        position = end
    return {"input_ids": [*ids, tokenizer.eos_token_id], "completion_mask": [*mask, 1]}
