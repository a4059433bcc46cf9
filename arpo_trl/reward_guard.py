"""Calls reward functions so that a completion on which one raises costs that row its score, and not the run.

What is not here: reward models, which TRL calls itself, and time-outs. Of what a function logs with `log_extra` and
`log_metric`, that of its first call is kept.
"""

import asyncio
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers.utils import logging
from trl.trainer.utils import is_async_callable

logger = logging.get_logger(__name__)

# The score of a row on which a function raised. Not `None`, which says that the function does not apply to the row
UNSCORED = math.inf


def guarded(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """
    `function`, with two differences. Where it raises, it is called for each row alone, and then for all rows on which it
    did not raise again; the others are `UNSCORED`. And what it returns is one number or `None` a row, or else an error
    that names the function and the row.

    Args:
        function (`Callable`): Reward function, sync or async.
        name (`str`): What messages call it.

    Returns:
        `Callable`: as `function`, sync or async. It raises what `function` raises on every row alone, or on the rows
        together that it had scored alone.
    """

    async def guard_async(**kwargs: Any) -> list[float | None]:
        rows = list(range(len(kwargs["completions"])))
        try:
            scores = await function(**kwargs)
        except Exception as error:
            alone = (function(**_select(kwargs, [row])) for row in rows)
            results = await asyncio.gather(*alone, return_exceptions=True)
            kept = _kept([isinstance(result, Exception) for result in results], error, name)
            with _named(name, kept):
                return _numbers(await function(**_select(kwargs, kept)), kept, len(rows), name)
        return _numbers(scores, rows, len(rows), name)

    def guard(**kwargs: Any) -> list[float | None]:
        rows = list(range(len(kwargs["completions"])))
        try:
            scores = function(**kwargs)
        except Exception as error:
            kept = _kept([_raises(function, _select(kwargs, [row])) for row in rows], error, name)
            with _named(name, kept):
                return _numbers(function(**_select(kwargs, kept)), kept, len(rows), name)
        return _numbers(scores, rows, len(rows), name)

    return guard_async if is_async_callable(function) else guard


def _select(kwargs: dict[str, Any], rows: list[int]) -> dict[str, Any]:
    """The arguments of a reward function for some of its rows."""
    some = {key: [value[row] for row in rows] if isinstance(value, list) else value for key, value in kwargs.items()}
    return {**some, "log_extra": lambda column, values: None, "log_metric": lambda metric, value: None}


def _raises(function: Callable[..., Any], kwargs: dict[str, Any]) -> bool:
    try:
        function(**kwargs)
    except Exception:
        return True
    return False


def _kept(raised: list[bool], error: Exception, name: str) -> list[int]:
    """The rows that can be scored. Tells which cannot; raises `error` if none can."""
    if all(raised):
        error.add_note(
            f"Raised by the reward function '{name}' for row 0 and each of the other {len(raised) - 1} rows."
        )
        raise error
    failed = [row for row, failed in enumerate(raised) if failed]
    without = f"row {', '.join(map(str, failed))} has no score" if failed else "no row alone makes it raise"
    logger.warning(f"The reward function '{name}' raised {error!r} on {len(raised)} rows; {without}.", exc_info=error)
    return [row for row, failed in enumerate(raised) if not failed]


@contextmanager
def _named(name: str, rows: list[int]) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        error.add_note(f"Raised by the reward function '{name}' for rows {', '.join(map(str, rows))} together.")
        raise


def _numbers(scores: Any, rows: list[int], total: int, name: str) -> list[float | None]:
    """One number or `None` for each of `total` rows; `scores` are those of `rows`."""
    if not isinstance(scores, Iterable) or isinstance(scores, (str, dict)):
        raise TypeError(
            f"The reward function '{name}' returned {scores!r}; return a list with a number (or None) for each row."
        )
    scores = list(scores)
    if len(scores) != len(rows):
        raise ValueError(
            f"The reward function '{name}' returned {len(scores)} rewards for {len(rows)} rows; return one for each."
        )
    numbers: list[float | None] = [UNSCORED] * total
    for row, score in zip(rows, scores, strict=True):
        try:
            if isinstance(score, str):  # also not "1.0"
                raise TypeError
            numbers[row] = None if score is None else float(score)
        except (TypeError, ValueError):
            raise TypeError(
                f"The reward function '{name}' returned {score!r} for row {row}; return a number, or None for no score."
            ) from None
        if numbers[row] in (math.inf, -math.inf):
            logger.warning(f"The reward function '{name}' returned {score} for row {row}, which has no score.")
    return numbers
