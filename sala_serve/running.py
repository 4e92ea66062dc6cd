"""Admission: count the requests that run, refuse too many, cut one from outside, drain all before a stop."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, TypeVar

from sala_serve.errors import ClientDisconnected, GatewayError, Overloaded, ShuttingDown

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable
    from types import TracebackType

    from starlette.types import Receive

T = TypeVar("T")


class RunningRequest:
    """One request, as a block that can be cut from outside and then raises the cause."""

    def __init__(self) -> None:
        self._scope = asyncio.timeout(None)
        self._cause: GatewayError | None = None

    async def __aenter__(self) -> RunningRequest:
        await self._scope.__aenter__()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            await self._scope.__aexit__(kind, error, trace)
        except TimeoutError:
            assert self._cause is not None
            raise self._cause from None

    def cut(self, cause: GatewayError) -> None:
        """Cancel what the block awaits; the block raises ``cause``. Later cuts change nothing."""
        if self._cause is None:
            self._cause = cause
            self._scope.reschedule(asyncio.get_running_loop().time())

    async def while_client_stays(self, work: Awaitable[T], receive: Receive) -> T:
        """Await ``work``; cut the block when the client disconnects.

        ``receive`` is watched all the while, so ``work`` must neither read the request nor finish the
        answer (a finished answer reads as a disconnect).
        """
        try:
            async with asyncio.TaskGroup() as group:
                watcher = group.create_task(self._watch(receive))
                try:
                    return await work
                finally:
                    watcher.cancel()
        except BaseExceptionGroup as errors:
            # the watcher never fails, so this is the one error of ``work``
            raise errors.exceptions[0]  # noqa: B904 - its own cause must stay

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.cut(ClientDisconnected("The client closed the connection."))


class RunningRequests:
    """All running requests of one gateway, ``max_requests`` at most."""

    def __init__(self, max_requests: int) -> None:
        self._max_requests = max_requests
        self._requests: set[RunningRequest] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self.is_draining = False

    def __len__(self) -> int:
        return len(self._requests)

    @asynccontextmanager
    async def admit(self) -> AsyncIterator[RunningRequest]:
        """Count a request as running for the length of the block.

        Raises:
            ShuttingDown: the gateway is draining.
            Overloaded: too many requests run.
            GatewayError: the cause given to :meth:`RunningRequest.cut`.
        """
        if self.is_draining:
            raise ShuttingDown("The server is shutting down; please retry.")
        if len(self._requests) >= self._max_requests:
            raise Overloaded("Too many requests are running; please retry.")
        request = RunningRequest()
        self._requests.add(request)
        self._idle.clear()
        try:
            async with request:
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
