"""The messages and tools of a request in the form in which vLLM gives them to a chat template."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from sala_serve.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from sala_serve.tokens.template import ContentFormat

_TEXT_KEYS = {
    **dict.fromkeys(("text", "input_text", "output_text"), "text"),
    **{"refusal": "refusal", "thinking": "thinking"},
}
"""Type of a content part -> its field with the text."""
_BILLING_HEADER = "x-anthropic-billing-header"
"""Begins a line that one client puts before system prompts, new each time; vLLM drops it."""


def read_messages(
    document: Mapping[str, Any], content_format: ContentFormat
) -> list[dict[str, Any]]:
    """Return the conversation of a chat's body.

    Raises:
        InvalidRequest: a message is not one, or holds something else than text.
    """
    messages = document.get("messages")
    if not isinstance(messages, list) or not messages:
        raise InvalidRequest("expected a list of at least one message", param="messages")
    return [_read_message(f"messages.{i}", each, content_format) for i, each in enumerate(messages)]


def _read_message(where: str, given: Any, content_format: ContentFormat) -> dict[str, Any]:
    if not isinstance(given, dict) or not isinstance(given.get("role"), str):
        raise InvalidRequest("expected an object with a role", param=where)
    role = given["role"]
    content = given.get("content")
    parts = [content] if isinstance(content, str) else (content or [])
    if not isinstance(parts, list):
        raise InvalidRequest("expected text or a list of parts", param=f"{where}.content")
    texts = list(_texts(f"{where}.content", parts))
    if role == "system":
        texts = list(_without_billing_header(texts))
    message: dict[str, Any] = {"role": role, "content": "\n".join(texts)}
    if content_format == "parts" and role != "tool":
        message["content"] = [{"type": "text", "text": text} for text in texts]
    if role == "assistant":
        if given.get("tool_calls"):
            message["tool_calls"] = _tool_calls(f"{where}.tool_calls", given["tool_calls"])
        reasoning = given.get("reasoning")
        if reasoning is None:
            reasoning = given.get("reasoning_content")
        if reasoning is not None:
            message |= {"reasoning": reasoning, "reasoning_content": reasoning}
    elif role == "tool":
        if "tool_call_id" in given:
            message["tool_call_id"] = given["tool_call_id"]
    elif role == "developer":
        message["tools"] = given.get("tools")
    for name in ("name", "task"):
        if isinstance(given.get(name), str):
            message[name] = given[name]
    return message


def _texts(where: str, parts: Sequence[Any]) -> Iterator[str]:
    for index, part in enumerate(parts):
        if isinstance(part, str):
            yield part
            continue
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(kind, str) or kind not in _TEXT_KEYS:
            raise InvalidRequest("this model reads text only", param=f"{where}.{index}")
        text = part.get(_TEXT_KEYS[kind])
        if isinstance(text, str):
            yield text
        elif text is not None:
            raise InvalidRequest("expected text", param=f"{where}.{index}")


def _without_billing_header(texts: Sequence[str]) -> Iterator[str]:
    for text in texts:
        if not text.startswith(_BILLING_HEADER):
            yield text
        elif rest := text.partition("\n")[2]:
            yield rest


def _tool_calls(where: str, calls: Any) -> list[dict[str, Any]]:
    if not isinstance(calls, list):
        raise InvalidRequest("expected a list", param=where)
    read = []
    for index, call in enumerate(calls):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or call.get("type", "function") != "function":
            raise InvalidRequest("expected a call of a function", param=f"{where}.{index}")
        read.append(call | {"function": function | {"arguments": _arguments(function)}})
    return read


def _arguments(function: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments as templates expect them; what is not an object counts as none."""
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            return {}
    return arguments if isinstance(arguments, dict) else {}


def read_tools(document: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """Return the tools as vLLM writes them out: the fields it knows, in its order.

    Raises:
        InvalidRequest: a tool is not a function with a name.
    """
    tools = document.get("tools")
    if tools is None:
        return None
    if not isinstance(tools, list):
        raise InvalidRequest("expected a list", param="tools")
    return [_read_tool(f"tools.{index}", tool) for index, tool in enumerate(tools)]


def _read_tool(where: str, given: Any) -> dict[str, Any]:
    function = given.get("function") if isinstance(given, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise InvalidRequest("expected a function with a name", param=where)
    read = {name: function.get(name) for name in ("name", "description", "parameters")}
    is_deferred = function.get("defer_loading")
    if is_deferred is None:
        is_deferred = given.get("defer_loading")
    optional = {"strict": function.get("strict"), "defer_loading": is_deferred}
    read |= {name: value for name, value in optional.items() if value is not None}
    tool = {"type": "function", "function": read}
    if given.get("defer_loading") is not None:
        tool["defer_loading"] = given["defer_loading"]
    return tool


def developers_as_system(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Make developers' messages system ones, all joined at the front, for a template that knows no developers."""
    if all(message["role"] != "developer" for message in messages):
        return list(messages)
    renamed = [
        {key: value for key, value in message.items() if key != "tools"} | {"role": "system"}
        if message["role"] == "developer"
        else message
        for message in messages
    ]
    is_system = [message["role"] == "system" for message in renamed]
    if sum(is_system) == is_system[:1].count(True):
        return renamed
    contents = [message["content"] for message in renamed if message["role"] == "system"]
    texts = [
        "\n".join(part["text"] for part in each) if isinstance(each, list) else each
        for each in contents
    ]
    merged = {"role": "system", "content": "\n\n".join(text for text in texts if text)}
    return [merged, *(message for message in renamed if message["role"] != "system")]
