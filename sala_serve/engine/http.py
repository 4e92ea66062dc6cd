"""Requests to one vLLM server, and their failures as errors of ours."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import httpx

from sala_serve.engine.connection import Address, Connection
from sala_serve.engine.vllm_errors import error_from_vllm

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    from sala_serve.engine.settings import EngineSettings
    from sala_serve.errors import GatewayError

_MAX_ERROR_BYTES = 64 * 1024


@dataclass(frozen=True)
class EngineAnswer:
    """A whole answer to a question of the gateway's own."""

    status: int
    body: bytes


class EngineReply:
    """An answer of the engine that has begun."""

    def __init__(self, connection: Connection, read_timeout_s: float) -> None:
        self._connection = connection
        self._read_timeout_s = read_timeout_s

    async def read(self) -> bytes:
        """Return the whole answer.

        Raises:
            EngineLost, EngineTimeout: it did not come to its end.
        """
        return b"".join([chunk async for chunk in self.chunks()])

    def chunks(self) -> AsyncIterator[bytes]:
        """Yield the answer as it arrives; raises like :meth:`read`."""
        return self._connection.chunks(timeout_s=self._read_timeout_s)


class HttpEngine:
    """One vLLM server.

    Every request has a connection of its own: a kept one may be closed by the engine just as we send on it, a new
    one costs microseconds, and a POST of a prompt must not be sent twice. Admission bounds their number.
    """

    def __init__(self, settings: EngineSettings) -> None:
        url = urlsplit(settings.url)
        is_encrypted = url.scheme == "https"
        self._address = Address(
            url.hostname or "",
            url.port or (443 if is_encrypted else 80),
            socket=None if settings.socket is None else str(settings.socket),
            ssl_context=httpx.create_ssl_context() if is_encrypted else None,
        )
        self._host = url.netloc.rpartition("@")[2]
        self._prefix = url.path.rstrip("/")
        self._settings = settings
        self._posts: set[Connection] = set()
        self.has_begun = asyncio.Event()
        """Set with each request of a client; for who looks at the engine only while it works."""

    @property
    def num_open(self) -> int:
        """Requests of clients that are under way."""
        return len(self._posts)

    def cut_all(self, cause: GatewayError) -> None:
        """Break off every request of a client; each raises ``cause``."""
        for connection in self._posts:
            connection.cut(cause)

    @asynccontextmanager
    async def post(
        self, path: str, body: bytes, *, headers: Mapping[str, str], prompt_field: str
    ) -> AsyncIterator[EngineReply]:
        """Send a request; leaving the block early closes the connection, on which vLLM aborts.

        Args:
            path: for example ``/v1/chat/completions``.
            body: JSON.
            headers: sent as they are.
            prompt_field: ``param`` of an error about the prompt's length.

        Raises:
            EngineUnavailable: the engine does not accept connections.
            EngineLost, EngineTimeout: it gave no answer, or it was found stuck.
            GatewayError: it answered with an error; see :func:`error_from_vllm`.
        """
        settings = self._settings
        all_headers = {
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
            **headers,
        }
        connection = Connection()
        self._posts.add(connection)
        self.has_begun.set()
        try:
            await connection.open(self._address, timeout_s=settings.connect_timeout_s)
            head = self._head("POST", path, all_headers)
            await connection.send(head, body, timeout_s=settings.write_timeout_s)
            status = await connection.begin(timeout_s=settings.read_timeout_s)
            reply = EngineReply(connection, settings.read_timeout_s)
            if status != 200:
                text = await _read_start(reply)
                raise error_from_vllm(status, text, prompt_field=prompt_field)
            yield reply
        finally:
            self._posts.discard(connection)
            connection.close()

    async def get(self, path: str, *, timeout_s: float) -> EngineAnswer:
        """Ask a short question; raises as :meth:`post` does, but answers with any status.

        Args:
            path: for example ``/health``.
            timeout_s: for each step of it: connecting, and each piece of the answer.
        """
        connection = Connection()
        try:
            await connection.open(self._address, timeout_s=timeout_s)
            await connection.send(self._head("GET", path, {}), b"", timeout_s=timeout_s)
            status = await connection.begin(timeout_s=timeout_s)
            pieces = [piece async for piece in connection.chunks(timeout_s=timeout_s)]
            return EngineAnswer(status, b"".join(pieces))
        finally:
            connection.close()

    def _head(self, method: str, path: str, headers: Mapping[str, str]) -> bytes:
        lines = [
            f"{method} {self._prefix}{path} HTTP/1.1",
            f"Host: {self._host}",
            "Accept-Encoding: identity",  # streams are relayed as they come
            "Connection: close",
            *(f"{name}: {value}" for name, value in headers.items()),
        ]
        head = "\r\n".join(lines)
        assert head.count("\r\n") == head.count("\n") == len(lines) - 1
        return f"{head}\r\n\r\n".encode("latin-1")


async def _read_start(reply: EngineReply) -> bytes:
    text = b""
    async for chunk in reply.chunks():
        text += chunk
        if len(text) > _MAX_ERROR_BYTES:
            break
    return text
