"""Remembers what rows have earned, so that a reward function that is asked in the midst of a rollout, and again when
all rows have ended, scores every row once.

What is not here: reward models, which TRL calls itself, for all rows each time.
"""

from collections.abc import Callable, Collection
from typing import Any

from trl.trainer.utils import is_async_callable


class RewardMemory:
    """
    The scores of one rollout, by reward function and row.

    Attributes:
        rows (`Collection[int]`): Rows to score; the others have no score, and no function sees them.
    """

    def __init__(self) -> None:
        self.rows: Collection[int] = ()
        self._scores: dict[int, dict[int, float | None]] = {}

    def clear(self) -> None:
        """A rollout begins."""
        self._scores.clear()

    def of(self, index: int, function: Callable[..., Any], quiet: bool) -> Callable[..., Any]:
        """
        `function`, which scores those of the rows that it has not scored before.

        Args:
            index (`int`): Of the function.
            function (`Callable`): Reward function, sync or async, whose scores of rows do not depend on each other.
            quiet (`bool`): Whether `log_extra` and `log_metric` log nothing. Otherwise a column has `None` for rows
                that were scored before.
        """
        known = self._scores.setdefault(index, {})

        def asked(kwargs: dict[str, Any]) -> tuple[list[int], dict[str, Any]]:
            total = len(kwargs["completions"])
            rows = [row for row in range(total) if row in self.rows and row not in known]
            some = {
                key: [value[row] for row in rows] if isinstance(value, list) else value
                for key, value in kwargs.items()
            }
            log_extra, log_metric = kwargs.get("log_extra"), kwargs.get("log_metric")

            def spread(column: str, values: list) -> None:
                if log_extra is not None and not quiet:
                    by_row = dict(zip(rows, values, strict=True))
                    log_extra(column, [by_row.get(row) for row in range(total)])

            def log(metric: str, value: float) -> None:
                if log_metric is not None and not quiet:
                    log_metric(metric, value)

            return rows, some | {"log_extra": spread, "log_metric": log}

        def answer(kwargs: dict[str, Any], rows: list[int], scores: list[float | None]) -> list[float | None]:
            known.update(zip(rows, scores, strict=True))
            # 0 for what is not to be scored: `None` makes TRL warn of the row
            return [known.get(row, 0.0) for row in range(len(kwargs["completions"]))]

        async def remembered_async(**kwargs: Any) -> list[float | None]:
            rows, some = asked(kwargs)
            return answer(kwargs, rows, await function(**some) if rows else [])

        def remembered(**kwargs: Any) -> list[float | None]:
            rows, some = asked(kwargs)
            return answer(kwargs, rows, function(**some) if rows else [])

        return remembered_async if is_async_callable(function) else remembered
