"""How many tokens were scored packed, and why the others were not: counts that add up over chunks and processes."""

from collections.abc import Mapping
from typing import NamedTuple


class NotPacked(NamedTuple):
    """Why rows are scored row by row: `code`, the end of a metric's name, and `text`, the rest of a sentence."""

    code: str
    text: str


def chunk_counts(scored: int, row_by_row: int, outcome: int | NotPacked) -> dict[str, int]:
    """
    Counts of one chunk.

    Args:
        scored (`int`): Completion tokens that have a log-probability.
        row_by_row (`int`): Tokens that the model computes row by row, padding included.
        outcome (`int` or [`NotPacked`]): Tokens that it computed packed, or why it computed them row by row.

    Returns:
        `dict[str, int]`: what [`scoring_metrics`] makes fractions of.
    """
    if isinstance(outcome, NotPacked):
        return {f"not_packed/{outcome.code}": scored, "computed": row_by_row, "row_by_row": row_by_row}
    return {"packed": scored, "computed": outcome, "row_by_row": row_by_row}


def scoring_metrics(counts: Mapping[str, int]) -> dict[str, float]:
    """
    Metrics of the chunks whose counts were added up; none if no token was scored. The fraction that was packed and
    those that were not, by reason, add up to 1.

    Args:
        counts (`Mapping[str, int]`): Sums of [`chunk_counts`].

    Returns:
        `dict[str, float]`: value by name of the metric.
    """
    reasons = sorted(name for name in counts if name.startswith("not_packed/"))
    scored = counts.get("packed", 0) + sum(counts[name] for name in reasons)
    if not scored:
        return {}
    return {
        "arpo/packed_token_fraction": counts.get("packed", 0) / scored,
        "arpo/computed_token_fraction": counts["computed"] / counts["row_by_row"],
        **{f"arpo/{name}": counts[name] / scored for name in reasons},
    }
