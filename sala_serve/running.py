"""The requests that run now: count them, cut one when its client leaves, drain all before a stop."""

from __future__ import annotations

import asyncio
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from sala_serve.errors import ClientDisconnected, ShuttingDown

if TYPE_CHECKING:
    from collections.abc import Awaitable, Iterator

    from starlette.types import Receive

    from sala_serve.errors import GatewayError

T = TypeVar("T")


class RunningRequest:
    """One request whose work can be cut from outside, with the error it then ends in."""

    def __init__(self) -> None:
        self._scope = asyncio.timeout(None)
        self._cause: GatewayError | None = None

    def cut(self, cause: GatewayError) -> None:
        """Cancel the work; :meth:`run` then raises ``cause``. Later cuts change nothing."""
        if self._cause is None:
            self._cause = cause
            self._scope.reschedule(asyncio.get_running_loop().time())

    async def run(self, work: Awaitable[T], receive: Receive) -> T:
        """Await ``work`` unless the client disconnects or :meth:`cut` is called first.

        ``receive`` is watched all the while, so ``work`` must neither read the request nor finish the
        answer (a finished answer reads as a disconnect).

        Raises:
            ClientDisconnected: the client left.
            GatewayError: the cause given to :meth:`cut`.
        """
        try:
            async with asyncio.TaskGroup() as group:
                watcher = group.create_task(self._watch(receive))
                try:
                    return await self._run(work)
                finally:
                    watcher.cancel()
        except BaseExceptionGroup as errors:
            # the watcher never fails, so this is the one error of ``work``
            raise errors.exceptions[0]  # noqa: B904 - its own cause must stay

    async def _run(self, work: Awaitable[T]) -> T:
        try:
            async with self._scope:
                return await work
        except TimeoutError:
            if self._cause is None:
                raise
            raise self._cause from None

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.cut(ClientDisconnected("The client closed the connection."))


class RunningRequests:
    """All running requests of one gateway."""

    def __init__(self) -> None:
        self._requests: set[RunningRequest] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self.is_draining = False

    def __len__(self) -> int:
        return len(self._requests)

    @contextmanager
    def admit(self) -> Iterator[RunningRequest]:
        """Count a request as running for the length of the ``with`` block.

        Raises:
            ShuttingDown: the gateway is draining.
        """
        if self.is_draining:
            raise ShuttingDown("The server is shutting down; please retry.", retry_after_s=5)
        request = RunningRequest()
        self._requests.add(request)
        self._idle.clear()
        try:
            yield request
        finally:
            self._requests.discard(request)
            if not self._requests:
                self._idle.set()

    async def drain(self, timeout_s: float) -> int:
        """Admit no more requests, wait for the running ones, cut those that outlast ``timeout_s``.

        Returns:
            How many requests were cut.
        """
        self.is_draining = True
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return self.cut_all()
        return 0

    def cut_all(self) -> int:
        """End every running request with an error now; return how many there were."""
        for request in self._requests:
            request.cut(ShuttingDown("The server stopped before the answer was complete."))
        return len(self._requests)
