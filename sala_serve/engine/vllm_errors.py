"""vLLM's error answers, in the form OpenAI clients know.

vLLM writes ``{"error": {"message", "type", "param", "code"}}`` with the HTTP status as an integer
``code`` and one type for most faults; what happened can only be read from the message.
"""

from __future__ import annotations

import json
import re

from sala_serve.errors import (
    ContextLengthExceeded,
    EngineFailed,
    EngineLost,
    EngineUnavailable,
    GatewayError,
    InvalidRequest,
    ModelNotFound,
)

_MAX_MESSAGE_CHARS = 500
_TOO_LONG = re.compile(r"maximum (context|model) length|max_model_len", re.IGNORECASE)
_ENGINE_DEAD = re.compile(r"EngineCore|EngineDeadError")
_VALIDATION_MESSAGE = re.compile(r"'msg': (?P<quote>['\"])(?P<msg>.*?)(?P=quote)[,}]")
_REPEATED_PARAMETER = re.compile(r"\s*\((parameter|value)=[^()]*\)$")
_UNION_BRANCH = re.compile(r"\.[A-Z]\w*")
_OUTPUT_FIELDS = ("max_tokens", "max_completion_tokens", "min_tokens")


def error_from_vllm(status: int, body: bytes, *, prompt_field: str) -> GatewayError:
    """Translate an error answer of vLLM.

    Args:
        status: HTTP status, or the ``code`` of an error event inside a stream.
        body: the JSON text; anything else counts as an error without a message.
        prompt_field: ``param`` of an error about the prompt's length.
    """
    message, param = _message_and_param(body)
    if status in (429, 503):
        return EngineUnavailable("The engine is overloaded.")
    if status >= 500 and _ENGINE_DEAD.search(message):
        return EngineLost("The engine stopped before the answer was complete.")
    if status == 404 and message:
        return ModelNotFound(message, param="model")
    if status in (400, 422) and _TOO_LONG.search(message):
        return ContextLengthExceeded(
            message, param=param if param in _OUTPUT_FIELDS else prompt_field
        )
    if status in (400, 413, 422) or (status == 501 and message):
        return InvalidRequest(message or "The engine refused this request.", param=param)
    # a redirect or a refusal of the gateway itself is not the client's fault; what went wrong inside the
    # engine is in its log, under the request id
    return EngineFailed("The engine failed on this request.")


def _message_and_param(body: bytes) -> tuple[str, str | None]:
    try:
        error = json.loads(body)["error"]
        message, param = error["message"], error.get("param")
    except (ValueError, KeyError, TypeError, AttributeError):
        return "", None
    if not isinstance(message, str):
        return "", None
    param = _UNION_BRANCH.sub("", param.removeprefix("body.")) if isinstance(param, str) else None
    # a validation message repeats the input, which may be the prompt: keep only what was expected
    if found := _VALIDATION_MESSAGE.search(message):
        message = f"{param}: {found['msg']}" if param else found["msg"]
    message = _REPEATED_PARAMETER.sub("", message)
    return message[:_MAX_MESSAGE_CHARS], param
