"""One log line and one count per request, written when it is over, however it ended."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from sala_serve.errors import ClientDisconnected, InternalError
from sala_serve.middleware.request_id import request_id_of
from sala_serve.telemetry.record import RequestRecord

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from sala_serve.telemetry.metrics import Metrics

logger = logging.getLogger(__name__)

QUIET_ENDPOINTS = frozenset({"/healthz", "/readyz", "/metrics"})
"""Polled every few seconds: counted, logged at debug level only."""


class AccessMiddleware:
    """Keep the :class:`RequestRecord` of each request and report it at the end."""

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
        """Handle one connection of any ASGI type."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        endpoint = scope["path"] if scope["path"] in self._endpoints else "other"
        record = RequestRecord(request_id_of(scope), endpoint, started_at_s=self._clock())
        record.attach(scope)

        async def send_and_note(message: Message) -> None:
            if message["type"] == "http.response.start" and record.status is None:
                record.status = message["status"]
            await send(message)

        self._metrics.request_started(endpoint)
        try:
            await self._app(scope, receive, send_and_note)
        except Exception:  # the outcome is noted, the error goes on to the server
            record.status, record.error_code = InternalError.status, InternalError.code
            raise
        finally:
            self._report(record)

    def _report(self, record: RequestRecord) -> None:
        duration_s = self._clock() - record.started_at_s
        # a request that ends without an answer was given up by its client or by the server's stop
        status = ClientDisconnected.status if record.status is None else record.status
        self._metrics.request_finished(record.endpoint, status, duration_s)
        if record.ttft_s is not None:
            self._metrics.first_token(record.endpoint, record.ttft_s)
        if record.usage is not None:
            self._metrics.tokens(record.endpoint, record.usage)
        level = logging.DEBUG if record.endpoint in QUIET_ENDPOINTS else logging.INFO
        logger.log(
            level,
            "%s %s %d%s duration_s=%.3f%s%s",
            record.request_id,
            record.endpoint,
            status,
            f" {record.error_code}" if record.error_code else "",
            duration_s,
            "" if record.ttft_s is None else f" ttft_s={record.ttft_s:.3f}",
            ""
            if (usage := record.usage) is None
            else f" prompt_tokens={usage.num_prompt_tokens} cached_tokens={usage.num_cached_tokens}"
            f" completion_tokens={usage.num_completion_tokens}",
        )
