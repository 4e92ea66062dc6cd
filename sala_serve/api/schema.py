"""The few fields of a request body that the gateway itself must understand; all others pass through."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, NoReturn

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sala_serve.errors import FieldNotAllowed, InvalidRequest

FORBIDDEN_FIELDS = ("cache_salt", "kv_transfer_params", "priority", "request_id")
"""Extensions of vLLM that would let one client affect another."""


class _Passing(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)


class StreamOptions(_Passing):
    """``stream_options`` of a request."""

    include_usage: bool = False


class GenerationBody(_Passing):
    """What chat and text completions have in common."""

    prompt_field: ClassVar[str]

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None


class ChatMessage(_Passing):
    """One message of a conversation."""

    role: str


class ChatBody(GenerationBody):
    """Body of ``POST /v1/chat/completions``."""

    prompt_field = "messages"

    messages: Annotated[list[ChatMessage], Field(min_length=1)]


class CompletionBody(GenerationBody):
    """Body of ``POST /v1/completions``."""

    prompt_field = "prompt"

    prompt: str | list[Any]


@dataclass(frozen=True)
class Generation:
    """A checked request, ready to be sent to the engine."""

    model: str
    is_stream: bool
    client_wants_usage: bool
    body: bytes
    """JSON for the engine. A stream always asks for usage, since the gateway counts tokens."""


def parse_generation(raw: bytes, body_type: type[GenerationBody]) -> Generation:
    """Check a request body and prepare the one for the engine.

    The body is written anew rather than forwarded as it came, so that what was checked is what the
    engine reads, duplicate keys and all. Megabytes take tens of milliseconds: call it in a thread.

    Raises:
        InvalidRequest: not JSON, or a field has not the type it needs; ``param`` is the field's path.
        FieldNotAllowed: the body sets one of ``FORBIDDEN_FIELDS``.
    """
    document = _parse_json(raw)
    for name in FORBIDDEN_FIELDS:
        if document.get(name) is not None:
            raise FieldNotAllowed(f"'{name}' cannot be set by clients.", param=name)
    try:
        body = body_type.model_validate(document)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        # a union adds the name of its branch to the path
        path = ".".join(str(part) for part in first["loc"] if part not in ("str", "list[any]"))
        raise InvalidRequest(f"{path}: {first['msg']}", param=path) from None
    client_wants_usage = body.stream_options is not None and body.stream_options.include_usage
    if body.stream:
        options = document.get("stream_options") or {}
        document["stream_options"] = {**options, "include_usage": True}
    try:
        encoded = json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError:
        raise InvalidRequest("The body contains half of a surrogate pair (\\ud800 ...).") from None
    return Generation(body.model, bool(body.stream), client_wants_usage, encoded)


def _parse_json(raw: bytes) -> dict[str, Any]:
    try:
        document = json.loads(raw, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise InvalidRequest(
            f"The body is not valid JSON: {error.msg} at character {error.pos}."
        ) from None
    except UnicodeDecodeError:
        raise InvalidRequest("The body is not valid JSON: it is not UTF-8.") from None
    except RecursionError:
        raise InvalidRequest("The body is nested too deeply.") from None
    if not isinstance(document, dict):
        raise InvalidRequest("The body must be a JSON object.")
    return document


def _refuse_constant(name: str) -> NoReturn:
    raise InvalidRequest(f"The body is not valid JSON: {name} is not a JSON number.")
