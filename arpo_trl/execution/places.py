"""How many calls of one tool run at the same time, and what becomes of those that hang."""

import asyncio
import logging
from collections import deque

logger = logging.getLogger(__name__)


class Places:
    """Places for the calls of one tool that run at the same time.

    Args:
        name (`str`): The tool.
        limit (`float`): Number of places.
        most_stuck (`float`): Calls that were given up but live on, from which on the tool is not called any more.
    """

    def __init__(self, name: str, limit: float, most_stuck: float):
        self.name = name
        self.limit = limit
        self.most_stuck = most_stuck
        self.taken = 0
        self.stuck = 0
        self._waiting: deque[asyncio.Future] = deque()

    async def enter(self) -> None:
        while self.stuck >= self.most_stuck or self.taken >= self.limit:
            if self.stuck >= self.most_stuck:
                raise RuntimeError(
                    f"Tool {self.name} is not called: {self.stuck} earlier calls of it hang and cannot be stopped."
                )
            self._waiting.append(asyncio.get_running_loop().create_future())
            await self._waiting[-1]
        self.taken += 1

    def leave(self) -> None:
        self.taken -= 1
        self._wake(1)

    def more_stuck(self) -> None:
        self.stuck += 1
        if self.stuck == 1:
            logger.warning(
                "Tool %s hangs and cannot be stopped. Give what it waits for a time-out of its own, or run it in "
                "worker processes: tool(..., process=True).",
                self.name,
            )
        if self.stuck >= self.most_stuck:
            self._wake(len(self._waiting))

    def _wake(self, count: int) -> None:
        while count and self._waiting:
            waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_result(None)
                count -= 1
