"""How errors look on the wire: as a JSON answer, or as the last event of a stream."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from starlette.responses import JSONResponse

if TYPE_CHECKING:
    from sala_serve.errors import GatewayError


def error_response(error: GatewayError) -> JSONResponse:
    """Return ``error`` as an OpenAI-shaped JSON answer."""
    return JSONResponse(error.body(), status_code=error.status, headers=error.headers())


def error_event(error: GatewayError) -> bytes:
    """Return ``error`` as a server-sent event, which OpenAI clients raise as an exception."""
    return b"data: " + json.dumps(error.body()).encode() + b"\n\n"
