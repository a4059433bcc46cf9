"""Rows that TRL's own code sampled, as trajectories: without tools, or with tools that may answer with images.

What is not here: entropies, times and errors of calls, which TRL does not tell.
"""

from collections.abc import Container, Sequence
from typing import Any

from ..execution.executor import ToolCall
from .tree import CallOfRow, Segment, Trajectory


def stock_trajectory(
    row: int,
    prompt_ids: list[int],
    completion_ids: list[int],
    tool_mask: list[int] | None = None,
    completion: str | Sequence[dict[str, Any]] = "",
    end_tokens: Container[int] = (),
) -> Trajectory:
    """
    Args:
        row (`int`): Place among the rows of this process.
        prompt_ids, completion_ids (`list[int]`): Tokens.
        tool_mask (`list[int]`, *optional*): 1 for a token of the model, 0 for one of a tool result; `None` without
            tools.
        completion (`str` or `Sequence[dict]`): The completion as TRL parsed it.
        end_tokens (`Container[int]`): Tokens with which a row ends that was not truncated, as TRL sees it.
    """
    mask = tool_mask or [1] * len(completion_ids)
    edges = [index for index in range(1, len(mask)) if mask[index] != mask[index - 1]]
    stretches = zip([0, *edges], [*edges, len(mask)], strict=True)
    return Trajectory(
        row,
        prompt_ids,
        completion_ids=completion_ids,
        tool_mask=mask,
        segments=[Segment(start, end) for start, end in stretches if start == end or mask[start]],
        truncated=not completion_ids or completion_ids[-1] not in end_tokens,
        calls=[] if isinstance(completion, str) else [CallOfRow(call) for call in answered_calls(completion)],
    )


def answered_calls(messages: Sequence[dict[str, Any]]) -> list[ToolCall]:
    """The calls of a conversation that a `tool` message answers; an image in the answer is the text `<image>`."""
    waiting: list[ToolCall] = []
    answered = []
    for message in messages:
        if message["role"] == "assistant":
            functions = [call["function"] for call in message.get("tool_calls") or []]
            waiting = [ToolCall(function["name"], function["arguments"]) for function in functions]
        for call in waiting if message["role"] == "tool" else []:
            if call.name == message["name"]:  # results of coroutines stand after the others
                waiting.remove(call)
                call.result = _text(message["content"])
                answered.append(call)
                break
    return answered


def _text(content: str | Sequence[Any]) -> str:
    if isinstance(content, str):
        return content
    blocks = [block if isinstance(block, dict) else {"text": str(block)} for block in content]
    return "".join("<image>" if block.get("type") == "image" else str(block.get("text", "")) for block in blocks)
