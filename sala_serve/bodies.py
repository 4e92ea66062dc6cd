"""The few fields of a request body that the gateway itself must understand; all others pass through."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn

from sala_serve.errors import FieldNotAllowed, InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Mapping

FORBIDDEN_FIELDS = (
    *("cache_salt", "ec_transfer_params", "kv_transfer_params", "priority", "request_id"),
    "vllm_xargs",
)
"""Extensions of vLLM that would let one client affect another; ``vllm_xargs`` can carry the transfers."""


@dataclass(frozen=True)
class Generation:
    """A checked request, ready to be sent to the engine."""

    model: str
    is_stream: bool
    client_wants_usage: bool
    document: Mapping[str, Any] = field(repr=False)
    """The body as read, which the token counter needs."""
    body: bytes = field(repr=False)
    """JSON for the engine. A stream always asks for usage, since the gateway counts tokens."""


def parse_generation(raw: bytes, prompt_field: str) -> Generation:
    """Check a request body and prepare the one for the engine.

    The body is written anew rather than forwarded as it came, so that what was checked is what the
    engine reads, duplicate keys and all. Megabytes take tens of milliseconds: call it in a thread.

    Args:
        raw: the body as it came.
        prompt_field: where the prompt is: ``messages`` in a chat, ``prompt`` in a text completion.

    Raises:
        InvalidRequest: not JSON, or a field has not the type it needs; ``param`` is the field's path.
        FieldNotAllowed: the body sets one of ``FORBIDDEN_FIELDS``.
    """
    document = _parse_json(raw)
    for name in FORBIDDEN_FIELDS:
        if document.get(name) is not None:
            raise FieldNotAllowed(f"'{name}' cannot be set by clients.", param=name)
    _require(isinstance(document.get("model"), str), "model", "a string")
    if prompt_field == "messages":
        _check_messages(document.get("messages"))
    else:
        _require(isinstance(document.get("prompt"), str | list), "prompt", "a string or a list")
    is_stream = document.get("stream")
    _require(isinstance(is_stream, bool | None), "stream", "a boolean")
    options = document.get("stream_options") or {}
    _require(isinstance(options, dict), "stream_options", "an object")
    wants_usage = options.get("include_usage")
    _require(isinstance(wants_usage, bool | None), "stream_options.include_usage", "a boolean")
    if is_stream:
        document["stream_options"] = {**options, "include_usage": True}
    return Generation(
        model=document["model"],
        is_stream=bool(is_stream),
        client_wants_usage=bool(wants_usage),
        document=document,
        body=_write_json(document),
    )


def _check_messages(messages: Any) -> None:
    _require(isinstance(messages, list) and messages != [], "messages", "a list of messages")
    for index, message in enumerate(messages):
        if not isinstance(message, dict):
            _refuse(f"messages.{index}", "an object")
        if not isinstance(message.get("role"), str):
            _refuse(f"messages.{index}.role", "a string")


def _require(is_right: bool, path: str, expected: str) -> None:
    if not is_right:
        _refuse(path, expected)


def _refuse(path: str, expected: str) -> NoReturn:
    raise InvalidRequest(f"{path}: expected {expected}.", param=path)


def _parse_json(raw: bytes) -> dict[str, Any]:
    try:
        document = json.loads(raw, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise InvalidRequest(
            f"The body is not valid JSON: {error.msg} at character {error.pos}."
        ) from None
    except UnicodeDecodeError:
        raise InvalidRequest("The body is not valid JSON: it is not UTF-8.") from None
    except ValueError:  # thousands of digits
        raise InvalidRequest("The body contains a number that is too large.") from None
    except RecursionError:
        raise InvalidRequest("The body is nested too deeply.") from None
    if not isinstance(document, dict):
        raise InvalidRequest("The body must be a JSON object.")
    return document


def _refuse_constant(name: str) -> NoReturn:
    raise InvalidRequest(f"The body is not valid JSON: {name} is not a JSON number.")


def _write_json(document: dict[str, Any]) -> bytes:
    try:
        text = json.dumps(document, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        return text.encode()
    except UnicodeEncodeError:
        raise InvalidRequest("The body contains half of a surrogate pair (\\ud800 ...).") from None
    except ValueError:  # 1e999 was read as infinity
        raise InvalidRequest("The body contains a number that is too large.") from None
    except RecursionError:
        raise InvalidRequest("The body is nested too deeply.") from None
