"""``GET /v1/models``: answered from what the monitor learned, also while the engine is busy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from starlette.responses import JSONResponse
from starlette.routing import Route

if TYPE_CHECKING:
    from starlette.requests import Request

    from sala_serve.engine.monitor import EngineMonitor, ServedModel

PATH = "/v1/models"


def models_routes(monitor: EngineMonitor) -> list[Route]:
    """Return the routes that list all models and show one."""

    async def list_models(_request: Request) -> JSONResponse:
        monitor.require_known()
        data = [_entry(model) for model in monitor.status.models]
        return JSONResponse({"object": "list", "data": data})

    async def show_model(request: Request) -> JSONResponse:
        monitor.require_known()
        return JSONResponse(_entry(monitor.require_model(request.path_params["name"])))

    return [
        Route(PATH, list_models, methods=["GET"]),
        Route(PATH + "/{name:path}", show_model, methods=["GET"]),
    ]


def _entry(model: ServedModel) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": model.created_unix_s,
        "owned_by": "sala-serve",
        "max_model_len": model.max_model_len,
    }
