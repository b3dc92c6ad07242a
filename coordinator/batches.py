"""One piece of work for all that ask while the one before is under way.

A commit waits for the disk, a query costs more in Python than in the database. One of each for every call would let them
decide how many devices a coordinator can have.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

from pocketfed.coordinator.store import is_outage

A = TypeVar("A")
B = TypeVar("B")
MOST = 256  # at a time: others want the database too


class Batches(Generic[A, B]):
    """`ask(item)` gives what `work(items)` has made of it. Lives on an event loop.

    Args:
        run: runs a function elsewhere, e.g. in a thread.
        work: a result for every item; an exception among them is raised for that item alone.
    """

    def __init__(
        self,
        run: Callable[..., Awaitable[list[B | Exception]]],
        work: Callable[[Sequence[A]], list[B | Exception]],
    ) -> None:
        self._run, self._work = run, work
        self._waiting: list[tuple[A, asyncio.Future[B]]] = []
        self._working: asyncio.Task[None] | None = None

    def ask(self, item: A) -> asyncio.Future[B]:
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        self._waiting.append((item, future))
        if self._working is None:
            self._working = loop.create_task(self._go_on())
        return future

    def __len__(self) -> int:
        """How many wait for the next batch."""
        return len(self._waiting)

    async def _go_on(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting[:MOST], self._waiting[MOST:]
            for (_, future), result in zip(batch, await self._results([item for item, _ in batch]), strict=True):
                if future.done():  # whoever asked has gone
                    continue
                if isinstance(result, Exception):
                    future.set_exception(result)
                else:
                    future.set_result(result)
        self._working = None

    async def _results(self, items: Sequence[A]) -> list[B | Exception]:
        """What goes wrong for one of them is not to be the others' fault; an outage is everybody's."""
        try:
            return await self._run(self._work, items)
        except Exception as error:
            if len(items) == 1 or is_outage(error):
                return [error] * len(items)
        return [(await self._results([item]))[0] for item in items]
