"""Every error a client of the gateway can meet, with its status, type and code.

::

    GatewayError
    ├── RequestError                the caller can fix it                   4xx
    │   ├── InvalidRequest          400 invalid_request
    │   ├── FieldNotAllowed         400 field_not_allowed
    │   ├── ContextLengthExceeded   400 context_length_exceeded
    │   ├── InvalidApiKey           401 invalid_api_key
    │   ├── ModelNotFound           404 model_not_found
    │   ├── RouteNotFound           404 route_not_found
    │   ├── MethodNotAllowed        405 method_not_allowed
    │   ├── UploadTimeout           408 upload_timeout
    │   ├── BodyTooLarge            413 body_too_large
    │   └── ClientDisconnected      499 client_disconnected     in metrics and logs only
    └── ServerError                 the caller can only retry               5xx
        ├── InternalError           500 internal_error          a bug of the gateway
        ├── EngineFailed            500 engine_error            the engine answered with an error
        ├── EngineLost              502 engine_lost             the engine went away in the middle
        ├── EngineUnavailable       503 engine_unavailable      starting, restarting or down
        ├── Overloaded              503 overloaded              too many requests run
        ├── ShuttingDown            503 shutting_down           this gateway is draining
        └── EngineTimeout           504 engine_timeout          silent for longer than allowed

Messages are written for the client: they never hold a path, a prompt or a trace. docs/api.md says what a
client should do about each.
"""

# ruff: noqa: N818 - each class is named for what happened

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, ClassVar

from starlette.responses import JSONResponse

if TYPE_CHECKING:
    from collections.abc import Mapping

RETRY_AFTER_S = 5


class GatewayError(Exception):
    """Base of all errors that become an OpenAI-shaped answer."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    code: ClassVar[str] = "internal_error"
    headers: ClassVar[Mapping[str, str]] = {}

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param

    def body(self) -> dict[str, Any]:
        """Return the error as OpenAI writes it."""
        return {
            "error": {
                "message": self.message,
                "type": self.type,
                "param": self.param,
                "code": self.code,
            }
        }

    def response(self) -> JSONResponse:
        """Return the error as an answer."""
        return JSONResponse(self.body(), status_code=self.status, headers=self.headers)

    def event(self) -> bytes:
        """Return the error as the last event of a stream, which OpenAI clients raise."""
        return b"data: " + json.dumps(self.body()).encode() + b"\n\n"


class RequestError(GatewayError):
    """The request cannot be served as it is; sending it again will not help."""

    status = 400
    type = "invalid_request_error"
    code = "invalid_request"


class InvalidRequest(RequestError):
    """The body is not JSON, or a field in it is missing or of the wrong kind."""


class FieldNotAllowed(RequestError):
    """The body sets a field that only the gateway may set."""

    code = "field_not_allowed"


class ContextLengthExceeded(RequestError):
    """Prompt and answer do not fit the model's context window."""

    code = "context_length_exceeded"


class InvalidApiKey(RequestError):
    """No API key, or not one of ours."""

    status = 401
    code = "invalid_api_key"
    headers = {"WWW-Authenticate": "Bearer"}


class ModelNotFound(RequestError):
    """The engine does not serve the model the request names."""

    status = 404
    code = "model_not_found"


class RouteNotFound(RequestError):
    """Nothing is served at this path."""

    status = 404
    code = "route_not_found"


class MethodNotAllowed(RequestError):
    """The path exists, with another method."""

    status = 405
    code = "method_not_allowed"


class UploadTimeout(RequestError):
    """The client stopped sending its body."""

    status = 408
    code = "upload_timeout"


class BodyTooLarge(RequestError):
    """The body is larger than the gateway accepts."""

    status = 413
    code = "body_too_large"


class ClientDisconnected(RequestError):
    """The client went away; nobody sees this answer, metrics and logs count it."""

    status = 499
    code = "client_disconnected"


class ServerError(GatewayError):
    """The request may be fine; the service is not."""


class InternalError(ServerError):
    """A bug of the gateway; the log has the trace under the request id."""


class EngineFailed(ServerError):
    """The engine answered with an error of its own."""

    code = "engine_error"


class EngineLost(ServerError):
    """The connection to the engine broke before the answer was complete."""

    status = 502
    code = "engine_lost"


class EngineUnavailable(ServerError):
    """The engine is starting, restarting or down."""

    status = 503
    code = "engine_unavailable"
    headers = {"Retry-After": str(RETRY_AFTER_S)}


class Overloaded(ServerError):
    """As many requests run as the gateway admits."""

    status = 503
    code = "overloaded"
    headers = {"Retry-After": str(RETRY_AFTER_S)}


class ShuttingDown(ServerError):
    """This gateway is draining and takes no new request."""

    status = 503
    code = "shutting_down"
    headers = {"Retry-After": str(RETRY_AFTER_S)}


class EngineTimeout(ServerError):
    """The engine sent nothing for longer than the read timeout."""

    status = 504
    code = "engine_timeout"
    # OpenAI's clients would send the same hour of work again
    headers = {"X-Should-Retry": "false"}
