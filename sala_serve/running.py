"""Admission: count the requests that run, refuse too many, cut one from outside, drain all before a stop."""

from __future__ import annotations

import asyncio
import logging
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import TYPE_CHECKING, TypeVar

from sala_serve.errors import ClientDisconnected, Conflict, Overloaded, ShuttingDown

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Iterator
    from types import TracebackType

    from starlette.types import Receive

    from sala_serve.telemetry import RequestRecord

logger = logging.getLogger(__name__)

T = TypeVar("T")
_DRAIN_NOTE_S = 10.0
"""Between two lines about a drain."""


class RunningRequest:
    """One request, as a block that can be cut from outside and then raises the cause."""

    def __init__(self, record: RequestRecord | None = None) -> None:
        self._scope = asyncio.timeout(None)
        self._cause: Exception | None = None
        self._is_inside = False
        self.record = record
        self.is_waiting = False
        """Whether it waits for an engine, so that another gateway may as well have it."""
        self.remaining_s: float | None = None
        """Until its end, as far as can be told."""

    async def __aenter__(self) -> RunningRequest:
        await self._scope.__aenter__()
        self._is_inside = True
        if self._cause is not None:  # cut before it began
            self._cut_now()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._is_inside = False
        try:
            await self._scope.__aexit__(kind, error, trace)
        except TimeoutError:
            assert self._cause is not None
            raise self._cause from None

    def cut(self, cause: Exception) -> None:
        """Cancel what the block awaits; the block raises ``cause``. Later cuts change nothing."""
        if self._cause is None:
            self._cause = cause
            if self._is_inside:
                self._cut_now()

    def _cut_now(self) -> None:
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
        self._requests: dict[RunningRequest, None] = {}
        self._shown: dict[RunningRequest, None] = {}
        self._idle = asyncio.Event()
        self._idle.set()
        self.is_draining = False

    def __len__(self) -> int:
        return len(self._requests)

    @asynccontextmanager
    async def admit(self, record: RequestRecord | None = None) -> AsyncIterator[RunningRequest]:
        """Count a request as running for the length of the block.

        Args:
            record: of the request, for those who look at what runs.

        Raises:
            ShuttingDown: the gateway is draining.
            Overloaded: too many requests run.
            GatewayError: the cause given to :meth:`RunningRequest.cut`.
        """
        if self.is_draining:
            raise ShuttingDown("The server is shutting down; please retry.")
        if len(self._requests) >= self._max_requests:
            raise Overloaded("Too many requests are running; please retry.")
        request = RunningRequest(record)
        self._requests[request] = None
        self._idle.clear()
        try:
            async with request:
                yield request
        finally:
            del self._requests[request]
            if not self._requests:
                self._idle.set()

    @contextmanager
    def show(self, record: RequestRecord) -> Iterator[RunningRequest]:
        """Let something that no client waits for be seen and cancelled; it is neither admitted nor drained.

        Whoever runs it enters what this yields.
        """
        request = RunningRequest(record)
        self._shown[request] = None
        try:
            yield request
        finally:
            del self._shown[request]

    def snapshot(self) -> list[RunningRequest]:
        """Return what runs now, for clients and for nobody, each oldest first."""
        return [*self._requests, *self._shown]

    def cancel(self, request_id: str) -> bool:
        """Cut the requests with this id, on an operator's behalf; tell whether there was one."""
        found = [
            each for each in self.snapshot() if each.record and each.record.request_id == request_id
        ]
        for each in found:
            each.cut(Conflict("The request was cancelled by the operator."))
        return bool(found)

    def note_waiting(self, request: RunningRequest) -> None:
        """Take note that ``request`` waits for an engine; a gateway that drains hands it back."""
        request.is_waiting = True
        if self.is_draining:
            request.cut(ShuttingDown("The server is shutting down; please retry."))

    @property
    def remaining_s(self) -> float:
        """Seconds until the last running request should end, as far as can be told."""
        return max((each.remaining_s or 0.0 for each in self._requests), default=0.0)

    async def drain(self, timeout_s: float) -> int:
        """Admit no more requests, hand back those that wait, see the running ones to their end.

        Those that outlast ``timeout_s`` are cut.

        Returns:
            How many requests were cut.
        """
        self.is_draining = True
        for request in self._requests:
            if request.is_waiting:
                self.note_waiting(request)
        try:
            async with asyncio.timeout(timeout_s):
                while self._requests:
                    logger.info(
                        "draining: %d requests run, about %.0f s of work remain",
                        *(len(self._requests), self.remaining_s),
                    )
                    with suppress(TimeoutError):
                        async with asyncio.timeout(_DRAIN_NOTE_S):
                            await self._idle.wait()
        except TimeoutError:
            return self.cut_all()
        return 0

    def cut_all(self) -> int:
        """End every running request with an error now; return how many there were."""
        for request in self._requests:
            request.cut(ShuttingDown("The server stopped before the answer was complete."))
        return len(self._requests)
