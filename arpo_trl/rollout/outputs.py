"""What a rollout adds to the batch that TRL makes of its rows: columns for reward functions, advantages by token,
masks.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from ..advantages import Span, attribution, check_spans
from .distinct import fork_weights
from .record import call_records
from .tree import Group, Trajectory


def working_rows(groups: Sequence[Group]) -> dict[int, Trajectory]:
    """The trajectories by row, idle ones left out."""
    return {row.row: row for group in groups for row in group.trajectories if row.kind != "idle"}


def with_stand_ins(groups: Sequence[Group], count: int) -> list[Trajectory]:
    """A trajectory for each of `count` rows: where one is missing or idle, the first there is. TRL wants all rows."""
    rows = working_rows(groups)
    return [rows.get(row, next(iter(rows.values()))) for row in range(count)]


def row_rewards(rewards_per_func: torch.Tensor, weights: torch.Tensor) -> list[float | None]:
    """
    The reward of each row, weighted and added as TRL does; `None` for a row without a score.

    Args:
        rewards_per_func (`torch.Tensor` of shape `(B, functions)`): NaN where a function did not score.
        weights (`torch.Tensor` of shape `(functions,)`): `reward_weights`.
    """
    values = (rewards_per_func * weights.to(rewards_per_func.device)).nansum(dim=1)
    values[rewards_per_func.isnan().all(dim=1)] = torch.nan
    return [None if math.isnan(value) else value for value in values.tolist()]


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
    mask_rows(output, [trajectory.truncated for group in groups for trajectory in group.trajectories], accelerator)


def mask_uniform(
    output: dict[str, Any],
    groups: Sequence[Group],
    rewards: Sequence[Sequence[float | None]],
    accelerator: Accelerator,
) -> None:
    """
    Take the groups out of the loss all of whose rows have earned the same, as the dynamic sampling of
    [DAPO](https://huggingface.co/papers/2503.14476) does. Their advantages are 0, but their tokens count where the
    loss is a mean over tokens.

    Args:
        output (`dict[str, Any]`): TRL's batch.
        groups (`Sequence[Group]`): The rows of the batch, in order.
        rewards (`Sequence[Sequence[float | None]]`): Of each group, those of the whole group.
        accelerator ([`~accelerate.Accelerator`]): Adds the tokens of all processes up.
    """
    uniform = []
    for group, group_rewards in zip(groups, rewards, strict=True):
        scored = [reward for reward in group_rewards if reward is not None]
        uniform += [not scored or math.isclose(min(scored), max(scored))] * len(group.rows)
    mask_rows(output, uniform, accelerator)


def mask_rows(output: dict[str, Any], rows: Sequence[bool], accelerator: Accelerator) -> None:
    """Take those of the batch's rows out of the loss for which `rows` is true."""
    kept = ~torch.tensor(rows, device=output["completion_mask"].device).unsqueeze(1)
    for name in ("completion_mask", "tool_mask"):
        if name in output:
            output[name] = output[name] * kept
    loss_mask = output["completion_mask"] * output.get("tool_mask", 1)
    output["num_items_in_batch"] = accelerator.gather(loss_mask.sum()).sum().clamp(min=1)  # what the loss divides by
