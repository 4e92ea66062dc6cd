"""Every error a client of the gateway can meet, with its status, type and code.

::

    GatewayError
    ├── RequestError                the caller can fix it                   4xx
    │   ├── InvalidRequest          400 invalid_request
    │   ├── FieldNotAllowed         400 field_not_allowed
    │   ├── ContextLengthExceeded
    │   │   └── PromptDoesNotFit    400 context_length_exceeded
    │   ├── InvalidApiKey           401 invalid_api_key
    │   ├── PermissionDenied        403 permission_denied       a scope of the key excludes it
    │   ├── ModelNotFound           404 model_not_found
    │   ├── NotFound                404 not_found               no such object, or another tenant's
    │   ├── RouteNotFound           404 route_not_found
    │   ├── MethodNotAllowed        405 method_not_allowed
    │   ├── UploadTimeout           408 upload_timeout
    │   ├── Conflict                409 conflict                the object is in another state
    │   ├── IdempotencyConflict     409 idempotency_conflict    the key came with another body
    │   ├── BodyTooLarge            413 body_too_large
    │   ├── RateLimited             429 rate_limit_exceeded     a limit that refills by itself
    │   ├── InsufficientQuota       429 insufficient_quota      the day's budget is spent
    │   └── ClientDisconnected      499 client_disconnected     in metrics and logs only
    └── ServerError                 the caller can only retry               5xx
        ├── InternalError           500 internal_error          a bug of the gateway
        ├── EngineFailed            500 engine_error            the engine answered with an error
        ├── EngineLost              502 engine_lost             the engine went away in the middle
        ├── EngineStuck             502 engine_stuck            the engine lives and does nothing
        ├── EngineUnavailable       503 engine_unavailable      starting, restarting or down
        ├── Overloaded              503 overloaded              too many requests run
        ├── QueueFull               503 queue_full              too much work waits
        ├── ShuttingDown            503 shutting_down           this gateway is draining
        ├── StateUnavailable        503 state_unavailable       Redis does not answer
        ├── QueueTimeout            504 queue_timeout           no turn within the queue's deadline
        ├── FirstTokenTimeout       504 first_token_timeout     no token within its deadline
        ├── TotalTimeout            504 total_timeout           no end within its deadline
        └── EngineTimeout           504 engine_timeout          silent for longer than allowed

Messages are written for the client: they never hold a path, a prompt or a trace. docs/api.md says what a
client should do about each.
"""

# ruff: noqa: N818 - each class is named for what happened

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from starlette.responses import JSONResponse

if TYPE_CHECKING:
    from collections.abc import Mapping

RETRY_AFTER_S = 5
"""Where nothing better is known."""


_RETRY_HEADERS = {"Retry-After", "X-Should-Retry"}
LONGEST_RETRY_AFTER_S = 120
"""OpenAI's clients do not wait longer; told of a longer wait, they do not retry at all."""


def wait_headers(wait_s: float | None, *, place: int | None = None) -> dict[str, str]:
    """Return the headers of a refusal that say how long the wait would be.

    Args:
        wait_s: expected seconds until the request could start; ``None`` if that is unknown.
        place: the place in the queue it would have had, from 1.
    """
    headers = {} if place is None else {"X-Sala-Queue-Place": str(place)}
    if wait_s is None:
        return {**headers, "Retry-After": str(RETRY_AFTER_S)}
    seconds = max(math.ceil(wait_s), 1)
    headers |= {"X-Sala-Expected-Wait-S": str(seconds)}
    if seconds > LONGEST_RETRY_AFTER_S:
        return {**headers, "X-Should-Retry": "false"}
    return {**headers, "Retry-After": str(seconds)}


class GatewayError(Exception):
    """Base of all errors that become an OpenAI-shaped answer."""

    status: ClassVar[int] = 500
    type: str = "server_error"
    code: ClassVar[str] = "internal_error"
    headers: Mapping[str, str] = {}
    """Of the class: sent with every such error. Of an instance: those and its own."""

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        if headers:
            # what is known about this refusal's retry replaces what holds for the class
            kept = {} if headers.keys() & _RETRY_HEADERS else self.headers
            self.headers = {**kept, **headers}

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


class PromptDoesNotFit(ContextLengthExceeded):
    """Counted before anything was spent: the prompt and the answer asked for are too long."""


class InvalidApiKey(RequestError):
    """No API key, or not one of ours."""

    status = 401
    code = "invalid_api_key"
    headers = {"WWW-Authenticate": "Bearer"}


class PermissionDenied(RequestError):
    """The key is valid, but its scopes exclude this model, endpoint, length or tier."""

    status = 403
    code = "permission_denied"


class ModelNotFound(RequestError):
    """The engine does not serve the model the request names."""

    status = 404
    code = "model_not_found"


class NotFound(RequestError):
    """No such response, file or batch; one of another tenant looks the same."""

    status = 404
    code = "not_found"


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


class Conflict(RequestError):
    """The object is in a state that does not allow this."""

    status = 409
    code = "conflict"


class IdempotencyConflict(RequestError):
    """The same ``Idempotency-Key`` came with another body."""

    status = 409
    code = "idempotency_conflict"


class BodyTooLarge(RequestError):
    """The body is larger than the gateway accepts."""

    status = 413
    code = "body_too_large"


class RateLimited(RequestError):
    """A limit of the tenant is used up; it refills by itself, ``Retry-After`` says when."""

    status = 429
    type = "requests"
    code = "rate_limit_exceeded"
    headers = {"Retry-After": str(RETRY_AFTER_S)}

    def __init__(
        self,
        message: str,
        *,
        kind: Literal["requests", "tokens"] = "requests",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message, headers=headers)
        self.type = kind


class InsufficientQuota(RequestError):
    """The tenant's budget is spent; sending again today will not help."""

    status = 429
    type = "insufficient_quota"
    code = "insufficient_quota"
    headers = {"X-Should-Retry": "false"}


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


class EngineStuck(ServerError):
    """The engine is alive but its work no longer moves; it is being restarted."""

    status = 502
    code = "engine_stuck"


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


class QueueFull(ServerError):
    """More work waits than the gateway queues."""

    status = 503
    code = "queue_full"
    headers = {"Retry-After": str(RETRY_AFTER_S)}


class ShuttingDown(ServerError):
    """This gateway is draining and takes no new request."""

    status = 503
    code = "shutting_down"
    headers = {"Retry-After": str(RETRY_AFTER_S)}


class StateUnavailable(ServerError):
    """Redis does not answer and the tenant's tier does not allow a guess."""

    status = 503
    code = "state_unavailable"
    headers = {"Retry-After": str(RETRY_AFTER_S)}


class QueueTimeout(ServerError):
    """The request's turn did not come within the queue's deadline; nothing was computed."""

    status = 504
    code = "queue_timeout"


class FirstTokenTimeout(ServerError):
    """The first token did not come within its deadline."""

    status = 504
    code = "first_token_timeout"
    # OpenAI's clients would send the same work again
    headers = {"X-Should-Retry": "false"}


class TotalTimeout(ServerError):
    """The answer was not complete within the deadline of the whole request."""

    status = 504
    code = "total_timeout"
    headers = {"X-Should-Retry": "false"}


class EngineTimeout(ServerError):
    """The engine sent nothing for longer than the read timeout."""

    status = 504
    code = "engine_timeout"
    # OpenAI's clients would send the same hour of work again
    headers = {"X-Should-Retry": "false"}
