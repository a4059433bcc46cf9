r"""Did the model keep to the protocol? Judged on what the model wrote, never on what a tool answered.

Tags protocol: `<think>…</think>`, calls, and as the last block one `<answer>…\boxed{…}…</answer>`. What stands inside
a block is the block's own business: code that prints "<answer>" or a thought that mentions `<search>` breaks nothing.

Chat-template protocol: every call was understood, thoughts are closed, and the last turn is an assistant's with a
`\boxed{…}` answer after its thoughts. Thoughts are not required, since many chat models have none.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

from .completions import assistant_texts, closing_text, extract_boxed, mean, model_texts, result_spans, strip_end

TOOL_TAGS = ("search", "python")


def tags_format_error(text: str, tool_tags: Sequence[str] = TOOL_TAGS) -> str | None:
    """
    What is wrong with the format of a row of the tags protocol.

    Args:
        text (`str`): What the model wrote, tool results left out.
        tool_tags (`Sequence[str]`): Tags that call a tool.

    Returns:
        `str` or `None`: The first fault; `None` if the format is good.
    """
    text = strip_end(text)
    if result_spans(text):
        return "the model wrote a tool result itself"
    tag = re.compile(rf"<(/?)({'|'.join(['think', 'answer', 'result', *map(re.escape, tool_tags)])})>")
    blocks, position = [], 0
    while found := tag.search(text, position):
        closing, name = found.groups()
        if closing or name == "result":
            return f"{found.group()} outside of any block"
        end = text.find(f"</{name}>", found.end())
        if end < 0:
            return f"<{name}> is never closed"
        content = text[found.end() : end]
        if name in ("think", "answer") and f"<{name}>" in content:
            return f"<{name}> inside <{name}>"
        blocks.append(name)
        position = end + len(f"</{name}>")
    if "think" not in blocks:
        return "there is no <think>"
    if blocks.count("answer") != 1 or blocks[-1] != "answer":
        return "the last block is not the one <answer>"
    if text[position:].strip():
        return "there is text after </answer>"
    if extract_boxed(content) is None:
        return r"there is no \boxed{} in <answer>"
    return None


def chat_format_error(completion: str | list[dict[str, Any]]) -> str | None:
    """
    What is wrong with the format of a row of the chat-template protocol.

    Args:
        completion (`str` or `list[dict]`): Assistant and tool turns; a string is one assistant turn.

    Returns:
        `str` or `None`: The first fault; `None` if the format is good.
    """
    messages = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
    for text in assistant_texts(messages):
        if "<tool_call>" in text.rpartition("</think>")[2]:
            return "a tool call that could not be read"
        thought, closed, rest = text.partition("</think>")
        if not closed and "<think>" in text:
            return "<think> is never closed"
        if "</think>" in rest or "<think>" in rest:
            return "a <think> tag after the thoughts"
        if closed and "<think>" in thought.lstrip().removeprefix("<think>"):
            return "<think> inside <think>"
    text = closing_text(messages)
    if not text:
        return "the last turn is not an answer"
    if extract_boxed(text.rpartition("</think>")[2]) is None:
        return r"there is no \boxed{} in the answer"
    return None


def tags_format_reward(
    completions: list,
    model_text: list[str] | None = None,
    log_metric: Callable[[str, float], None] | None = None,
    **kwargs: Any,
) -> list[float]:
    """
    1 for a row that keeps to the tags protocol, 0 for one that does not.

    Args:
        completions (`list`): Strings or messages.
        model_text (`list[str]`, *optional*): What the model wrote, as [`ARPOTrainer`] passes it. Without it, results
            are cut out of the completions: each `<result>…</result>` right behind a call.
        log_metric (`Callable`, *optional*): Provided by the trainer.

    Returns:
        `list[float]`: One value per row.
    """
    rewards = [float(tags_format_error(text) is None) for text in model_texts(completions, model_text)]
    if log_metric is not None:
        log_metric("tags_format_reward/good", mean(rewards))
    return rewards


def chat_format_reward(
    completions: list, log_metric: Callable[[str, float], None] | None = None, **kwargs: Any
) -> list[float]:
    """
    1 for a row that keeps to the chat-template protocol, 0 for one that does not. Arguments as
    [`~rewards.tags_format_reward`].
    """
    rewards = [float(chat_format_error(completion) is None) for completion in completions]
    if log_metric is not None:
        log_metric("chat_format_reward/good", mean(rewards))
    return rewards
