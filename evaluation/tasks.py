"""Concurrent coroutines, few enough at a time that a long run does not gather in memory."""

import asyncio
from collections.abc import Callable, Coroutine
from types import TracebackType
from typing import Any


class BoundedTasks:
    """An asyncio.TaskGroup of which at most `limit` tasks run at once.

    Leaving the block waits for all tasks. The first error cancels the others, and the block raises it.
    """

    def __init__(self, limit: int):
        self._group = asyncio.TaskGroup()
        self._slots = asyncio.Semaphore(limit)

    async def __aenter__(self) -> "BoundedTasks":
        await self._group.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            await self._group.__aexit__(kind, error, traceback)
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None

    async def add(self, function: Callable[..., Coroutine], *arguments: Any) -> None:
        """Start `function(*arguments)` as soon as fewer than `limit` tasks run."""
        await self._slots.acquire()
        task = self._group.create_task(function(*arguments))
        task.add_done_callback(lambda _: self._slots.release())
