"""``GET /metrics`` in Prometheus' text format."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response
from starlette.routing import Route

if TYPE_CHECKING:
    from starlette.requests import Request

    from sala_serve.telemetry.metrics import Metrics


def metrics_route(metrics: Metrics) -> Route:
    """Return the route for the scraper."""

    async def show_metrics(_request: Request) -> Response:
        return Response(metrics.render(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    return Route("/metrics", show_metrics, methods=["GET"])
