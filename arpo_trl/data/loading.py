r"""The published ARPO data as TRL datasets, for both protocols, with its damage repaired.

```python
from arpo_trl.data import load_cold_start, load_rl

train = load_rl("dongguanting/ARPO-RL-Reasoning-10K")              # or a local .parquet; for GRPOTrainer, ARPOTrainer
sft = load_cold_start("final_sft.jsonl", protocol="chat_template")  # for SFTTrainer
```

`python -m arpo_trl.data FILE…` prints what was repaired and which ground truths our own mathematics reward does not
read as mathematics; `docs/data.md` holds its output.

What is not here: answers are not corrected. A ground truth that was cut off or mixed up at the source is listed, not
guessed; a row without any keeps an empty answer, for which reward functions return `None`.
"""

import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset, DatasetDict, Features, Json, Value, load_dataset
from transformers import PreTrainedTokenizerBase

from ..protocols import encode_onward, encode_plain
from ..rewards.completions import accepted_answers, result_spans
from ..rewards.composite import is_math
from ..source_code import trimmed, unindented
from .files import convert_rows, holds_several, read_rows, to_dataset

ToolProtocolName = Literal["tags", "chat_template"]

CHAT_SYSTEM_PROMPT = (
    "You solve the user's question step by step. Search for facts that you do not know for certain, and run Python code "
    "for whatever has to be computed. State the final, exact answer once, at the end, in \\boxed{}."
)

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

# An escape sequence that a JSON or Python string swallowed: the letter after the backslash became a control character.
_SWALLOWED = {"\x08oxed": r"\boxed", "\x08egin": r"\begin", "\x08inom": r"\binom", "\x0crac": r"\frac"}
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\u200b\ufeff]")


def repair_text(text: str) -> tuple[str, list[str]]:
    r"""
    Undo the damage of a prompt or a trace.

    Args:
        text (`str`): Text as published.

    Returns:
        `tuple[str, list[str]]`: The repaired text, and the names of what was repaired.
    """
    repairs = []
    for damaged, meant in _SWALLOWED.items():
        if damaged in text:
            text = text.replace(damaged, meant)
            repairs.append(f"`{damaged.encode('unicode_escape').decode()}` → `{meant}`")
    if "\r" in text:
        text = re.sub(r"\r\n?", "\n", text)
        repairs.append("carriage returns → line feeds")
    if _CONTROL.search(text):  # left behind where a ligature was taken apart ("in\x0cfinite"), or never visible
        text = _CONTROL.sub("", text)
        repairs.append("other control and zero-width characters removed")
    if "\xa0" in text:
        text = text.replace("\xa0", " ")
        repairs.append("no-break spaces → spaces")
    return text, repairs


def repair_answer(text: str) -> tuple[str, list[str]]:
    r"""
    Undo the damage of a ground truth: as [`repair_text`], and white space around it, a comma or an `\end{…}` without its
    `\begin` left at its end, doubled backslashes before `{`, `}` and `%`.
    """
    text, repairs = repair_text(text)
    dangling = re.search(r"\s*\\end\{(\w+)\}\s*\Z", text)
    if dangling and rf"\begin{{{dangling.group(1)}}}" not in text:
        text = text[: dangling.start()].removesuffix(".")
        repairs.append(r"`\end{…}` without `\begin` removed")
    if re.search(r"\\\\[{}%]", text):
        text = re.sub(r"\\\\(?=[{}%])", r"\\", text)
        repairs.append(r"doubled backslash before `{`, `}`, `%`")
    if text != text.strip():
        text = text.strip()
        repairs.append("white space around it removed")
    if text.endswith(","):
        text = text.rstrip(",")
        repairs.append("comma at its end removed")
    return text, repairs


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
    _check_protocol(protocol)
    prompt: list[dict[str, str]] = []
    repairs: list[str] = []
    for message in _text_messages(row.get("prompt"), "prompt"):
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


def _text_messages(messages: Any, column: str) -> list[dict[str, str]]:
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
    _check_protocol(protocol)
    rows = _load(path, split)
    missing = {"prompt", "ability", "data_source", "reward_model"} - {name for row in rows for name in row}
    if missing:
        raise ValueError(f"{path} is no RL set: it lacks the columns {', '.join(sorted(missing))}.")
    converted = convert_rows(lambda row: convert_rl_row(row, protocol), rows, path)
    for row in converted:
        del row["repairs"]
    return to_dataset(converted, path)


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
    messages = _text_messages([{"role": "system", "content": system}], "system") if system else []
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
        messages += _text_messages([{"role": role, "content": content}], "conversations")
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
        protocol (`str`): `"chat_template"`: train with `SFTConfig(assistant_only_loss=True)`, which leaves tool turns out.
            `"tags"`: the rows go through [`tags_sft_features`], which gives the mask.
        split (`str`): Split of a dataset on the Hub; a local file is one split.
        tools (`Sequence[dict]`): Tool schemas of the column `tools`, for the chat template.

    Returns:
        `Dataset`: `messages`, and for `"chat_template"` also `tools` (JSON). A conversation with several assistant turns
        becomes one row per turn for `"tags"`, in which the last turn is the one to learn.
    """
    _check_protocol(protocol)
    source = _load(path, split)
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
        turn outside its `<result>…</result>` spans, and the end-of-sequence token. `SFTTrainer` takes both as they are.
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


def _check_protocol(protocol: str) -> None:
    if protocol not in ("tags", "chat_template"):
        raise ValueError(f"protocol={protocol!r} is unknown: use 'tags' or 'chat_template'.")


def _load(path: str | Path, split: str) -> Sequence[dict[str, Any]]:
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
    """Ground truths of mathematics rows whose brackets do not match: cut off, or cut out of a formula, at the source."""
    return [(index, answer) for index, answer in _math_truths(rows) if not _brackets_match(answer)]


def _brackets_match(answer: str) -> bool:
    """Whether as many brackets close as open; round and square ones count together, for half-open intervals."""
    pairs = ((r"\\\{", r"\\\}"), (r"(?<!\\)\{", r"(?<!\\)\}"), (r"[(\[]", r"[)\]]"), (r"\\left\b", r"\\right\b"))
    return all(len(re.findall(opening, answer)) == len(re.findall(closing, answer)) for opening, closing in pairs)


def report(path: str | Path) -> str:
    """Markdown tables of [`repair_counts`], [`unread_truths`] and [`suspect_truths`] for one RL file."""
    rows = list(_load(path, "train"))
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


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: python -m arpo_trl.data FILE.parquet …")
    print("\n\n".join(report(path) for path in sys.argv[1:]))
