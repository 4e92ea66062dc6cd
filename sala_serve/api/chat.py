"""``POST /v1/chat/completions``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from starlette.routing import Route

from sala_serve.api.generate import GenerationEndpoint
from sala_serve.api.schema import ChatBody

if TYPE_CHECKING:
    from sala_serve.gateway import Gateway

PATH = "/v1/chat/completions"


def chat_route(gateway: Gateway) -> Route:
    """Return the route for chats."""
    return Route(PATH, GenerationEndpoint(gateway, PATH, ChatBody), methods=["POST"])
