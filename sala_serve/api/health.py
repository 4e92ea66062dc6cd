"""``/healthz``: this process runs. ``/readyz``: it can serve a request now."""

from __future__ import annotations

from typing import TYPE_CHECKING

from starlette.responses import JSONResponse
from starlette.routing import Route

from sala_serve.errors import ShuttingDown

if TYPE_CHECKING:
    from starlette.requests import Request

    from sala_serve.gateway import Gateway


def health_routes(gateway: Gateway) -> list[Route]:
    """Return the two probes."""

    async def healthz(_request: Request) -> JSONResponse:
        return JSONResponse({"status": "ok"})

    async def readyz(_request: Request) -> JSONResponse:
        if gateway.running.is_draining:
            raise ShuttingDown("The server is shutting down.")
        gateway.monitor.require_ready()
        return JSONResponse({"status": "ready"})

    return [
        Route("/healthz", healthz, methods=["GET"]),
        Route("/readyz", readyz, methods=["GET"]),
    ]
