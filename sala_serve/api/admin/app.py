"""The admin port as an ASGI application: the JSON API behind its token, the page behind its login."""

from __future__ import annotations

from importlib import metadata
from typing import TYPE_CHECKING, Any, Protocol

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from sala_serve.api.admin.guard import AdminGuard
from sala_serve.api.admin.page import audited_page
from sala_serve.api.admin.requests import requests_router
from sala_serve.api.admin.router import tenants_router
from sala_serve.errors import GatewayError, InvalidRequest, MethodNotAllowed, RouteNotFound

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from starlette.requests import Request

    from sala_serve.api.admin.requests import RunningView
    from sala_serve.config import Settings
    from sala_serve.gateway import Gateway
    from sala_serve.scheduling.snapshot import SchedulerSnapshot
    from sala_serve.tenants.keys import KeyRing
    from sala_serve.tenants.limits import Limiter

OPENAPI_PATH = "/openapi.json"


class SchedulerView(Protocol):
    """What is asked of the scheduler."""

    def snapshot(self) -> SchedulerSnapshot:
        """Return its state."""


class AdminGateway(Protocol):
    """What is asked of a gateway."""

    @property
    def settings(self) -> Settings:
        """With ``admin.token``."""

    @property
    def clock(self) -> Callable[[], float]:
        """Monotonic seconds."""

    @property
    def keys(self) -> KeyRing:
        """Tenants and keys."""

    @property
    def limiter(self) -> Limiter:
        """What tenants use."""

    @property
    def running(self) -> RunningView:
        """Requests."""

    @property
    def scheduler(self) -> SchedulerView:
        """Queue and engines."""


def build_admin_app(gateway: Gateway) -> FastAPI:
    """Make the application for the admin port; it has no life of its own beside the gateway's.

    The gateway's settings have an admin token.
    """
    return admin_app(gateway, audited_page(gateway))


def admin_app(gateway: AdminGateway, page: Sequence[Route]) -> FastAPI:
    """Put the JSON API beside the routes of a page.

    Args:
        gateway: whose tenants, keys and requests; its settings have an admin token.
        page: routes of the page for people, which check their visitors themselves.
    """
    token = gateway.settings.admin.token
    assert token is not None
    app = FastAPI(
        openapi_url=None,  # behind the token, below
        redirect_slashes=False,
        routes=[*page],
        exception_handlers={
            GatewayError: _answer_error,
            HTTPException: _answer_routing_error,
            RequestValidationError: _answer_invalid,
        },
    )
    app.include_router(tenants_router(gateway.settings.tenants, gateway.keys, gateway.limiter))
    app.include_router(
        requests_router(gateway.running, gateway.scheduler.snapshot, clock=gateway.clock)
    )
    document = _document(app)

    async def show_document(_request: Request) -> Response:
        return JSONResponse(document)

    app.router.routes.append(Route(OPENAPI_PATH, show_document, methods=["GET"]))
    app.user_middleware = [
        Middleware(
            AdminGuard,
            token=token.get_secret_value(),
            open_paths=[route.path for route in page],
        )
    ]
    return app


def _document(app: FastAPI) -> dict[str, Any]:
    document = get_openapi(
        title="sala-serve admin",
        version=metadata.version("sala-serve"),
        summary="Tenants, keys, usage and running requests",
        routes=app.routes,
    )
    for name in ("HTTPValidationError", "ValidationError"):
        document["components"]["schemas"].pop(name, None)
    document["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
    document["security"] = [{"token": []}]
    for item in document["paths"].values():
        for operation in item.values():
            operation["responses"].pop("422", None)  # is a 400 here
    return document


async def _answer_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, GatewayError)
    return error.response()


async def _answer_invalid(_request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    (first, *_) = error.errors()
    path = ".".join(str(part) for part in first["loc"][1:])
    message = f"{path or 'body'}: {first['msg']}."
    return InvalidRequest(message, param=path or None).response()


async def _answer_routing_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    match error.status_code:
        case 404:
            response = RouteNotFound("There is nothing at this path.").response()
        case 405:
            response = MethodNotAllowed("This path needs another method.").response()
        case _:
            response = InvalidRequest("The request cannot be understood.").response()
    response.headers.update(error.headers or {})
    return response
