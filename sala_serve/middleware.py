"""Around every request, from outside in: its record (id, log line, metrics, bugs), then the API key."""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import uuid
from typing import TYPE_CHECKING

from starlette.datastructures import Headers, MutableHeaders

from sala_serve.errors import ClientDisconnected, GatewayError, InternalError, InvalidApiKey
from sala_serve.telemetry import RequestRecord

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from sala_serve.config import ApiKeys
    from sala_serve.telemetry import Metrics

logger = logging.getLogger(__name__)

REQUEST_ID_HEADER = "X-Request-Id"
_HARMLESS_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
QUIET_ENDPOINTS = frozenset({"/healthz", "/readyz", "/metrics"})
"""Polled every few seconds: counted, logged at debug level only."""


async def send_error(error: GatewayError, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer with ``error`` and note it in the request's record."""
    RequestRecord.of(scope).error_code = error.code
    await error.response()(scope, receive, send)


class RecordMiddleware:
    """Keep the :class:`RequestRecord` of each request and report it when it is over, however it ended.

    The request's id is the caller's if that is harmless, else a new one; it is in every answer, in the
    log and in the engine's log.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        metrics: Metrics,
        endpoints: Collection[str],
        clock: Callable[[], float],
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._endpoints = frozenset(endpoints)
        self._clock = clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request; other ASGI types pass."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given_id = Headers(scope=scope).get(REQUEST_ID_HEADER, "")
        record = RequestRecord(
            given_id if _HARMLESS_ID.fullmatch(given_id) else uuid.uuid4().hex,
            scope["path"] if scope["path"] in self._endpoints else "other",
            started_at_s=self._clock(),
        )
        record.attach(scope)
        is_started = False

        async def send_with_id(message: Message) -> None:
            nonlocal is_started
            if message["type"] == "http.response.start":
                is_started = True
                record.status = record.status or message["status"]
                MutableHeaders(scope=message)[REQUEST_ID_HEADER] = record.request_id
            await send(message)

        self._metrics.request_started(record.endpoint)
        try:
            await self._app(scope, receive, send_with_id)
        except Exception:
            logger.exception("%s %s failed", record.request_id, record.endpoint)
            record.status = InternalError.status
            error = InternalError("The gateway failed on this request.")
            if is_started:  # the server closes the connection of an answer that is not complete
                record.error_code = error.code
            else:
                await send_error(error, scope, receive, send_with_id)
        finally:
            self._report(record)

    def _report(self, record: RequestRecord) -> None:
        duration_s = self._clock() - record.started_at_s
        # a request that ends without an answer was given up by its client or by the server's stop
        status = ClientDisconnected.status if record.status is None else record.status
        self._metrics.request_finished(record, status, duration_s)
        line = f"{record.request_id} {record.endpoint} {status}"
        if record.error_code:
            line += f" {record.error_code}"
        line += f" duration_s={duration_s:.3f}"
        if record.ttft_s is not None:
            line += f" ttft_s={record.ttft_s:.3f}"
        if (usage := record.usage) is not None:
            line += f" prompt_tokens={usage.num_prompt_tokens}"
            line += f" cached_tokens={usage.num_cached_tokens}"
            line += f" completion_tokens={usage.num_completion_tokens}"
        logger.log(
            logging.DEBUG if record.endpoint in QUIET_ENDPOINTS else logging.INFO, "%s", line
        )


class AuthMiddleware:
    """Ask for an API key for everything under ``/v1``; without keys to accept, everybody may enter."""

    def __init__(self, app: ASGIApp, *, api_keys: ApiKeys) -> None:
        self._app = app
        # digests have one length, so that comparing them tells nothing about a key's length either
        self._digests = [_digest(key) for key in api_keys.values]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request; other ASGI types pass."""
        if scope["type"] == "http" and scope["path"].startswith("/v1/") and self._digests:
            scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not self._accepts(key.strip()):
                message = "No API key: send it as 'Authorization: Bearer <key>'."
                error = InvalidApiKey("Incorrect API key provided." if key else message)
                await send_error(error, scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _accepts(self, key: str) -> bool:
        given = _digest(key)
        # every key is compared, so that the time taken does not tell which one matched
        return sum(hmac.compare_digest(given, digest) for digest in self._digests) > 0


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
