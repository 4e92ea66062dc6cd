"""A limit on the size of request bodies, checked before and while they are read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from starlette.datastructures import Headers

from sala_serve.errors import BodyTooLarge

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send


class BodyLimitMiddleware:
    """Refuse bodies above ``max_body_bytes``: at once by their stated length, else while they arrive."""

    def __init__(self, app: ASGIApp, *, max_body_bytes: int) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection of any ASGI type."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        stated = Headers(scope=scope).get("content-length", "0")
        num_bytes = 0
        is_over = stated.isdecimal() and int(stated) > self._max_body_bytes

        async def receive_within_limit() -> Message:
            nonlocal num_bytes, is_over
            if is_over:
                raise self._error()
            message = await receive()
            if message["type"] == "http.request":
                num_bytes += len(message.get("body", b""))
                is_over = num_bytes > self._max_body_bytes
            if is_over:
                raise self._error()
            return message

        await self._app(scope, receive_within_limit, send)

    def _error(self) -> BodyTooLarge:
        return BodyTooLarge(
            f"The request body is larger than this server's limit of {self._max_body_bytes} bytes."
        )
