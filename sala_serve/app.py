"""The gateway as an ASGI application: routes, what surrounds them, answers to what they raise."""

from __future__ import annotations

import json
from contextlib import asynccontextmanager
from importlib import metadata
from typing import TYPE_CHECKING

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.responses import Response
from starlette.routing import Match, Route

from sala_serve.api.batches import batches_router
from sala_serve.api.files import files_router
from sala_serve.api.generate import generation_routes
from sala_serve.api.load import watch_load
from sala_serve.api.openapi import OPENAPI_PATH, openapi_document
from sala_serve.api.responses import responses_router
from sala_serve.api.status import status_routes
from sala_serve.errors import GatewayError, InvalidRequest, MethodNotAllowed, RouteNotFound
from sala_serve.middleware import AuthMiddleware, RecordMiddleware
from sala_serve.telemetry import RequestRecord

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from starlette.requests import Request

    from sala_serve.gateway import Gateway


def build_app(gateway: Gateway) -> FastAPI:
    """Wire routes, middleware and error answers around the parts of ``gateway``."""
    watch_load(gateway)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        async with gateway.run():
            yield

    app = FastAPI(
        # written once below; pages of documentation would load scripts from elsewhere
        openapi_url=None,
        # a redirect would be built from the Host header and lead to http:// behind a TLS proxy
        redirect_slashes=False,
        # including routers would make every route twice
        routes=[
            *generation_routes(gateway),
            *status_routes(gateway),
            *responses_router(gateway).routes,
            *files_router(gateway).routes,
            *batches_router(gateway).routes,
        ],
        exception_handlers={
            GatewayError: _answer_error,
            HTTPException: _answer_routing_error,
            RequestValidationError: _answer_invalid,
        },
        lifespan=lifespan,
    )
    app.router.routes.append(_openapi_route(_document_of(app)))
    app.user_middleware = [
        Middleware(
            RecordMiddleware,
            metrics=gateway.metrics,
            tracing=gateway.tracing,
            routes=[route for route in app.routes if isinstance(route, Route)],
            clock=gateway.clock,
        ),
        Middleware(AuthMiddleware, keys=gateway.keys),
    ]
    return app


_documents: dict[tuple[str, ...], bytes] = {}
"""Paths served -> the document of them. It says nothing of a gateway's settings, and is slow to make."""


def _document_of(app: FastAPI) -> bytes:
    paths = tuple(route.path for route in app.routes if isinstance(route, Route))
    if paths not in _documents:
        document = openapi_document(app, version=metadata.version("sala-serve"))
        _documents[paths] = json.dumps(document).encode()
    return _documents[paths]


def _openapi_route(content: bytes) -> Route:
    async def show(_request: Request) -> Response:
        return Response(content, media_type="application/json")

    return Route(OPENAPI_PATH, show, methods=["GET"])


def _allowed(request: Request) -> str:
    """Return the methods of a path; the router knows only those of the first route it found."""
    routes = [route for route in request.app.routes if isinstance(route, Route)]
    matching = [route for route in routes if route.matches(request.scope)[0] is not Match.NONE]
    same = [route for route in matching if route.path_format == matching[0].path_format]
    return ", ".join(sorted({method for route in same for method in route.methods or ()}))


async def _answer_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, GatewayError)
    RequestRecord.of(request.scope).error_code = error.code
    return error.response()


async def _answer_invalid(request: Request, error: Exception) -> Response:
    """Answer what FastAPI finds wrong with a body, a query or a path."""
    assert isinstance(error, RequestValidationError)
    (first, *_) = error.errors()
    path = ".".join(str(part) for part in first["loc"][1:])
    # its message may quote the input only for the wrong kind of constants; the kind says enough
    message = f"{path or 'body'}: {first['msg']}."
    return await _answer_error(request, InvalidRequest(message, param=path or None))


async def _answer_routing_error(request: Request, error: Exception) -> Response:
    """Answer what the router refuses: unknown paths and methods."""
    assert isinstance(error, HTTPException)
    match error.status_code:
        case 404:
            response = await _answer_error(request, RouteNotFound("There is nothing at this path."))
        case 405:
            message = "This path needs another method."
            response = await _answer_error(request, MethodNotAllowed(message))
            response.headers["Allow"] = _allowed(request)
            return response
        case _:
            message = "The request cannot be understood."
            response = await _answer_error(request, InvalidRequest(message))
    response.headers.update(error.headers or {})
    return response
