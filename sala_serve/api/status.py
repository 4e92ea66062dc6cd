"""What is known without asking the engine: models, probes, metrics. Answers while the engine is busy."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from sala_serve.errors import ShuttingDown

if TYPE_CHECKING:
    from starlette.requests import Request

    from sala_serve.engine.monitor import ServedModel
    from sala_serve.gateway import Gateway


def status_routes(gateway: Gateway) -> list[Route]:
    """Return the routes that only read the gateway's own state."""
    pool = gateway.pool

    async def list_models(_request: Request) -> JSONResponse:
        if not (models := pool.models()):
            pool.require_ready()
        data = [_entry(model) for model in models]
        return JSONResponse({"object": "list", "data": data})

    async def show_model(request: Request) -> JSONResponse:
        return JSONResponse(_entry(pool.require_model(request.path_params["name"])))

    async def healthz(_request: Request) -> JSONResponse:
        return JSONResponse({"status": "ok"})

    async def readyz(_request: Request) -> JSONResponse:
        if gateway.running.is_draining:
            return _draining(gateway)
        pool.require_ready()
        return JSONResponse({"status": "ready"})

    async def metrics(_request: Request) -> Response:
        gateway.metrics.set_tasks(len(asyncio.all_tasks()))
        return Response(gateway.metrics.render(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    return [
        Route("/v1/models", list_models, methods=["GET"]),
        Route("/v1/models/{name:path}", show_model, methods=["GET"]),
        Route("/healthz", healthz, methods=["GET"]),
        Route("/readyz", readyz, methods=["GET"]),
        Route("/metrics", metrics, methods=["GET"]),
    ]


def _draining(gateway: Gateway) -> JSONResponse:
    """Return the error of a gateway that drains, with how long that should take."""
    running, remaining_s = gateway.running, gateway.running.remaining_s
    error = ShuttingDown(
        f"The server is shutting down: {len(running)} requests run, about {remaining_s:.0f} s remain."
    )
    draining = {"num_requests": len(running), "remaining_s": round(remaining_s)}
    return JSONResponse(
        {**error.body(), "draining": draining}, status_code=error.status, headers=error.headers
    )


def _entry(model: ServedModel) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": model.created_unix_s,
        "owned_by": "sala-serve",
        "max_model_len": model.max_model_len,
    }
