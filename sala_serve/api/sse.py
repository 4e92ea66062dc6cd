"""The wire: sends answers to a client, which must keep reading."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING

from sala_serve.errors import ClientDisconnected
from sala_serve.middleware import send_error
from sala_serve.telemetry import RequestRecord

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from starlette.types import Message, Receive, Scope, Send

    from sala_serve.errors import GatewayError

_PIECE_BYTES = 64 * 1024
_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would hold events back
]


class AnswerWriter:
    """Sends one answer to a client, which must keep reading: slow readers hold memory and the engine.

    Each method raises :class:`ClientDisconnected` when the client takes nothing for ``send_timeout_s``.
    """

    def __init__(self, send: Send, *, send_timeout_s: float) -> None:
        self._send = send
        self._send_timeout_s = send_timeout_s
        self.headers: dict[str, str] = {}
        """Sent with the status, beside those of the kind of answer."""
        self.is_started = False
        """Whether the status is on its way, so that it can no longer be an error's."""
        self.is_whole_started = False
        """Whether it is the status of a whole answer, to which no error can be added either."""

    async def write_event(self, event: bytes) -> None:
        """Send one event of a stream, after the answer's head if it is the first."""
        if not self.is_started:
            await self._start(_STREAM_HEADERS)
        await self._send_in_time({"type": "http.response.body", "body": event, "more_body": True})

    async def finish(self) -> None:
        """End the answer."""
        await self._send_in_time({"type": "http.response.body", "body": b"", "more_body": False})

    async def write_json(self, body: bytes) -> None:
        """Send a whole answer that is not a stream."""
        await self.begin_whole("application/json", len(body))
        for start in range(0, len(body), _PIECE_BYTES):
            await self.write_piece(body[start : start + _PIECE_BYTES])
        await self.finish()

    async def begin_whole(self, content_type: str, num_bytes: int) -> None:
        """Send the head of an answer of so many bytes, which come with :meth:`write_piece`."""
        self.is_whole_started = True
        await self._start(
            [(b"content-type", content_type.encode()), (b"content-length", b"%d" % num_bytes)]
        )

    async def write_piece(self, piece: bytes) -> None:
        """Send the next bytes of a whole answer."""
        await self._send_in_time({"type": "http.response.body", "body": piece, "more_body": True})

    async def fail(
        self,
        error: GatewayError,
        scope: Scope,
        receive: Receive,
        *,
        last_event: Callable[[GatewayError], Awaitable[bytes]] | None = None,
    ) -> None:
        """End an answer that failed as it can still be told, and note that in the request's record.

        Before the status it is answered with its own; a stream ends with one event; a whole answer, and one that
        nobody reads, breaks off.

        Args:
            error: why it failed.
            scope: of the request.
            receive: of the request.
            last_event: returns what a stream ends with; none: :meth:`GatewayError.event`.
        """
        record = RequestRecord.of(scope)
        record.status, record.error_code = error.status, error.code
        if isinstance(error, ClientDisconnected) or self.is_whole_started:
            return  # the server closes the connection of an answer that is not complete
        if not self.is_started:
            await send_error(error, scope, receive, self._send)
            return
        with suppress(ClientDisconnected):
            await self.write_event(await last_event(error) if last_event else error.event())
            await self.finish()

    async def _start(self, headers: list[tuple[bytes, bytes]]) -> None:
        self.is_started = True
        headers = headers + [
            (name.lower().encode("latin-1"), value.encode("latin-1"))
            for name, value in self.headers.items()
        ]
        await self._send_in_time({"type": "http.response.start", "status": 200, "headers": headers})

    async def _send_in_time(self, message: Message) -> None:
        try:
            async with asyncio.timeout(self._send_timeout_s):
                await self._send(message)
        except TimeoutError:
            raise ClientDisconnected("The client reads too slowly.") from None
