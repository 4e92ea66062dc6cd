"""Around every request of the admin port: its id, the token, a bounded body, an answer to bugs."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import re
import uuid
from typing import TYPE_CHECKING, Final

from starlette.datastructures import Headers, MutableHeaders

from sala_serve.api.admin.audit import CALLER, Caller, Entry, write
from sala_serve.errors import (
    BodyTooLarge,
    ClientDisconnected,
    GatewayError,
    InternalError,
    InvalidApiKey,
    UploadTimeout,
)

if TYPE_CHECKING:
    from collections.abc import Collection

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

logger = logging.getLogger(__name__)

MAX_BODY_BYTES: Final = 64 * 1024
BODY_TIMEOUT_S: Final = 30.0
_HARMLESS_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_REFUSED = (401, 403)


class AdminGuard:
    """Lets in what has the token; only ``open_paths`` are reached without, and check for themselves."""

    def __init__(self, app: ASGIApp, *, token: str, open_paths: Collection[str]) -> None:
        self._app = app
        self._digest = hashlib.sha256(token.encode()).digest()
        self._open_paths = frozenset(open_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request; other ASGI types pass."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given_id = headers.get("X-Request-Id", "")
        request_id = given_id if _HARMLESS_ID.fullmatch(given_id) else uuid.uuid4().hex
        is_open = scope["path"] in self._open_paths
        client = scope.get("client")
        via = "page" if is_open else "api"
        CALLER.set(Caller(via, str(client[0]) if client else "unknown", request_id))
        is_started = False

        async def send_with_id(message: Message) -> None:
            nonlocal is_started
            if message["type"] == "http.response.start":
                is_started = True
                if message["status"] in _REFUSED:
                    outcome = InvalidApiKey.code
                    write(Entry("token", scope["path"], outcome))
                answer = MutableHeaders(scope=message)
                answer["X-Request-Id"] = request_id
                # keys are shown in answers
                answer.setdefault("Cache-Control", "no-store")
            await send(message)

        try:
            if not is_open:
                self._check_token(headers.get("Authorization", ""))
            body = await _read_body(receive)
            await self._app(scope, _replay(body, receive), send_with_id)
        except ClientDisconnected:
            return
        except GatewayError as error:
            await error.response()(scope, receive, send_with_id)
        except Exception:
            logger.exception("a bug in the admin API, request %s", request_id)
            if is_started:
                raise
            failure = InternalError(f"The gateway failed; its log has request {request_id}.")
            await failure.response()(scope, receive, send_with_id)

    def _check_token(self, authorization: str) -> None:
        scheme, _, token = authorization.partition(" ")
        # digests have one length, so that comparing them tells nothing about the token's
        given = hashlib.sha256(token.strip().encode()).digest()
        is_right = hmac.compare_digest(given, self._digest)
        if scheme.lower() != "bearer" or not is_right:
            raise InvalidApiKey("Send the admin token as 'Authorization: Bearer <token>'.")


async def _read_body(receive: Receive) -> bytes:
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientDisconnected("The client closed the connection.")
                body += message.get("body", b"")
                if len(body) > MAX_BODY_BYTES:
                    raise BodyTooLarge(f"The body has more than {MAX_BODY_BYTES} bytes.")
                if not message.get("more_body", False):
                    return bytes(body)
    except TimeoutError:
        raise UploadTimeout(f"The body did not arrive within {BODY_TIMEOUT_S:.0f} s.") from None


def _replay(body: bytes, receive: Receive) -> Receive:
    is_sent = False

    async def replay() -> Message:
        nonlocal is_sent
        if is_sent:
            return await receive()
        is_sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
