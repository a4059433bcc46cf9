"""Calls reward functions so that a completion on which one raises costs that row its score, and not the run, and so that
what one does to its arguments stays its own.

What is not here: reward models, which TRL calls itself, and time-outs: a function that hangs is named in a warning. Of
what a function logs with `log_extra` and `log_metric`, that of its first call is kept.
"""

import asyncio
import math
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers.utils import logging
from trl.trainer.utils import is_async_callable

from ..execution.errors import error_repr
from ..plain_data import copied

logger = logging.get_logger(__name__)

# The score of a row on which a function raised. Not `None`, which says that the function does not apply to the row
UNSCORED = math.inf

# Seconds after which a warning names the function that training waits for
SLOW_SECONDS = 300.0


def guarded(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """
    `function`, with three differences. Where it raises, the rows on which it raises alone are looked for by halving, and
    it is called for all others together; those rows are `UNSCORED`. Every call gets lists and dicts of its own, no two
    rows the same, so that a function may change them in place. And what it returns is one number or `None` a row, or else
    an error that names the function and the row.

    Of n rows on which one raises, that takes 2 + 2·log2(n) calls; always fewer than 2·n + 2.

    Args:
        function (`Callable`): Reward function, sync or async.
        name (`str`): What messages call it.

    Returns:
        `Callable`: as `function`, sync or async. It raises what `function` raises on every row alone, or on the rows
        together on none of which it raised alone.
    """

    async def guard_async(**kwargs: Any) -> list[float | None]:
        rows = list(range(len(kwargs["completions"])))
        with _told_if_slow(name):
            try:
                scores = await function(**_own(kwargs, rows))
            except Exception as error:
                search = _Search(rows)
                while search.parts:
                    calls = (function(**_own(kwargs, part, again=True)) for part in search.parts)
                    results = await asyncio.gather(*calls, return_exceptions=True)
                    search.narrow([isinstance(result, Exception) for result in results])
                kept = _kept(rows, search.found, error, name)
                with _named(name, kept):
                    scores = await function(**_own(kwargs, kept, again=True))
                return _numbers(scores, kept, len(rows), name)
        return _numbers(scores, rows, len(rows), name)

    def guard(**kwargs: Any) -> list[float | None]:
        rows = list(range(len(kwargs["completions"])))
        with _told_if_slow(name):
            try:
                scores = function(**_own(kwargs, rows))
            except Exception as error:
                search = _Search(rows)
                while search.parts:
                    search.narrow([_raises(function, _own(kwargs, part, again=True)) for part in search.parts])
                kept = _kept(rows, search.found, error, name)
                with _named(name, kept):
                    scores = function(**_own(kwargs, kept, again=True))
                return _numbers(scores, kept, len(rows), name)
        return _numbers(scores, rows, len(rows), name)

    return guard_async if is_async_callable(function) else guard


class _Search:
    """
    The rows on which a function raises alone, by halving the parts on which it raises.

    Attributes:
        parts (`list[list[int]]`): Rows to call the function for, each part by itself; empty when the search is over.
        found (`list[int]`): Rows on which it raised alone.
    """

    def __init__(self, rows: list[int]):
        self.found: list[int] = []
        self.parts = self._divided([rows]) if len(rows) > 1 else [rows]

    def narrow(self, raised: list[bool]) -> None:
        """Go on from whether the function raised on each part."""
        bad = [part for part, failed in zip(self.parts, raised, strict=True) if failed]
        self.found += [part[0] for part in bad if len(part) == 1]
        rest = [part for part in bad if len(part) > 1]
        # Where all parts raise, halving would go through all of them at every size
        many = len(bad) == len(self.parts) >= 4
        self.parts = [[row] for part in rest for row in part] if many else self._divided(rest)

    @staticmethod
    def _divided(parts: list[list[int]]) -> list[list[int]]:
        return [half for part in parts for half in (part[: len(part) // 2], part[len(part) // 2 :])]


@contextmanager
def _told_if_slow(name: str) -> Iterator[None]:
    timer = threading.Timer(
        SLOW_SECONDS,
        logger.warning,
        [
            f"The reward function '{name}' has not returned for {SLOW_SECONDS:g} s, and training waits for it. Give what "
            "it waits for a time-out."
        ],
    )
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _own(kwargs: dict[str, Any], rows: list[int], again: bool = False) -> dict[str, Any]:
    """The arguments of a reward function for some of its rows, in lists and dicts of its own; `again`: without logging."""
    some = {
        key: [copied(value[row]) for row in rows] if isinstance(value, list) else value
        for key, value in kwargs.items()
    }
    if again:
        some |= {"log_extra": lambda column, values: None, "log_metric": lambda metric, value: None}
    return some


def _raises(function: Callable[..., Any], kwargs: dict[str, Any]) -> bool:
    try:
        function(**kwargs)
    except Exception:
        return True
    return False


def _kept(rows: list[int], found: list[int], error: Exception, name: str) -> list[int]:
    """The rows that can be scored. Tells which cannot; raises `error` if none can."""
    if len(found) == len(rows):
        error.add_note(f"Raised by the reward function '{name}' for row 0 and each of the other {len(rows) - 1} rows.")
        raise error
    failed = ", ".join(map(str, sorted(found)))
    without = f"row {failed} has no score" if found else "no row alone makes it raise"
    logger.warning(
        f"The reward function '{name}' raised {error_repr(error)} on {len(rows)} rows; {without}.", exc_info=error
    )
    return [row for row in rows if row not in found]


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
