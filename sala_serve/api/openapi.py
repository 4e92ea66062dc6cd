"""The OpenAPI document: FastAPI's for the routers, written here for the endpoints that are plain ASGI."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel, ConfigDict, Field
from pydantic.json_schema import models_json_schema

from sala_serve import errors
from sala_serve.api.batches import CreateBatch
from sala_serve.api.responses import CreateResponse
from sala_serve.errors import GatewayError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fastapi import FastAPI

OPENAPI_PATH = "/openapi.json"
_SCHEMA = "#/components/schemas/{model}"
_HIDDEN_STATUSES = {405, 499}
"""405 answers methods that are not in the document, 499 answers nobody."""


class ErrorDetail(BaseModel):
    """What went wrong; docs/api.md says what to do about each code."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Every error."""

    error: ErrorDetail


class _Open(BaseModel):
    """Fields that are not named here go to the engine, or come from it."""

    model_config = ConfigDict(extra="allow")


class Message(_Open):
    """One message of a chat."""

    role: str
    content: str | list[TextPart] | None = None


class TextPart(_Open):
    """A part of a message; the model reads text only."""

    type: Literal["text", "input_text", "output_text", "refusal", "thinking"]
    text: str | None = None


class StreamOptions(_Open):
    """Options of a stream."""

    include_usage: bool | None = None


class GenerationRequest(_Open):
    """What the gateway reads of a generating body."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = Field(default=None, ge=1)
    service_tier: str | None = Field(default=None, max_length=256)
    prompt_cache_key: str | None = Field(default=None, max_length=256)
    max_tokens: int | None = Field(default=None, ge=0)


class ChatRequest(GenerationRequest):
    """Body of a chat."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=0)


class CompletionRequest(GenerationRequest):
    """Body of a text completion."""

    prompt: str | list[str] | list[int] | list[list[int]]


class CachedTokens(_Open):
    """How much of the prompt the prefix cache saved."""

    cached_tokens: int | None = None


class AnswerUsage(_Open):
    """Tokens of one answer."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens | None = None


class Answer(_Open):
    """A whole answer, as the engine wrote it."""

    id: str
    object: Literal["chat.completion", "text_completion"]
    created: int
    model: str
    choices: list[dict[str, Any]]
    usage: AnswerUsage | None = None


class ModelEntry(BaseModel):
    """One served model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int | None


class ModelList(BaseModel):
    """All served models."""

    object: Literal["list"]
    data: list[ModelEntry]


class Health(BaseModel):
    """The process runs."""

    status: Literal["ok", "ready"]


class Event(BaseModel):
    """One server-sent event; ``data`` is a chunk or an error as JSON, or ``[DONE]``."""

    data: str
    event: Literal["message", "sala.progress"] = "message"


_MODELS = (
    CreateBatch,
    CreateResponse,
    ErrorBody,
    Event,
    ChatRequest,
    CompletionRequest,
    Answer,
    ModelList,
    ModelEntry,
    Health,
)


def openapi_document(app: FastAPI, *, version: str) -> dict[str, Any]:
    """Return the document of everything that ``app`` serves, with every error of every operation."""
    document = get_openapi(
        title="sala-serve",
        version=version,
        summary="Long-context models behind OpenAI's API",
        routes=app.routes,
    )
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    _, ours = models_json_schema([(model, "validation") for model in _MODELS], ref_template=_SCHEMA)
    schemas |= ours["$defs"]
    document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    document["paths"] = {**_plain_paths(), **document.get("paths", {})}
    statuses = sorted({error.status for error in error_classes()} - _HIDDEN_STATUSES)
    for path, item in document["paths"].items():
        for operation in item.values():
            is_open = not path.startswith("/v1/")
            _add_errors(operation, [500, 503] if is_open else statuses)
            if not is_open:
                operation["security"] = [{"key": []}]
    return document


def error_classes() -> Iterator[type[GatewayError]]:
    """Yield every error that a client can meet."""
    for each in vars(errors).values():
        is_error = isinstance(each, type) and issubclass(each, GatewayError)
        if is_error and not each.__subclasses__():
            yield each


def _add_errors(operation: dict[str, Any], statuses: list[int]) -> None:
    responses = operation.setdefault("responses", {})
    responses.pop("422", None)
    codes = {status: [e.code for e in error_classes() if e.status == status] for status in statuses}
    for status in statuses:
        responses.setdefault(
            str(status),
            {
                "description": ", ".join(codes[status]),
                "content": _json_of("ErrorBody"),
            },
        )


def _json_of(model: str) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": _SCHEMA.format(model=model)}}}


def _reads(summary: str, model: str) -> dict[str, Any]:
    return {
        "summary": summary,
        "responses": {"200": {"description": "OK", "content": _json_of(model)}},
    }


def _generates(summary: str, model: str) -> dict[str, Any]:
    events = {"text/event-stream": {"schema": {"$ref": _SCHEMA.format(model="Event")}}}
    return {
        "summary": summary,
        "parameters": [
            {
                "name": name,
                "in": "header",
                "description": description,
                "schema": schema,
            }
            for name, description, schema in _REQUEST_HEADERS
        ],
        "requestBody": {"required": True, "content": _json_of(model)},
        "responses": {
            "200": {
                "description": "The answer, whole or as server-sent events",
                "content": {**_json_of("Answer"), **events},
            }
        },
    }


_REQUEST_HEADERS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("X-Request-Id", "kept if harmless", {"type": "string"}),
    (
        "X-Request-Timeout-S",
        "shortens every deadline",
        {"type": "number", "minimum": 1, "maximum": 1e6},
    ),
    (
        "X-Sala-Progress",
        "how a stream tells place and progress",
        {"type": "string", "enum": ["comments", "events"]},
    ),
    (
        "Idempotency-Key",
        "a request with the same key gets the same running answer",
        {"type": "string", "minLength": 1, "maxLength": 255, "pattern": "^[!-~]+$"},
    ),
)


def _plain_paths() -> dict[str, Any]:
    name = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
    metrics = {"text/plain": {"schema": {"type": "string"}}}
    return {
        "/v1/chat/completions": {"post": _generates("Answer a chat", "ChatRequest")},
        "/v1/completions": {"post": _generates("Complete a text", "CompletionRequest")},
        "/v1/models": {"get": _reads("List the models", "ModelList")},
        "/v1/models/{name}": {
            "get": {**_reads("Show one model", "ModelEntry"), "parameters": [name]}
        },
        "/healthz": {"get": _reads("Tell that the process runs", "Health")},
        "/readyz": {"get": _reads("Tell whether requests are served", "Health")},
        "/metrics": {
            "get": {
                "summary": "Show the metrics",
                "responses": {"200": {"description": "OK", "content": metrics}},
            }
        },
    }
