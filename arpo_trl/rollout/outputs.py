"""What a rollout adds to the batch that TRL makes of its rows: columns for reward functions, advantages by token,
masks.
"""

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from ..advantages import Span, attribution, check_spans
from .distinct import fork_weights
from .record import call_records
from .tree import Group, Trajectory


def reward_columns(trajectories: Sequence[Trajectory], tokenizer: PreTrainedTokenizerBase) -> dict[str, list[Any]]:
    """
    What reward functions are told of each row.

    Returns:
        `dict[str, list]`: `tool_calls`, a list of dicts a row; `model_text`, the text of the model's own tokens.
    """
    own_ids = [trajectory.own_ids for trajectory in trajectories]
    return {
        "tool_calls": [call_records(trajectory) for trajectory in trajectories],
        "model_text": tokenizer.batch_decode(own_ids, skip_special_tokens=True),
    }


def weigh(output: dict[str, Any], groups: Sequence[Group]) -> None:
    """Multiply the advantage of each row by its weight among forks that differ (see [`fork_weights`])."""
    weights = [weight for group in groups for weight in fork_weights(group)]
    output["advantages"] = output["advantages"] * output["advantages"].new_tensor(weights)


def attribute(output: dict[str, Any], groups: Sequence[Group], name: str) -> list[list[Span]] | None:
    """
    Spread the advantages of rows over their tokens.

    Args:
        output (`dict[str, Any]`): TRL's batch; its `advantages` of shape `(B,)` become `(B, T)`, except with soft
            attribution, which leaves that to TRL.
        groups (`Sequence[Group]`): The rows of the batch, in order.
        name (`str`): What `advantage_attribution` names.

    Returns:
        `list[list[Span]]` or `None`: for each row, the spans that cover its completion; `None` for soft attribution.
    """
    if name == "soft":
        return None
    advantages = output["advantages"].tolist()
    spans: list[list[Span]] = []
    for group in groups:
        first, rows = group.rows.start, group.trajectories
        lengths = [len(row.completion_ids) for row in rows]
        group_spans = attribution(name)(
            [advantages[row] for row in group.rows],
            [None if row.parent is None else row.parent - first for row in rows],
            [row.fork_token for row in rows],
            lengths,
        )
        check_spans(group_spans, lengths, name)
        spans += group_spans
    spread = output["advantages"].unsqueeze(1).repeat(1, output["completion_ids"].size(1))
    for index, row_spans in enumerate(spans):
        for span in row_spans:
            spread[index, span.start : span.end] = span.advantage
    output["advantages"] = spread
    return spans


def mask_truncated(output: dict[str, Any], groups: Sequence[Group], accelerator: Accelerator) -> None:
    """
    Take rows that ran into a limit out of the loss. TRL looks for them by their last token, and a row whose last call
    was not answered may end with the token that ends a turn.
    """
    rows = [trajectory.truncated for group in groups for trajectory in group.trajectories]
    whole = ~torch.tensor(rows, device=output["completion_mask"].device).unsqueeze(1)
    for name in ("completion_mask", "tool_mask"):
        if name in output:
            output[name] = output[name] * whole
    loss_mask = output["completion_mask"] * output.get("tool_mask", 1)
    output["num_items_in_batch"] = accelerator.gather(loss_mask.sum()).sum()
