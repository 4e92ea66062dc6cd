"""The body of ``POST /v1/responses``: what is understood, what is refused, and the chat it becomes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sala_serve.bodies import FORBIDDEN_FIELDS
from sala_serve.errors import FieldNotAllowed, InvalidRequest
from sala_serve.jobs.response_items import chat_messages, parse_items, refuse, require, wrong

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

MAX_TOOLS = 128
MAX_METADATA = 16
_SAMPLING = (
    *("chat_template_kwargs", "frequency_penalty", "min_p", "presence_penalty"),
    *("repetition_penalty", "seed", "stop", "top_k"),
)
"""Not OpenAI's here, but vLLM's chat understands them: they go to it as they are."""
_UNSUPPORTED = {
    "conversation": "Conversations are not stored here; use 'previous_response_id'.",
    "prompt": "Prompt templates are not stored here.",
    "context_management": "The gateway never shortens a context.",
    "moderation": "There is no moderation.",
}
_IGNORED = ("image", "access_programs", "prompt_cache_options", "prompt_cache_retention")
"""Hints about what does not exist here, or is done for every request."""
_CHECKED = (
    *("background", "include", "input", "instructions", "max_output_tokens", "max_tool_calls"),
    *("metadata", "model", "parallel_tool_calls", "previous_response_id", "prompt_cache_key"),
    *("reasoning", "safety_identifier", "service_tier", "store", "stream", "stream_options"),
    *("temperature", "text", "tool_choice", "tools", "top_logprobs", "top_p", "truncation", "user"),
)
_INCLUDABLE = ("message.output_text.logprobs", "reasoning.encrypted_content")
_EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")


@dataclass(frozen=True)
class ResponseRequest:
    """A checked body."""

    model: str
    is_stream: bool
    is_background: bool
    is_stored: bool
    previous_response_id: str | None
    items: list[dict[str, Any]] = field(repr=False)
    """Its own input."""
    echo: Mapping[str, Any] = field(repr=False)
    """Fields that the response object repeats."""
    chat: Mapping[str, Any] = field(repr=False)
    """The chat completion without its messages."""

    def chat_document(self, history: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the chat completion that answers this request after ``history``, oldest item first."""
        instructions = self.echo["instructions"]
        system = [{"role": "system", "content": instructions}] if instructions else []
        messages = system + chat_messages([*history, *self.items])
        return {**self.chat, "messages": messages}


def parse_response_request(document: Mapping[str, Any]) -> ResponseRequest:
    """Check a body.

    Raises:
        InvalidRequest: a field is wrong, unknown, or asks for what is not done here; ``param`` names it.
        FieldNotAllowed: a field that only the gateway may set.
    """
    _check_names(document)
    model = document.get("model")
    if not isinstance(model, str):
        refuse("model", "a string")
    flags = {
        name: _flag(document, name)
        for name in ("background", "store", "stream", "parallel_tool_calls")
    }
    is_stored = flags["store"] is not False
    if flags["background"] and not is_stored:
        raise InvalidRequest("A background response must be stored.", param="store")
    previous_id = _text(document, "previous_response_id")
    text, response_format = _parse_text(document.get("text"))
    tools, chat_tools = _parse_tools(document.get("tools"))
    tool_choice, chat_choice, allowed = _parse_tool_choice(document.get("tool_choice"), tools)
    if allowed is not None:
        chat_tools = [tool for tool in chat_tools if tool["function"]["name"] in allowed]
    reasoning = _parse_reasoning(document.get("reasoning"))
    top_logprobs = _number(document, "top_logprobs", int, 0, 20)
    if (truncation := document.get("truncation")) not in (None, "disabled"):
        require(truncation == "auto", "truncation", "disabled")
        raise InvalidRequest(
            "The gateway never drops a part of a prompt; only 'disabled' is possible.",
            param="truncation",
        )
    include = _parse_include(document.get("include"))
    tier = _text(document, "service_tier", 32)
    _parse_stream_options(document.get("stream_options"))
    echo = {
        "instructions": _text(document, "instructions"),
        "max_output_tokens": _number(document, "max_output_tokens", int, 1, 2**31),
        "max_tool_calls": _number(document, "max_tool_calls", int, 1, 2**31),
        "metadata": parse_metadata(document.get("metadata")),
        "model": model,
        "parallel_tool_calls": flags["parallel_tool_calls"] is not False,
        "previous_response_id": previous_id,
        "prompt_cache_key": _text(document, "prompt_cache_key", 1024),
        "reasoning": reasoning,
        "safety_identifier": _text(document, "safety_identifier", 512),
        "service_tier": tier or "auto",
        "store": is_stored,
        "temperature": _number(document, "temperature", float, 0, 2),
        "text": text,
        "tool_choice": tool_choice,
        "tools": tools,
        "top_logprobs": top_logprobs or 0,
        "top_p": _number(document, "top_p", float, 0, 1),
        "truncation": "disabled",
        "user": _text(document, "user", 512),
        "background": bool(flags["background"]),
    }
    wants_logprobs = bool(top_logprobs) or "message.output_text.logprobs" in include
    chat = {
        "model": model,
        "max_completion_tokens": echo["max_output_tokens"],
        "temperature": echo["temperature"],
        "top_p": echo["top_p"],
        "tools": chat_tools or None,
        "tool_choice": chat_choice if chat_tools else None,
        "parallel_tool_calls": flags["parallel_tool_calls"] if chat_tools else None,
        "response_format": response_format,
        "reasoning_effort": reasoning["effort"],
        "logprobs": True if wants_logprobs else None,
        "top_logprobs": (top_logprobs or 0) if wants_logprobs else None,
        "prompt_cache_key": echo["prompt_cache_key"],
        "service_tier": tier,
        **{name: document.get(name) for name in _SAMPLING},
    }
    return ResponseRequest(
        model=model,
        is_stream=bool(flags["stream"]),
        is_background=bool(flags["background"]),
        is_stored=is_stored,
        previous_response_id=previous_id,
        items=parse_items(document.get("input")),
        echo=echo,
        chat={name: value for name, value in chat.items() if value is not None},
    )


def _check_names(document: Mapping[str, Any]) -> None:
    for name in FORBIDDEN_FIELDS:
        if document.get(name) is not None:
            raise FieldNotAllowed(f"'{name}' cannot be set by clients.", param=name)
    for name, reason in _UNSUPPORTED.items():
        if document.get(name) is not None:
            raise InvalidRequest(f"'{name}' is not supported. {reason}", param=name)
    known = {*_CHECKED, *_SAMPLING, *_UNSUPPORTED, *_IGNORED, *FORBIDDEN_FIELDS}
    for name in document:
        if name not in known:
            shown = name if len(name) <= 80 and name.isprintable() else "..."
            raise InvalidRequest(f"Unknown parameter: '{shown}'.", param=shown)


def _flag(document: Mapping[str, Any], name: str) -> bool | None:
    value = document.get(name)
    if value is not None and not isinstance(value, bool):
        refuse(name, "a boolean")
    return value


def _text(document: Mapping[str, Any], name: str, longest: int | None = None) -> str | None:
    value = document.get(name)
    if value is None:
        return None
    if not isinstance(value, str):
        refuse(name, "a string")
    require(longest is None or len(value) <= longest, name, f"at most {longest} characters")
    return value


def _number(document: Mapping[str, Any], name: str, kind: type, low: float, high: float) -> Any:
    value = document.get(name)
    if value is None:
        return None
    accepted = (int,) if kind is int else (int, float)
    is_right = isinstance(value, accepted) and not isinstance(value, bool) and low <= value <= high
    require(is_right, name, f"{'an integer' if kind is int else 'a number'} from {low} to {high}")
    return value


def parse_metadata(given: Any) -> dict[str, str]:
    """Check OpenAI's ``metadata``; raises InvalidRequest."""
    if given is None:
        return {}
    if not isinstance(given, dict) or len(given) > MAX_METADATA:
        refuse("metadata", f"an object of at most {MAX_METADATA} pairs")
    for name, value in given.items():
        require(len(name) <= 64, "metadata", "names of at most 64 characters")
        require(
            isinstance(value, str) and len(value) <= 512,
            "metadata",
            "values that are strings of at most 512 characters",
        )
    return given


def _parse_text(given: Any) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Return ``text`` as the response repeats it, and the chat's ``response_format``."""
    if given is None:
        given = {}
    if not isinstance(given, dict):
        refuse("text", "an object")
    if given.get("verbosity") not in (None, "medium"):
        raise InvalidRequest("The model has no verbosity to set.", param="text.verbosity")
    wanted = given.get("format") or {"type": "text"}
    if not isinstance(wanted, dict):
        refuse("text.format", "an object")
    match wanted.get("type"):
        case "text":
            return {"format": {"type": "text"}}, None
        case "json_object":
            return {"format": {"type": "json_object"}}, {"type": "json_object"}
        case "json_schema":
            require(isinstance(wanted.get("name"), str), "text.format.name", "a string")
            require(isinstance(wanted.get("schema"), dict), "text.format.schema", "an object")
            names = ("name", "schema", "strict", "description")
            schema = {name: wanted[name] for name in names if wanted.get(name) is not None}
            return (
                {"format": {"type": "json_schema", **schema}},
                {"type": "json_schema", "json_schema": schema},
            )
        case _:
            raise wrong("text.format.type", "text, json_object or json_schema")


def _parse_tools(given: Any) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return ``tools`` as the response repeats them, and as the chat takes them."""
    if given is None:
        return [], []
    if not isinstance(given, list) or len(given) > MAX_TOOLS:
        refuse("tools", f"a list of at most {MAX_TOOLS} tools")
    tools, chat_tools = [], []
    for index, tool in enumerate(given):
        path = f"tools[{index}]"
        if not isinstance(tool, dict):
            refuse(path, "an object")
        if tool.get("type") != "function":
            refuse(f"{path}.type", "function: this server runs no tools of its own")
        name, parameters = tool.get("name"), tool.get("parameters")
        description, strict = tool.get("description"), tool.get("strict")
        require(isinstance(name, str) and 0 < len(name) <= 64, f"{path}.name", "a name")
        require(isinstance(parameters, dict | None), f"{path}.parameters", "an object")
        require(isinstance(description, str | None), f"{path}.description", "a string")
        require(isinstance(strict, bool | None), f"{path}.strict", "a boolean")
        function = {"name": name, "description": description, "parameters": parameters}
        tools.append({"type": "function", **function, "strict": strict})
        given_ones = {key: value for key, value in function.items() if value is not None}
        if strict is not None:
            given_ones["strict"] = strict
        chat_tools.append({"type": "function", "function": given_ones})
    return tools, chat_tools


def _parse_tool_choice(given: Any, tools: list[dict[str, Any]]) -> tuple[Any, Any, set[str] | None]:
    """Return the choice as the response repeats it, the chat's, and the only tools allowed if some are."""
    names = {tool["name"] for tool in tools}
    if given is None:
        return "auto", None, None
    if given in ("auto", "none", "required"):
        require(given != "required" or bool(tools), "tool_choice", "a choice among 'tools'")
        return given, given, None
    if not isinstance(given, dict):
        refuse("tool_choice", "auto, none, required or an object")
    match given.get("type"):
        case "function":
            name = given.get("name")
            require(isinstance(name, str) and name in names, "tool_choice.name", "one of 'tools'")
            choice = {"type": "function", "name": name}
            return choice, {"type": "function", "function": {"name": name}}, None
        case "allowed_tools":
            mode, allowed = given.get("mode"), given.get("tools")
            require(mode in ("auto", "required"), "tool_choice.mode", "auto or required")
            is_list = isinstance(allowed, list) and all(isinstance(each, dict) for each in allowed)
            if not isinstance(allowed, list) or not is_list or not allowed:
                refuse("tool_choice.tools", "a list of tools")
            chosen = [each.get("name") for each in allowed]
            require(
                all(isinstance(name, str) and name in names for name in chosen),
                "tool_choice.tools",
                "some of 'tools'",
            )
            return given, mode, set(chosen)
        case _:
            raise wrong("tool_choice.type", "function or allowed_tools")


def _parse_reasoning(given: Any) -> dict[str, Any]:
    if given is None:
        given = {}
    if not isinstance(given, dict):
        refuse("reasoning", "an object")
    effort = given.get("effort")
    require(effort is None or effort in _EFFORTS, "reasoning.effort", " or ".join(_EFFORTS))
    for name in ("summary", "generate_summary"):
        if given.get(name) is not None:
            raise InvalidRequest(
                "Reasoning is not summarised here: the model's own is in 'output'.",
                param=f"reasoning.{name}",
            )
    return {"effort": effort, "summary": None}


def _parse_include(given: Any) -> list[str]:
    if given is None:
        return []
    if not isinstance(given, list) or any(each not in _INCLUDABLE for each in given):
        refuse("include", f"a list of {' and '.join(_INCLUDABLE)}")
    if "reasoning.encrypted_content" in given:
        raise InvalidRequest(
            "Reasoning is not encrypted here: the model's own is in 'output'.", param="include"
        )
    return list(given)


def _parse_stream_options(given: Any) -> None:
    require(isinstance(given, dict | None), "stream_options", "an object")
    obfuscates = (given or {}).get("include_obfuscation")
    require(isinstance(obfuscates, bool | None), "stream_options.include_obfuscation", "a boolean")
