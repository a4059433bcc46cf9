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
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset, DatasetDict, Features, Json, Value, load_dataset
from transformers import PreTrainedTokenizerBase

from .protocols import encode_plain
from .rewards.completions import result_spans

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
        protocol (`str`): `"tags"` keeps the published system prompt, which teaches the tags; `"chat_template"` puts
            [`CHAT_SYSTEM_PROMPT`] in its place, since there the template tells the model about its tools.

    Returns:
        `dict`: `prompt` (messages), `answer` (`str`, or `list[str]` where several are published), `question`,
        `ability`, `data_source`, `index`, and `repairs`, what was repaired in the row.
    """
    _check_protocol(protocol)
    prompt, repairs = [], []
    for message in row["prompt"]:
        content, found = repair_text(message["content"])
        if message["role"] == "system" and protocol == "chat_template":
            content = CHAT_SYSTEM_PROMPT
        else:
            repairs += [f"{message['role']} message: {name}" for name in found]
        prompt.append({"role": message["role"], "content": content})
    truth = row["reward_model"]["ground_truth"]
    truths = [repair_answer(text) for text in ([truth] if isinstance(truth, str) else truth)]
    repairs += [f"ground truth: {name}" for name in dict.fromkeys(name for _, found in truths for name in found)]
    answers = [text for text, _ in truths]
    return {
        "prompt": prompt,
        "answer": answers[0] if isinstance(truth, str) else answers,
        "question": prompt[-1]["content"],
        "ability": row["ability"],
        "data_source": row["data_source"],
        "index": (row.get("extra_info") or {}).get("index"),
        "repairs": repairs,
    }


def load_rl(path: str | Path, protocol: ToolProtocolName = "tags", split: str = "train") -> Dataset:
    """
    A published RL set as a TRL dataset.

    Args:
        path (`str`): Local file (parquet, JSON, JSONL) or a dataset id on the Hub.
        protocol (`str`): Tool protocol of the training run, see [`convert_rl_row`].
        split (`str`): Split of a dataset on the Hub; a local file is one split.

    Returns:
        `Dataset`: Rows as [`convert_rl_row`] makes them, without `repairs`.
    """
    _check_protocol(protocol)
    rows = _load(path, split)
    missing = {"prompt", "ability", "data_source", "reward_model"} - set(rows.column_names)
    if missing:
        raise ValueError(f"{path} is no RL set: it lacks the columns {', '.join(sorted(missing))}.")

    def convert(row: dict[str, Any]) -> dict[str, Any]:
        converted = convert_rl_row(row, protocol)
        del converted["repairs"]
        return converted

    return rows.map(convert, remove_columns=rows.column_names, desc="Converting")


def sharegpt_messages(row: dict[str, Any]) -> list[dict[str, str]]:
    """
    The messages of a ShareGPT row, repaired.

    Args:
        row (`dict`): `conversations`, a list of turns `{from: human|gpt, value}` or `{role: user|assistant, content}`,
            and possibly `system`.

    Returns:
        `list[dict]`: `{role, content}` messages, the system prompt first.
    """
    roles = {"human": "user", "gpt": "assistant"}
    system = row.get("system")
    messages = [{"role": "system", "content": system}] if system else []
    for turn in row["conversations"]:
        role, content = turn.get("from") or turn.get("role"), turn.get("value") or turn.get("content") or ""
        role = roles.get(role, role)
        if role not in ("system", "user", "assistant"):
            raise ValueError(f"A turn has the role {role!r}: expected human, gpt, user, assistant or system.")
        if role == "system" and messages:
            continue  # some exports repeat the system prompt as the first turn
        messages.append({"role": role, "content": content})
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
            function = {"name": name, "arguments": {TOOL_ARGUMENTS.get(name, "text"): body.strip()}}
            call = {"type": "function", "function": function}
            turns.append({"role": "assistant", "content": text.strip(), "tool_calls": [call]})
            result = trace[start:end].removeprefix("<result>").removesuffix("</result>").strip()
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
    if "conversations" not in source.column_names:
        raise ValueError(f"{path} is no ShareGPT set: it has no column `conversations`.")
    conversations = map(sharegpt_messages, source)
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
        written = tokenizer.encode(text[position:start], add_special_tokens=False)
        result = encode_plain(tokenizer, text[start:end])
        ids += written + result
        mask += [1] * len(written) + [0] * len(result)
        position = end
    return {"input_ids": [*ids, tokenizer.eos_token_id], "completion_mask": [*mask, 1]}


def _check_protocol(protocol: str) -> None:
    if protocol not in ("tags", "chat_template"):
        raise ValueError(f"protocol={protocol!r} is unknown: use 'tags' or 'chat_template'.")


def _load(path: str | Path, split: str) -> Dataset:
    file = Path(path)
    if not file.is_file():
        loaded = load_dataset(str(path), split=split)
    else:
        builder = {".parquet": "parquet", ".json": "json", ".jsonl": "json"}.get(file.suffix)
        if builder is None:
            raise ValueError(f"{path} has the unknown suffix {file.suffix!r}: use .parquet, .json or .jsonl.")
        loaded = load_dataset(builder, data_files=str(file), split="train")
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
    from .rewards.mathematics import choice_readings, clean_answer, math_reward, shared_verifier

    converted = [convert_rl_row(row) for row in rows if row["ability"] == "math"]
    cleaned = [choice_readings(clean_answer(row["answer"]))[-1] for row in converted]  # a choice by its value
    verdicts = shared_verifier().compare([(text, text) for text in cleaned])
    completions = [rf"<think></think><answer>\boxed{{{row['answer']}}}</answer>" for row in converted]
    rewards = math_reward(completions, answer=[row["answer"] for row in converted])
    unread = []
    for row, verdict, reward in zip(converted, verdicts, rewards, strict=True):
        if reward != 1.0 or verdict is None or not verdict.parsed or not verdict.equal:
            outcome = "accepted as text" if reward == 1.0 else "not scored" if reward is None else "rejected"
            unread.append((row["index"], row["answer"], outcome, _why_unread(row["answer"])))
    return unread


def _why_unread(answer: str) -> str:
    from .rewards.mathematics import choice_readings

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
    answers = [(row["extra_info"]["index"], convert_rl_row(row)["answer"]) for row in rows if row["ability"] == "math"]
    return [(index, answer) for index, answer in answers if not _brackets_match(answer)]


def _brackets_match(answer: str) -> bool:
    """Whether as many brackets close as open; round and square ones count together, for half-open intervals."""
    pairs = ((r"\\\{", r"\\\}"), (r"(?<!\\)\{", r"(?<!\\)\}"), (r"[(\[]", r"[)\]]"), (r"\\left\b", r"\\right\b"))
    return all(len(re.findall(opening, answer)) == len(re.findall(closing, answer)) for opening, closing in pairs)


def report(path: str | Path) -> str:
    """Markdown tables of [`repair_counts`], [`unread_truths`] and [`suspect_truths`] for one RL file."""
    rows = list(_load(path, "train"))
    mathematics = sum(row["ability"] == "math" for row in rows)

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
