"""HTTP by hand, so that a client can misbehave: leave anywhere, read slowly, send half."""

from __future__ import annotations

import asyncio
import json
import socket
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

ANSWER_TIMEOUT_S = 90.0
"""Longer than anything may take, restarts included; beyond it a request counts as hung."""


@dataclass(frozen=True)
class Answer:
    """A whole answer, or what came of it."""

    status: int
    head: bytes
    body: bytes

    def json(self) -> Any:
        """Return the body as JSON."""
        return json.loads(self.body)

    @property
    def outcome(self) -> str:
        """Say how it ended; a stream that ends without saying so is a silent end."""
        if self.status == 0:
            return "no answer"
        if self.status != 200 or b"text/event-stream" not in self.head:
            return str(self.status)
        if b'"error":{' in self.body or b'"error": {' in self.body or b"event: error" in self.body:
            return "error event"
        if b"data: [DONE]" in self.body or b"event: response." in self.body:
            return "200"
        return "silent end"


@dataclass
class Exchange:
    """One connection, on which one request is sent."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def send(
        self,
        method: str,
        path: str,
        *,
        key: str,
        body: bytes = b"",
        stated_bytes: int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Send a request; ``stated_bytes`` is a ``Content-Length`` that is not the body's."""
        lines = {
            "Host": "soak",
            "Connection": "close",
            "Authorization": f"Bearer {key}",
            "Content-Type": "application/json",
            "Content-Length": str(len(body) if stated_bytes is None else stated_bytes),
            **(headers or {}),
        }
        head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        self.writer.write(f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode() + body)
        await self.writer.drain()

    async def answer(self) -> Answer:
        """Read to the end."""
        raw = b""
        with suppress(OSError):
            while piece := await self.reader.read(65536):
                raw += piece
        head, _, body = raw.partition(b"\r\n\r\n")
        status = int(head.split(b" ", 2)[1]) if head.startswith(b"HTTP/1.1 ") else 0
        return Answer(status, head.lower(), body)


@asynccontextmanager
async def connected(port: int, *, receive_bytes: int | None = None) -> AsyncIterator[Exchange]:
    """Connect for the length of the block, which ends by cutting the connection.

    Args:
        port: of this machine.
        receive_bytes: how much the kernel takes for a client that does not read.
    """
    raw = socket.socket()
    raw.setblocking(False)
    if receive_bytes is not None:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    try:
        await asyncio.get_running_loop().sock_connect(raw, ("127.0.0.1", port))
        limit = 2**16 if receive_bytes is None else receive_bytes
        reader, writer = await asyncio.open_connection(sock=raw, limit=limit)
    except BaseException:
        raw.close()
        raise
    try:
        yield Exchange(reader, writer)
    finally:
        writer.transport.abort()


async def ask(
    port: int, method: str, path: str, *, key: str, document: Any = None, **headers: str
) -> Answer:
    """Send a request and read its answer; ``headers`` are named with underscores."""
    body = b"" if document is None else json.dumps(document).encode()
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    async with connected(port) as exchange, asyncio.timeout(ANSWER_TIMEOUT_S):
        await exchange.send(method, path, key=key, body=body, headers=named)
        return await exchange.answer()
