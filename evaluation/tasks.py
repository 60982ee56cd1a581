"""Run coroutines concurrently, with a limit that bounds the memory of a long run."""

import asyncio
from collections.abc import Callable, Coroutine
from types import TracebackType
from typing import Any


class BoundedTasks:
    """An asyncio.TaskGroup that runs at most `limit` tasks at once.

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
        """Wait until fewer than `limit` tasks run, then start `function(*arguments)`."""
        await self._slots.acquire()
        task = self._group.create_task(function(*arguments))
        task.add_done_callback(lambda _: self._slots.release())
