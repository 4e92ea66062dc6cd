"""``POST /v1/completions``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from starlette.routing import Route

from sala_serve.api.generate import GenerationEndpoint
from sala_serve.api.schema import CompletionBody

if TYPE_CHECKING:
    from sala_serve.gateway import Gateway

PATH = "/v1/completions"


def completions_route(gateway: Gateway) -> Route:
    """Return the route for text completions."""
    return Route(PATH, GenerationEndpoint(gateway, PATH, CompletionBody), methods=["POST"])
