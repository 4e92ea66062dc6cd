"""The gateway as an ASGI application."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware

from sala_serve.answers import error_response
from sala_serve.api.chat import chat_route
from sala_serve.api.completions import completions_route
from sala_serve.api.health import health_routes
from sala_serve.api.metrics import metrics_route
from sala_serve.api.models import models_routes
from sala_serve.errors import (
    GatewayError,
    InternalError,
    InvalidRequest,
    MethodNotAllowed,
    RouteNotFound,
)
from sala_serve.middleware.access import AccessMiddleware
from sala_serve.middleware.auth import AuthMiddleware
from sala_serve.middleware.body_limit import BodyLimitMiddleware
from sala_serve.middleware.request_id import RequestIdMiddleware
from sala_serve.telemetry.record import RequestRecord

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from starlette.requests import Request
    from starlette.responses import Response

    from sala_serve.gateway import Gateway


def build_app(gateway: Gateway) -> Starlette:
    """Wire routes, middleware and error answers around the parts of ``gateway``."""
    routes = [
        chat_route(gateway),
        completions_route(gateway),
        *models_routes(gateway.monitor),
        *health_routes(gateway),
        metrics_route(gateway.metrics),
    ]

    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        async with gateway.run():
            yield

    return Starlette(
        routes=routes,
        middleware=[
            Middleware(RequestIdMiddleware),
            Middleware(
                AccessMiddleware,
                metrics=gateway.metrics,
                endpoints=[route.path for route in routes],
                clock=gateway.clock,
            ),
            Middleware(AuthMiddleware, api_keys=gateway.config.api_keys),
            Middleware(BodyLimitMiddleware, max_body_bytes=gateway.config.max_body_bytes),
        ],
        exception_handlers={
            GatewayError: _answer_gateway_error,
            HTTPException: _answer_http_exception,
            Exception: _answer_bug,
        },
        lifespan=lifespan,
    )


async def _answer_gateway_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, GatewayError)
    RequestRecord.of(request.scope).error_code = error.code
    return error_response(error)


async def _answer_http_exception(_request: Request, error: Exception) -> Response:
    """Answer what the router refuses: unknown paths and methods."""
    assert isinstance(error, HTTPException)
    match error.status_code:
        case 404:
            return error_response(RouteNotFound("There is nothing at this path."))
        case 405:
            return error_response(MethodNotAllowed("This path needs another method."))
        case _:
            return error_response(InvalidRequest("The request cannot be understood."))


async def _answer_bug(_request: Request, _error: Exception) -> Response:
    return error_response(InternalError("The gateway failed on this request."))
