"""Between the one who computes an answer and the one who reads it."""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Coroutine

T = TypeVar("T")
MAX_PIECES = 64
"""Of an answer that wait for their reader; then the engine waits too."""


class Updates(Generic[T]):
    """Notes, of which only the last matters, and pieces, of which none is lost."""

    def __init__(self) -> None:
        self._note: T | None = None
        self._pieces: deque[T] = deque()
        self._has_news = asyncio.Event()
        self._has_room = asyncio.Event()
        self._has_room.set()
        self._is_over = False

    def note(self, update: T) -> None:
        """Replace the last note, unless it was read."""
        self._note = update
        self._has_news.set()

    async def piece(self, update: T) -> None:
        """Add a piece; waits for a reader that is ``MAX_PIECES`` behind."""
        await self._has_room.wait()
        self._note = None  # what was said while there was nothing else to say
        self._pieces.append(update)
        if len(self._pieces) >= MAX_PIECES:
            self._has_room.clear()
        self._has_news.set()

    def end(self) -> None:
        """Nothing more comes."""
        self._is_over = True
        self._has_news.set()

    async def read(self) -> T | None:
        """Return the next update, ``None`` at the end."""
        while True:
            if self._pieces:
                piece = self._pieces.popleft()
                self._has_room.set()
                return piece
            if self._note is not None:
                note, self._note = self._note, None
                return note
            if self._is_over:
                return None
            self._has_news.clear()
            await self._has_news.wait()


@asynccontextmanager
async def beside(work: Coroutine[Any, Any, None]) -> AsyncIterator[asyncio.Task[None]]:
    """Run ``work`` for the length of the block; at its end nothing of it is left.

    Not a task group: that would wrap the ``GeneratorExit`` of a reader who leaves, and the error of
    ``work``, which the block gets by awaiting the task.
    """
    task = asyncio.create_task(work)
    try:
        yield task
    finally:
        task.cancel()
        cancelled: asyncio.CancelledError | None = None
        while not task.done():
            try:
                await asyncio.wait({task})
            except asyncio.CancelledError as error:  # it ends within seconds, and must be seen to
                cancelled = error
        if cancelled is not None:
            raise cancelled
        if not task.cancelled() and (failure := task.exception()) is not None:
            raise failure
