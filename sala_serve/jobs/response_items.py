"""Items of the Responses API: check what a client sends, give it identities, turn it into chat messages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

from sala_serve.errors import InvalidRequest
from sala_serve.jobs.model import new_id

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

MAX_ITEMS = 10_000
_INPUT_ROLES = ("user", "system", "developer")
_TEXT_PARTS = {"assistant": ("output_text", "refusal")} | dict.fromkeys(
    _INPUT_ROLES, ("input_text",)
)


def wrong(param: str, expected: str) -> InvalidRequest:
    """Return the error for a field that has the wrong kind."""
    return InvalidRequest(f"{param}: expected {expected}.", param=param)


def refuse(param: str, expected: str) -> NoReturn:
    """Raise the error for a field that has the wrong kind."""
    raise wrong(param, expected)


def require(is_right: bool, param: str, expected: str) -> None:
    """Raise the error for a field unless it is right."""
    if not is_right:
        refuse(param, expected)


def parse_items(given: Any) -> list[dict[str, Any]]:
    """Return ``input`` as items with identities, in the shape in which they are listed.

    Raises:
        InvalidRequest: something in it is not understood; ``param`` is its path.
    """
    if isinstance(given, str):
        return [_message("user", [{"type": "input_text", "text": given}])]
    if not isinstance(given, list) or not given:
        refuse("input", "text or a list of items")
    require(len(given) <= MAX_ITEMS, "input", f"at most {MAX_ITEMS} items")
    return [_parse_item(item, f"input[{index}]") for index, item in enumerate(given)]


def _parse_item(item: Any, path: str) -> dict[str, Any]:
    if not isinstance(item, dict):
        refuse(path, "an object")
    match item.get("type", "message"):
        case "message":
            return _parse_message(item, path)
        case "function_call":
            for name in ("call_id", "name", "arguments"):
                require(isinstance(item.get(name), str), f"{path}.{name}", "a string")
            return {
                "id": _item_id(item, path, "fc_"),
                "type": "function_call",
                "call_id": item["call_id"],
                "name": item["name"],
                "arguments": item["arguments"],
                "status": "completed",
            }
        case "function_call_output":
            require(isinstance(item.get("call_id"), str), f"{path}.call_id", "a string")
            output = item.get("output")
            if not isinstance(output, str):
                output = _parse_parts(output, f"{path}.output", ("input_text",))
            return {
                "id": _item_id(item, path, "fco_"),
                "type": "function_call_output",
                "call_id": item["call_id"],
                "output": output,
                "status": "completed",
            }
        case "reasoning":
            parts = item.get("content") or []
            content = _parse_parts(parts, f"{path}.content", ("reasoning_text",)) if parts else []
            return {
                "id": _item_id(item, path, "rs_"),
                "type": "reasoning",
                "summary": [],
                "content": content,
                "status": "completed",
            }
        case _:
            refuse(
                f"{path}.type",
                "message, function_call, function_call_output or reasoning: other items need tools "
                "that this server does not run",
            )


def _parse_message(item: Mapping[str, Any], path: str) -> dict[str, Any]:
    role, content = item.get("role"), item.get("content")
    if not isinstance(role, str) or role not in _TEXT_PARTS:
        refuse(f"{path}.role", "user, system, developer or assistant")
    kinds = _TEXT_PARTS[role]
    if isinstance(content, str):
        parts = [_text_part(kinds[0], content)]
    else:
        parts = _parse_parts(content, f"{path}.content", kinds)
    return _message(role, parts, item_id=_item_id(item, path, "msg_"))


def _parse_parts(parts: Any, path: str, kinds: tuple[str, ...]) -> list[dict[str, Any]]:
    if not isinstance(parts, list) or not parts:
        refuse(path, "text or a list of content parts")
    parsed = []
    for index, part in enumerate(parts):
        here = f"{path}[{index}]"
        if not isinstance(part, dict):
            refuse(here, "an object")
        kind = part.get("type")
        if kind not in kinds:
            refuse(f"{here}.type", f"{' or '.join(kinds)}; the model reads text only")
        field = "refusal" if kind == "refusal" else "text"
        text = part.get(field)
        if not isinstance(text, str):
            refuse(f"{here}.{field}", "a string")
        parsed.append(_text_part(kind, text))
    return parsed


def _text_part(kind: str, text: str) -> dict[str, Any]:
    if kind == "refusal":
        return {"type": kind, "refusal": text}
    part: dict[str, Any] = {"type": kind, "text": text}
    return part | ({"annotations": []} if kind == "output_text" else {})


def _message(
    role: str, content: list[dict[str, Any]], *, item_id: str | None = None
) -> dict[str, Any]:
    return {
        "id": item_id or new_id("msg_"),
        "type": "message",
        "role": role,
        "status": "completed",
        "content": content,
    }


def _item_id(item: Mapping[str, Any], path: str, prefix: str) -> str:
    item_id = item.get("id")
    if item_id is None:
        return new_id(prefix)
    if not isinstance(item_id, str) or not 0 < len(item_id) <= 128:
        refuse(f"{path}.id", "a string of 1 to 128 characters")
    return item_id


def chat_messages(items: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a conversation's items as messages of a chat completion.

    Text and calls of one turn of the assistant become one message, as chat templates expect. Earlier
    reasoning is left out, as the templates of reasoning models do.
    """
    messages: list[dict[str, Any]] = []
    for item in items:
        match item["type"]:
            case "message" if item["role"] == "assistant":
                text = "".join(
                    part.get("text") or part.get("refusal") or "" for part in item["content"]
                )
                messages.append({"role": "assistant", "content": text})
            case "message":
                role = "system" if item["role"] == "developer" else item["role"]
                messages.append({"role": role, "content": _joined(item["content"])})
            case "function_call":
                if not messages or messages[-1]["role"] != "assistant":
                    messages.append({"role": "assistant", "content": None})
                function = {"name": item["name"], "arguments": item["arguments"]}
                call = {"id": item["call_id"], "type": "function", "function": function}
                messages[-1].setdefault("tool_calls", []).append(call)
            case "function_call_output":
                output = item["output"]
                content = output if isinstance(output, str) else _joined(output)
                messages.append(
                    {"role": "tool", "tool_call_id": item["call_id"], "content": content}
                )
    return messages


def _joined(parts: list[dict[str, Any]]) -> str | list[dict[str, Any]]:
    """One part is sent as plain text, which every chat template takes."""
    if len(parts) == 1:
        text: str = parts[0]["text"]
        return text
    return [{"type": "text", "text": part["text"]} for part in parts]
