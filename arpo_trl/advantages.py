"""Who gets which advantage: attribution over a tree of rows, as pure functions.

An attribution of one's own is a function like [`hard_advantages`], named in the config as
`"my_module:my_attribution"`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from .named import named, takes


class Span(NamedTuple):
    """Tokens `start` to `end` (exclusive) of a row that have the same advantage."""

    start: int
    end: int
    advantage: float


Attribution: TypeAlias = Callable[
    [Sequence[float], Sequence[int | None], Sequence[int | None], Sequence[int]], list[list[Span]]
]
"""Arguments and returns are those of [`hard_advantages`]."""


def soft_advantages(
    advantages: Sequence[float],
    parents: Sequence[int | None],
    fork_tokens: Sequence[int | None],
    lengths: Sequence[int],
) -> list[list[Span]]:
    """
    Give each token its row's advantage (ARPO, section 3.2, https://huggingface.co/papers/2507.19849).

    Rows that share a token have it each, with the same importance ratio, so the update averages over them.

    Args and returns are those of [`hard_advantages`].
    """
    return [[Span(0, length, advantage)] for advantage, length in zip(advantages, lengths, strict=True)]


def hard_advantages(
    advantages: Sequence[float],
    parents: Sequence[int | None],
    fork_tokens: Sequence[int | None],
    lengths: Sequence[int],
) -> list[list[Span]]:
    """
    Give each token the mean advantage of the rows that share it; a row's own tokens keep the row's advantage (ARPO,
    section 3.2, https://huggingface.co/papers/2507.19849).

    Args:
        advantages (`Sequence[float]`): Group-normalised advantage of each row.
        parents (`Sequence[int | None]`): Row that each row left; `None` for a row that starts from the prompt. A
            parent stands before its forks or after them, and may itself be a fork.
        fork_tokens (`Sequence[int | None]`): Index of the completion token at which each row left its parent.
        lengths (`Sequence[int]`): Completion tokens of each row.

    Returns:
        `list[list[Span]]`: for each row, the spans that cover its `lengths[row]` tokens.
    """
    children: dict[int, list[int]] = {}
    for row, parent in enumerate(parents):
        if parent is not None:
            children.setdefault(parent, []).append(row)

    def subtree(row: int) -> list[int]:
        return [row] + [below for child in children.get(row, []) for below in subtree(child)]

    sampled: dict[int, list[Span]] = {}  # spans of the tokens that a row does not have from its parent
    left_at = [token or 0 for token in fork_tokens]
    for row, length in enumerate(lengths):
        start = left_at[row] if parents[row] is not None else 0
        # Walking back from the end, each fork point adds a whole subtree to the rows that share what lies before it.
        cuts = sorted(children.get(row, []), key=lambda child: left_at[child], reverse=True)
        spans, sharing, end = [], [row], length
        for child in cuts:
            if left_at[child] < end:
                spans.append(Span(left_at[child], end, _mean(advantages, sharing)))
                end = left_at[child]
            sharing = sharing + subtree(child)
        if start < end:
            spans.append(Span(start, end, _mean(advantages, sharing)))
        sampled[row] = spans[::-1]

    def spans_before(row: int, stop: int) -> list[Span]:
        """Spans of the first `stop` tokens of `row`."""
        parent = parents[row]
        inherited = [] if parent is None else spans_before(parent, min(stop, left_at[row]))
        return inherited + [Span(s.start, min(s.end, stop), s.advantage) for s in sampled[row] if s.start < stop]

    return [spans_before(row, length) for row, length in enumerate(lengths)]


def _mean(advantages: Sequence[float], rows: Sequence[int]) -> float:
    return sum(advantages[row] for row in rows) / len(rows)


def tree_advantages(
    advantages: Sequence[float],
    parents: Sequence[int | None],
    fork_tokens: Sequence[int | None],
    lengths: Sequence[int],
) -> list[list[Span]]:
    """
    Give each token what it adds: to the whole group, and to what was expected where its branch was entered.

    With V the mean advantage of the rows that share a token, a token gets ½ [(V − V_group) + (V − V_before)]: V_group
    is 0, since advantages are centred on the group, and V_before is the V of the last token before the nearest fork
    that the row has passed, V_group if it has passed none. It is the process reward of
    [TreeRL](https://huggingface.co/papers/2506.11902), global plus local advantage, halved so that a row without forks
    has GRPO's advantage, and without its factor 1/√n for a token of n rows.

    Args and returns are those of [`hard_advantages`].
    """
    return [
        [
            span._replace(advantage=span.advantage - before / 2)
            for span, before in zip(spans, [0.0, *(span.advantage for span in spans)], strict=False)
        ]
        for spans in hard_advantages(advantages, parents, fork_tokens, lengths)
    ]


ATTRIBUTIONS: Mapping[str, Attribution] = {
    "soft": soft_advantages,
    "hard": hard_advantages,
    "tree": tree_advantages,
}
"""The attributions of this package, by the names that `ARPOConfig.advantage_attribution` takes."""


def attribution(name: str) -> Attribution:
    """
    The function that `advantage_attribution` names.

    Raises:
        ValueError: There is none, or it cannot be called with the arguments of [`hard_advantages`].
    """
    found = named(name, ATTRIBUTIONS, "advantage_attribution", "a function of your own as 'my_module:my_attribution'")
    if not callable(found) or not takes(found, 4):
        raise ValueError(
            f"`advantage_attribution` is {name!r}, which is no function of (advantages, parents, fork_tokens, "
            "lengths); make it one like `arpo_trl.advantages.hard_advantages`."
        )
    return found


def check_spans(spans: Sequence[Sequence[Span]], lengths: Sequence[int], name: str) -> None:
    """
    Hold what an attribution returned to its promise: for each row, spans that cover it from its first token to its
    last, each with a finite advantage.

    Args:
        spans (`Sequence[Sequence[Span]]`): What it returned.
        lengths (`Sequence[int]`): Completion tokens of each row.
        name (`str`): The attribution's name in the config, for the error.

    Raises:
        ValueError: They do not.
    """
    if not isinstance(spans, Sequence) or len(spans) != len(lengths):
        raise ValueError(
            f"`advantage_attribution` is {name!r}, which returned {_short(spans)} for {len(lengths)} rows; return a "
            "list of spans for each."
        )
    for row, (row_spans, length) in enumerate(zip(spans, lengths, strict=True)):
        if not isinstance(row_spans, Sequence) or not all(isinstance(span, Span) for span in row_spans):
            raise ValueError(
                f"`advantage_attribution` is {name!r}, which returned {_short(row_spans)} for row {row}; return a "
                "list of `arpo_trl.advantages.Span`."
            )
        bounds = [0, *(bound for span in row_spans for bound in (span.start, span.end)), length]
        if any(end != start for end, start in zip(bounds[::2], bounds[1::2], strict=True)):
            raise ValueError(
                f"`advantage_attribution` is {name!r}, whose spans {[(span.start, span.end) for span in row_spans]} "
                f"do not cover the {length} tokens of row {row}; return spans that follow each other from 0 to "
                f"{length}."
            )
        for span in row_spans:
            if not isinstance(span.advantage, int | float) or not math.isfinite(span.advantage):
                raise ValueError(
                    f"`advantage_attribution` is {name!r}, which returned the advantage {span.advantage!r} for tokens "
                    f"{span.start} to {span.end} of row {row}; return a finite float."
                )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:80] + "…"
