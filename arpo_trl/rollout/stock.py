"""Rows that TRL's own code sampled, which it does without tools, as trajectories.

What is not here: entropies, which TRL does not tell.
"""

from collections.abc import Container, Sequence
from typing import Any

from .tree import Segment, Trajectory


def stock_trajectory(
    row: int,
    prompt_ids: list[int],
    completion_ids: list[int],
    images: Sequence[Any] | None = None,
    end_tokens: Container[int] = (),
) -> Trajectory:
    """
    Args:
        row (`int`): Place among the rows of this process.
        prompt_ids, completion_ids (`list[int]`): Tokens.
        images (`Sequence[PIL.Image.Image]`, *optional*): Images of the prompt.
        end_tokens (`Container[int]`): Tokens with which a row ends that was not truncated, as TRL sees it.
    """
    return Trajectory(
        row,
        prompt_ids,
        completion_ids=completion_ids,
        tool_mask=[1] * len(completion_ids),
        segments=[Segment(0, len(completion_ids))],
        images=list(images or []),
        truncated=not completion_ids or completion_ids[-1] not in end_tokens,
    )
