"""The gateway as an ASGI application: routes, what surrounds them, answers to what they raise."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware

from sala_serve.api.generate import generation_routes
from sala_serve.api.status import status_routes
from sala_serve.errors import GatewayError, InvalidRequest, MethodNotAllowed, RouteNotFound
from sala_serve.middleware import AuthMiddleware, RecordMiddleware
from sala_serve.telemetry import RequestRecord

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from starlette.requests import Request
    from starlette.responses import Response

    from sala_serve.gateway import Gateway


def build_app(gateway: Gateway) -> Starlette:
    """Wire routes, middleware and error answers around the parts of ``gateway``."""
    routes = [*generation_routes(gateway), *status_routes(gateway)]

    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        async with gateway.run():
            yield

    app = Starlette(
        routes=routes,
        middleware=[
            Middleware(
                RecordMiddleware,
                metrics=gateway.metrics,
                endpoints=[route.path for route in routes],
                clock=gateway.clock,
            ),
            Middleware(AuthMiddleware, api_keys=gateway.settings.server.api_keys),
        ],
        exception_handlers={GatewayError: _answer_error, HTTPException: _answer_routing_error},
        lifespan=lifespan,
    )
    # a redirect would be built from the Host header and lead to http:// behind a TLS proxy
    app.router.redirect_slashes = False
    return app


async def _answer_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, GatewayError)
    RequestRecord.of(request.scope).error_code = error.code
    return error.response()


async def _answer_routing_error(request: Request, error: Exception) -> Response:
    """Answer what the router refuses: unknown paths and methods."""
    assert isinstance(error, HTTPException)
    match error.status_code:
        case 404:
            response = await _answer_error(request, RouteNotFound("There is nothing at this path."))
        case 405:
            message = "This path needs another method."
            response = await _answer_error(request, MethodNotAllowed(message))
        case _:
            message = "The request cannot be understood."
            response = await _answer_error(request, InvalidRequest(message))
    response.headers.update(error.headers or {})
    return response
