"""Server-sent events: cut the engine's byte stream into events, write events to a client."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from sala_serve.errors import ClientDisconnected

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator

    from starlette.types import Send

DONE = b"[DONE]"
_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would hold events back
]


async def split_events(chunks: AsyncIterator[bytes]) -> AsyncGenerator[bytes]:
    """Yield each event or comment with its closing blank line; a torn last one is dropped."""
    buffer = bytearray()
    async for chunk in chunks:
        searched = max(len(buffer) - 1, 0)
        buffer += chunk
        while (end := buffer.find(b"\n\n", searched)) >= 0:
            yield bytes(buffer[: end + 2])
            del buffer[: end + 2]
            searched = 0


def event_data(event: bytes) -> bytes | None:
    """Return the payload of a one-line ``data:`` event, ``None`` for a comment."""
    return event.removeprefix(b"data:").strip() if event.startswith(b"data:") else None


class EventWriter:
    """Writes one answer as a stream of events; nothing is sent before the first :meth:`write`."""

    def __init__(self, send: Send, *, send_timeout_s: float) -> None:
        self._send = send
        self._send_timeout_s = send_timeout_s
        self.is_started = False

    async def write(self, event: bytes) -> None:
        """Send one event, after the answer's head if it is the first.

        Raises:
            ClientDisconnected: the client took nothing for ``send_timeout_s``.
        """
        try:
            async with asyncio.timeout(self._send_timeout_s):
                if not self.is_started:
                    self.is_started = True
                    start = {"type": "http.response.start", "status": 200, "headers": _HEADERS}
                    await self._send(start)
                await self._send({"type": "http.response.body", "body": event, "more_body": True})
        except TimeoutError:
            raise ClientDisconnected("The client reads too slowly.") from None

    async def finish(self) -> None:
        """End the answer."""
        async with asyncio.timeout(self._send_timeout_s):
            await self._send({"type": "http.response.body", "body": b"", "more_body": False})
