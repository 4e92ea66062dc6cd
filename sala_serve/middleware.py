"""Around every request, from outside in: its record (id, log line, metrics, bugs), then whose it is."""

from __future__ import annotations

import logging
import re
import uuid
from typing import TYPE_CHECKING

from starlette.datastructures import Headers, MutableHeaders

from sala_serve.errors import GatewayError, InternalError
from sala_serve.telemetry import RequestRecord
from sala_serve.telemetry.report import report
from sala_serve.tenants.model import Principal, check_endpoint

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from starlette.routing import Route
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from sala_serve.telemetry import Metrics, Tracing
    from sala_serve.tenants.keys import KeyRing

logger = logging.getLogger(__name__)

REQUEST_ID_HEADER = "X-Request-Id"
_HARMLESS_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_PRINCIPAL_KEY = "sala_serve.principal"


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
        tracing: Tracing,
        routes: Sequence[Route],
        clock: Callable[[], float],
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._tracing = tracing
        self._endpoints = frozenset(route.path for route in routes)
        self._patterns = [
            (route.path_regex, route.path_format) for route in routes if route.param_convertors
        ]
        self._clock = clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request; other ASGI types pass."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given_id = headers.get(REQUEST_ID_HEADER, "")
        record = RequestRecord(
            given_id if _HARMLESS_ID.fullmatch(given_id) else uuid.uuid4().hex,
            self._endpoint(scope["path"]),
            started_at_s=self._clock(),
            clock=self._clock,
        )
        if scope["path"].startswith("/v1/"):
            record.trace = self._tracing.start(record, headers)
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
            report(record, self._metrics)

    def _endpoint(self, path: str) -> str:
        """Return the path of the route, of which there are few, unlike of ids in paths."""
        if path in self._endpoints:
            return path
        return next((name for regex, name in self._patterns if regex.match(path)), "other")


class AuthMiddleware:
    """Find out on whose behalf each request under ``/v1`` runs, and whether its key goes there.

    Other paths are open.
    """

    def __init__(self, app: ASGIApp, *, keys: KeyRing) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request; other ASGI types pass."""
        if scope["type"] == "http" and scope["path"].startswith("/v1/"):
            scheme, _, token = Headers(scope=scope).get("authorization", "").partition(" ")
            given = token.strip() if scheme.lower() == "bearer" else ""
            try:
                principal = await self._keys.authenticate(given or None)
                record = RequestRecord.of(scope)
                record.tenant_id, record.key_id = principal.tenant.tenant_id, principal.key_id
                check_endpoint(principal, scope["path"])
            except GatewayError as error:
                await send_error(error, scope, receive, send)
                return
            scope[_PRINCIPAL_KEY] = principal
        await self._app(scope, receive, send)


def principal_of(scope: Scope) -> Principal:
    """Return on whose behalf the request of ``scope`` runs; only for paths under ``/v1``."""
    principal = scope[_PRINCIPAL_KEY]
    assert isinstance(principal, Principal)
    return principal
