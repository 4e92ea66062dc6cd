"""One HTTP/1.1 exchange with an engine on a connection of its own: bounded buffers, nothing left behind.

httpx would do, but for four things: cancelled in the moment in which the connection stands it forgets the open
socket; it cannot break off another task's request; it costs a multiple per request and per piece of a stream
(docs/decisions/0014-own-engine-connection.md); and it reads a large answer in one go.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from httptools import HttpParserError, HttpResponseParser

from sala_serve.errors import EngineLost, EngineTimeout, EngineUnavailable

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncIterator

    from sala_serve.errors import GatewayError

READ_BUFFER_BYTES = 64 * 1024
"""Twice this is read ahead at most; then the engine has to wait for the client."""
WRITE_PIECE_BYTES = 256 * 1024
"""A body goes out in pieces of this size, each with a timeout of its own."""


class Address:
    """Where an engine listens."""

    def __init__(
        self, host: str, port: int, *, socket: str | None, ssl_context: ssl.SSLContext | None
    ) -> None:
        self._host = host
        self._port = port
        self._socket = socket
        self._ssl = ssl_context

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Open a connection; asyncio closes it if this is cancelled."""
        if self._socket is not None:
            return await asyncio.open_unix_connection(self._socket, limit=READ_BUFFER_BYTES)
        return await asyncio.open_connection(
            self._host, self._port, ssl=self._ssl, limit=READ_BUFFER_BYTES
        )


class Connection:
    """One request and its answer; :meth:`cut` ends it from another task."""

    def __init__(self) -> None:
        self.status: int | None = None
        """Of the answer, once it has begun."""
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._parser: HttpResponseParser | None = HttpResponseParser(self)
        self._pieces: list[bytes] = []
        self._is_complete = False
        self._cause: GatewayError | None = None

    async def open(self, address: Address, *, timeout_s: float) -> None:
        """Connect.

        Raises:
            EngineUnavailable: nobody takes the connection.
        """
        try:
            async with asyncio.timeout(timeout_s):
                self._reader, self._writer = await address.connect()
        except OSError as error:  # TimeoutError is one
            self._raise_cause()
            raise EngineUnavailable("The engine is not reachable.") from error
        self._raise_cause()

    async def send(self, head: bytes, body: bytes, *, timeout_s: float) -> None:
        """Send the request, piece by piece as the engine takes it.

        An engine that closes the connection meanwhile may have answered: that is told by :meth:`begin`.

        Raises:
            EngineTimeout: the engine takes nothing more.
        """
        assert self._writer is not None
        view = memoryview(body)
        try:
            self._writer.write(head)
            for start in range(0, len(view) or 1, WRITE_PIECE_BYTES):
                async with asyncio.timeout(timeout_s):
                    self._writer.write(view[start : start + WRITE_PIECE_BYTES])
                    await self._writer.drain()
        except TimeoutError as error:
            self._raise_cause()
            raise EngineTimeout("The engine did not take the request in time.") from error
        except OSError:
            self._raise_cause()

    async def begin(self, *, timeout_s: float) -> int:
        """Wait for the answer's status.

        Raises:
            EngineLost: the connection broke, or what comes is not HTTP.
            EngineTimeout: nothing came for ``timeout_s``.
        """
        while self.status is None:
            await self._receive(timeout_s)
        return self.status

    async def chunks(self, *, timeout_s: float) -> AsyncIterator[bytes]:
        """Yield the answer's body as it arrives; raises like :meth:`begin`."""
        while True:
            pieces, self._pieces = self._pieces, []
            for piece in pieces:
                yield piece
            if self._is_complete and not self._pieces:
                return
            if not self._pieces:
                await self._receive(timeout_s)

    def cut(self, cause: GatewayError) -> None:
        """End the exchange; who waits on it gets ``cause``."""
        if self._cause is None:
            self._cause = cause
            self._abort()

    def close(self) -> None:
        """Close the connection at once; the exchange is over."""
        self._abort()
        self._parser = (
            None  # it holds this object, which would live until the next garbage collection
        )

    def _abort(self) -> None:
        if self._writer is not None:
            self._writer.transport.abort()

    async def _receive(self, timeout_s: float) -> None:
        """Read and parse what has come, at least something."""
        assert self._reader is not None
        assert self._parser is not None
        try:
            async with asyncio.timeout(timeout_s):
                data = await self._reader.read(READ_BUFFER_BYTES)
        except TimeoutError as error:
            self._raise_cause()
            raise EngineTimeout("The engine did not answer in time.") from error
        except OSError as error:
            self._raise_cause()
            raise _lost() from error
        self._raise_cause()
        if not data:
            raise _lost()
        try:
            self._parser.feed_data(data)
        except HttpParserError as error:
            raise _lost() from error

    def _raise_cause(self) -> None:
        if self._cause is not None:
            raise self._cause

    # called by the parser

    def on_headers_complete(self) -> None:
        """Note the status."""
        assert self._parser is not None
        self.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        """Keep a piece of the body until it is asked for."""
        self._pieces.append(body)

    def on_message_complete(self) -> None:
        """Note the end, without which an answer is not whole."""
        self._is_complete = True


def _lost() -> EngineLost:
    return EngineLost("The connection to the engine broke before the answer was complete.")
