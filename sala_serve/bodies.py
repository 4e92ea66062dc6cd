"""The few fields of a request body that the gateway itself must understand; all others pass through."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn

from sala_serve.errors import FieldNotAllowed, InvalidRequest
from sala_serve.settings import NonNegativeInt, PositiveInt, Section

if TYPE_CHECKING:
    from collections.abc import Mapping

FORBIDDEN_FIELDS = (
    *("cache_salt", "chat_template", "ec_transfer_params", "kv_transfer_params"),
    *("media_io_kwargs", "mm_processor_kwargs", "priority", "prompt_embeds", "prompt_logprobs"),
    *("request_id", "truncate_prompt_tokens", "use_beam_search", "vllm_xargs"),
)
"""Extensions of vLLM that would let one client affect another, run its program, or take what was not counted."""
TEXT_PARTS: Mapping[str, str] = {
    **dict.fromkeys(("text", "input_text", "output_text"), "text"),
    **{"refusal": "refusal", "thinking": "thinking"},
}
"""Kinds of content parts, and the field with the text of each; the others hold media, or addresses that the
engine would fetch."""
OUTPUT_FIELDS = ("max_completion_tokens", "max_tokens")


class BodySettings(Section):
    """Bounds on what is inside a generating body; they stop cheap denial, not long prompts."""

    max_json_depth: PositiveInt = 64
    """Objects and lists inside each other."""
    max_messages: PositiveInt = 20_000
    """Messages of a chat, and prompts of one completion request."""
    max_tools: PositiveInt = 256
    """Tools of a chat."""
    max_schema_bytes: PositiveInt = 256 * 1024
    """Of `response_format`, of `structured_outputs` and of all `tools` together, as JSON."""
    max_stop_strings: PositiveInt = 64
    """Entries of each list that the engine compares every token with: `stop`, `bad_words` and their like."""
    max_choices: PositiveInt = 8
    """Of `n`: each choice holds memory of its own."""
    max_logprobs: NonNegativeInt = 20
    """Of `logprobs` and `top_logprobs`: alternatives of each token."""


DEFAULT_BOUNDS = BodySettings()
_COMPARED_LISTS = ("stop", "stop_token_ids", "bad_words", "allowed_token_ids", "logit_bias")


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
    max_output_tokens: int | None = None
    """Of each choice, if the client sets a bound."""
    num_choices: int = 1
    service_tier: str | None = None
    """A tier the client asks for; ``None``: the tenant's own."""
    prompt_cache_key: str | None = None


def parse_generation(
    raw: bytes, prompt_field: str, bounds: BodySettings = DEFAULT_BOUNDS
) -> Generation:
    """Check a request body and prepare the one for the engine.

    The body is written anew rather than forwarded as it came, so that what was checked is what the
    engine reads, duplicate keys and all. Megabytes take tens of milliseconds: call it in a thread.

    Args:
        raw: the body as it came.
        prompt_field: where the prompt is: ``messages`` in a chat, ``prompt`` in a text completion.
        bounds: how much of everything.

    Raises:
        InvalidRequest: not JSON, above a bound, or a field has not the type it needs; ``param`` is the
            field's path.
        FieldNotAllowed: the body sets one of ``FORBIDDEN_FIELDS``.
    """
    return check_generation(parse_object(raw, bounds), prompt_field, bounds)


def check_generation(
    document: dict[str, Any], prompt_field: str, bounds: BodySettings = DEFAULT_BOUNDS
) -> Generation:
    """Check a body that has been read; otherwise as :func:`parse_generation`."""
    for name in FORBIDDEN_FIELDS:
        if document.get(name) is not None:
            raise FieldNotAllowed(f"'{name}' cannot be set by clients.", param=name)
    _require(isinstance(document.get("model"), str), "model", "a string")
    if prompt_field == "messages":
        _check_messages(document.get("messages"), bounds)
    else:
        _check_prompt(document.get("prompt"), bounds)
        if document.get("echo") and document.get("logprobs") is not None:
            raise FieldNotAllowed("'logprobs' of an echoed prompt are not served.", param="echo")
    is_stream = document.get("stream")
    _require(isinstance(is_stream, bool | None), "stream", "a boolean")
    options = document.get("stream_options") or {}
    _require(isinstance(options, dict), "stream_options", "an object")
    wants_usage = options.get("include_usage")
    _require(isinstance(wants_usage, bool | None), "stream_options.include_usage", "a boolean")
    _check_sizes(document, bounds)
    num_choices = _count(document, "n", least=1, most=bounds.max_choices)
    asked = [_count(document, name, least=0, most=None) for name in OUTPUT_FIELDS]
    service_tier = _text(document, "service_tier")
    # ours: vLLM knows other names and does nothing with them
    document = {name: value for name, value in document.items() if name != "service_tier"}
    if is_stream:
        document["stream_options"] = {**options, "include_usage": True}
    return Generation(
        model=document["model"],
        is_stream=bool(is_stream),
        client_wants_usage=bool(wants_usage),
        document=document,
        body=_write_json(document),
        max_output_tokens=next((each for each in asked if each is not None), None),
        num_choices=num_choices or 1,
        service_tier=None if service_tier in ("auto", "default") else service_tier,
        prompt_cache_key=_text(document, "prompt_cache_key"),
    )


def parse_object(raw: bytes, bounds: BodySettings = DEFAULT_BOUNDS) -> dict[str, Any]:
    """Read a body that is one JSON object; raises :class:`InvalidRequest` if it is not."""
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
    if _is_deeper(document, bounds.max_json_depth):
        raise InvalidRequest(
            f"The body is nested too deeply: at most {bounds.max_json_depth} levels."
        )
    return document


def _is_deeper(document: dict[str, Any], max_depth: int) -> bool:
    level: list[Any] = [document]
    for _ in range(max_depth):
        below: list[Any] = []
        for each in level:
            values = each.values() if isinstance(each, dict) else each
            below += [value for value in values if isinstance(value, dict | list)]
        if not below:
            return False
        level = below
    return True


def _check_messages(messages: Any, bounds: BodySettings) -> None:
    _require(isinstance(messages, list) and messages != [], "messages", "a list of messages")
    _require_at_most(len(messages), bounds.max_messages, "messages", "messages")
    for index, message in enumerate(messages):
        if not isinstance(message, dict):
            _refuse(f"messages.{index}", "an object")
        if not isinstance(message.get("role"), str):
            _refuse(f"messages.{index}.role", "a string")
        content = message.get("content")
        if not isinstance(content, str | list | None):
            _refuse(f"messages.{index}.content", "a string or a list of parts")
        for position, part in enumerate(content if isinstance(content, list) else ()):
            _check_part(part, f"messages.{index}.content.{position}")


def _check_part(part: Any, path: str) -> None:
    if isinstance(part, str):
        return
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(kind, str) or (field := TEXT_PARTS.get(kind)) is None:
        _refuse(f"{path}.type", f"one of {', '.join(TEXT_PARTS)}: the model reads text only")
    if not isinstance(part.get(field), str):
        _refuse(f"{path}.{field}", "a string")


def _check_prompt(prompt: Any, bounds: BodySettings) -> None:
    is_right = isinstance(prompt, str)
    if isinstance(prompt, list) and prompt:
        if _are(int, prompt):
            return
        _require_at_most(len(prompt), bounds.max_messages, "prompt", "prompts")
        is_right = _are(str, prompt) or all(
            isinstance(each, list) and each and _are(int, each) for each in prompt
        )
    _require(is_right, "prompt", "text, token ids, or a list of either")


def _are(kind: type, values: list[Any]) -> bool:
    # a million of them: the type itself is compared, which is fast and leaves out booleans
    return set(map(type, values)) == {kind}


def _check_sizes(document: dict[str, Any], bounds: BodySettings) -> None:
    if isinstance(tools := document.get("tools"), list):
        _require_at_most(len(tools), bounds.max_tools, "tools", "tools")
    for name in ("response_format", "structured_outputs", "tools"):
        if (value := document.get(name)) is not None:
            num_bytes = len(_write_json(value))
            _require_at_most(num_bytes, bounds.max_schema_bytes, name, "bytes of JSON")
    for name in _COMPARED_LISTS:
        if isinstance(value := document.get(name), list | dict):
            _require_at_most(len(value), bounds.max_stop_strings, name, "entries")
    for name in ("logprobs", "top_logprobs"):
        if not isinstance(document.get(name), bool):
            _count(document, name, least=0, most=bounds.max_logprobs)
    _count(document, "best_of", least=1, most=bounds.max_choices)


def _require_at_most(number: int, bound: int, path: str, what: str) -> None:
    if number > bound:
        raise InvalidRequest(f"{path}: at most {bound} {what}, got {number}.", param=path)


def _count(document: dict[str, Any], name: str, *, least: int, most: int | None) -> int | None:
    """Return the whole number in a field, ``None`` if there is none."""
    value = document.get(name)
    if value is None:
        return None
    expected = f"an integer from {least}" + ("" if most is None else f" to {most}")
    is_right = isinstance(value, int) and not isinstance(value, bool) and value >= least
    _require(is_right and (most is None or value <= most), name, expected)
    return int(value)


def _text(document: dict[str, Any], name: str) -> str | None:
    value = document.get(name)
    _require(
        value is None or (isinstance(value, str) and len(value) <= 256), name, "a short string"
    )
    return value


def _require(is_right: bool, path: str, expected: str) -> None:
    if not is_right:
        _refuse(path, expected)


def _refuse(path: str, expected: str) -> NoReturn:
    raise InvalidRequest(f"{path}: expected {expected}.", param=path)


def _refuse_constant(name: str) -> NoReturn:
    raise InvalidRequest(f"The body is not valid JSON: {name} is not a JSON number.")


def _write_json(value: Any) -> bytes:
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        return text.encode()
    except UnicodeEncodeError:
        raise InvalidRequest("The body contains half of a surrogate pair (\\ud800 ...).") from None
    except ValueError:  # 1e999 was read as infinity
        raise InvalidRequest("The body contains a number that is too large.") from None
    except RecursionError:
        raise InvalidRequest("The body is nested too deeply.") from None
