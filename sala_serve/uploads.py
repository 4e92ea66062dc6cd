"""Receives bodies: how many bytes, how fast, how many at once, and where they are parsed."""

from __future__ import annotations

import asyncio
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, TypeVar

from starlette.requests import ClientDisconnect

from sala_serve.errors import (
    BodyTooLarge,
    ClientDisconnected,
    InvalidRequest,
    Overloaded,
    RateLimited,
    UploadTimeout,
)

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator

    from starlette.requests import Request

    from sala_serve.config import ServerSettings

T = TypeVar("T")

PARSE_IN_THREAD_BYTES = 256 * 1024
"""Smaller bodies take less time to parse than a thread takes to start on them."""
NUM_PARSERS = 2
"""They share one interpreter lock; more would only hold more memory at once."""
SLOW_AFTER_S = 10.0
"""Before that a body may come at any pace."""


class Uploads:
    """All bodies of one gateway; each counts against ``max_buffered_bytes`` until its request ends."""

    def __init__(self, settings: ServerSettings) -> None:
        self._settings = settings
        self._uploading: Counter[str] = Counter()
        self._parsers = ThreadPoolExecutor(NUM_PARSERS, thread_name_prefix="parse")
        self.num_buffered_bytes = 0
        """Of all bodies that are held now."""

    def close(self) -> None:
        """Let the parsers go."""
        self._parsers.shutdown(wait=False, cancel_futures=True)

    @asynccontextmanager
    async def parsed(
        self, request: Request, *, sender: str, parse: Callable[[bytes], T]
    ) -> AsyncIterator[T]:
        """Receive a body and parse it; its bytes count as held until the block ends.

        Args:
            request: whose body.
            sender: the key or tenant that sends it; each may send a few at once.
            parse: run in a thread for a large body; the raw bytes are let go after it.

        Raises:
            InvalidRequest: it is compressed, or what ``parse`` raises.
            UploadTimeout: it did not come in time, or too slowly.
            BodyTooLarge: it is longer than any body may be.
            RateLimited: ``sender`` sends too many at once.
            Overloaded: all bodies together are too many bytes.
            ClientDisconnected: the client left.
        """
        held = _Held(self)
        try:
            with self._sending(sender):
                raw = await self._receive(request, held)
            if len(raw) < PARSE_IN_THREAD_BYTES:
                result = parse(bytes(raw))
            else:
                loop = asyncio.get_running_loop()
                result = await loop.run_in_executor(self._parsers, parse, bytes(raw))
            raw.clear()
            yield result
        finally:
            held.release()

    @contextmanager
    def _sending(self, sender: str) -> Iterator[None]:
        if self._uploading[sender] >= self._settings.max_uploads_per_key:
            raise RateLimited("Too many bodies are being sent with this key at once.")
        self._uploading[sender] += 1
        try:
            yield
        finally:
            self._uploading[sender] -= 1
            if not self._uploading[sender]:
                del self._uploading[sender]

    async def pieces(
        self, request: Request, *, sender: str, check: Callable[[int], None], timeout_s: float
    ) -> AsyncGenerator[bytes]:
        """Yield a body as it comes; none of it is held here.

        Args:
            request: whose body.
            sender: as for :meth:`parsed`.
            check: raises if so many bytes are too many; called with what is stated first.
            timeout_s: for all of it.

        Raises as :meth:`parsed`.
        """
        check(_stated_bytes(request))
        num_bytes = 0
        with self._sending(sender):
            async with aclosing(self._arriving(request, timeout_s)) as pieces:
                async for piece in pieces:
                    num_bytes += len(piece)
                    check(num_bytes)
                    yield piece

    async def _receive(self, request: Request, held: _Held) -> bytearray:
        # not held yet: a client that states much and sends nothing must not keep others out
        held.check(_stated_bytes(request))
        raw = bytearray()
        async with aclosing(self._arriving(request, self._settings.upload_timeout_s)) as pieces:
            async for piece in pieces:
                raw += piece
                held.grow_to(len(raw))
        return raw

    async def _arriving(self, request: Request, timeout_s: float) -> AsyncGenerator[bytes]:
        """Yield the pieces of a body, which must keep coming."""
        loop = asyncio.get_running_loop()
        started_at_s = loop.time()
        num_bytes = 0
        stream = aiter(request.stream())
        while True:
            paced_s = max(num_bytes / self._settings.min_upload_bytes_per_s, SLOW_AFTER_S)
            try:
                async with asyncio.timeout_at(started_at_s + min(timeout_s, paced_s)):
                    piece = await anext(stream, None)
            except TimeoutError:
                raise UploadTimeout("The request body did not arrive in time.") from None
            except ClientDisconnect:
                raise ClientDisconnected("The client left while sending its request.") from None
            if piece is None:
                return
            num_bytes += len(piece)
            yield piece

    def check_room(self, num_bytes: int) -> None:
        """Raise :class:`Overloaded` if ``num_bytes`` more are too many."""
        if self.num_buffered_bytes + num_bytes > self._settings.max_buffered_bytes:
            raise Overloaded("Too many bytes of requests are held; please retry.")

    @property
    def max_body_bytes(self) -> int:
        """Of one body."""
        return min(self._settings.max_body_bytes, self._settings.max_buffered_bytes)


def _stated_bytes(request: Request) -> int:
    """Return how long a body says it is, 0 if it does not; raises InvalidRequest."""
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise InvalidRequest("Content-Encoding is not supported: send the body as it is.")
    stated = request.headers.get("content-length", "0")
    if not stated.isdecimal():  # the server checks it; other ASGI servers may not
        raise InvalidRequest("Content-Length is not a number.")
    return int(stated)


class _Held:
    """The bytes that one body counts for."""

    def __init__(self, uploads: Uploads) -> None:
        self._uploads = uploads
        self._num_bytes = 0

    def check(self, num_bytes: int) -> None:
        """Raise if the body may not be that long, now or ever."""
        if num_bytes > self._uploads.max_body_bytes:
            raise BodyTooLarge(
                "The request body is larger than this server's limit of "
                f"{self._uploads.max_body_bytes} bytes."
            )
        self._uploads.check_room(num_bytes - self._num_bytes)

    def grow_to(self, num_bytes: int) -> None:
        """Hold that many bytes; raises as :meth:`check`."""
        self.check(num_bytes)
        self._uploads.num_buffered_bytes += num_bytes - self._num_bytes
        self._num_bytes = num_bytes

    def release(self) -> None:
        self._uploads.num_buffered_bytes -= self._num_bytes
        self._num_bytes = 0
