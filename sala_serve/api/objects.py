"""What the endpoints of stored objects share: queries, pages, what OpenAPI says of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict

from sala_serve.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Mapping

    from starlette.requests import Request


class StoredObject(BaseModel):
    """Base of what is answered; OpenAI's documentation has every field."""

    model_config = ConfigDict(extra="allow")


class Page(StoredObject):
    """A page of a list."""

    object: Literal["list"]
    data: list[dict[str, Any]]
    first_id: str | None
    last_id: str | None
    has_more: bool


class Deleted(BaseModel):
    """Says that an object is gone."""

    id: str
    object: str
    deleted: bool


def answers(model: type[BaseModel], *, also: str | None = None) -> dict[int | str, dict[str, Any]]:
    """Return OpenAPI's ``responses`` of a success; ``openapi_document`` adds the errors.

    Args:
        model: of the JSON answer.
        also: another media type that the answer may have.
    """
    success: dict[str, Any] = {"model": model}
    if also is not None:
        success["content"] = {also: {}}
    return {200: success}


def json_body(model: type[BaseModel]) -> dict[str, Any]:
    """Return OpenAPI's entry of a body of JSON; ``openapi_document`` has the schema of ``model``."""
    schema = {"$ref": f"#/components/schemas/{model.__name__}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def path_parameter(name: str) -> dict[str, Any]:
    """Return OpenAPI's description of a part of the path."""
    return {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}


def query_parameter(name: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return OpenAPI's description of a part of the query."""
    return {"name": name, "in": "query", "required": False, "schema": dict(schema)}


def page_parameters(longest: int, default: int) -> list[dict[str, Any]]:
    """Return OpenAPI's description of what :func:`read_page` reads."""
    limit = {"type": "integer", "minimum": 1, "maximum": longest, "default": default}
    return [query_parameter("after", {"type": "string"}), query_parameter("limit", limit)]


def read_int(request: Request, name: str, default: int, low: int, high: int) -> int:
    """Return an integer of the query.

    Raises:
        InvalidRequest: it is none, or outside ``low`` to ``high``.
    """
    text = request.query_params.get(name)
    if text is None:
        return default
    # int() would also take 1_0 and other scripts' digits
    is_number = text.removeprefix("-").isdecimal() and text.isascii() and len(text) < 20
    if not is_number or not low <= int(text) <= high:
        raise InvalidRequest(f"{name}: expected an integer from {low} to {high}.", param=name)
    return int(text)


def read_choice(request: Request, name: str, default: str, *others: str) -> str:
    """Return one of some words of the query; raises like :func:`read_int`."""
    text = request.query_params.get(name, default)
    if text not in (default, *others):
        raise InvalidRequest(f"{name}: expected {' or '.join((default, *others))}.", param=name)
    return text


def page_of(entries: list[dict[str, Any]], limit: int) -> dict[str, Any]:
    """Return a list object of the first ``limit`` of ``entries``, which holds one more if there is more."""
    data = entries[:limit]
    return {
        "object": "list",
        "data": data,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
        "has_more": len(entries) > limit,
    }
