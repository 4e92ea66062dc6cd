"""API keys, for everything under ``/v1``; probes and metrics stay open."""

from __future__ import annotations

import hashlib
import hmac
from typing import TYPE_CHECKING

from starlette.datastructures import Headers

from sala_serve.answers import error_response
from sala_serve.errors import InvalidApiKey

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

    from sala_serve.config import ApiKeys


class AuthMiddleware:
    """Refuse requests without one of the accepted keys; an empty set of keys accepts all."""

    def __init__(self, app: ASGIApp, *, api_keys: ApiKeys) -> None:
        self._app = app
        # digests have one length, so that comparing them tells nothing about a key's length either
        self._digests = [_digest(key) for key in api_keys.values]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection of any ASGI type."""
        if scope["type"] == "http" and scope["path"].startswith("/v1/") and self._digests:
            scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not self._accepts(key.strip()):
                error = InvalidApiKey(
                    "Incorrect API key provided."
                    if key
                    else "No API key: send it as 'Authorization: Bearer <key>'."
                )
                await error_response(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _accepts(self, key: str) -> bool:
        given = _digest(key)
        # every key is compared, so that the time taken does not tell which one matched
        return sum(hmac.compare_digest(given, digest) for digest in self._digests) > 0


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
