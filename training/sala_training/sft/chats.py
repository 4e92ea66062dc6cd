"""Chats from JSON files: messages as OpenAI writes them, ShareGPT, Alpaca."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

_SHAREGPT_ROLES = {
    **dict.fromkeys(("system",), "system"),
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "model", "chatgpt", "bing"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
    "function_call": "function_call",
}
_ROLES = ("system", "developer", "user", "assistant", "tool")


class ChatError(ValueError):
    """A row that is no chat; says where it stands, what was expected and what came."""


@dataclass(frozen=True)
class Chat:
    """One conversation."""

    messages: tuple[dict[str, Any], ...]
    """In the form of ``/v1/chat/completions``."""
    tools: list[dict[str, Any]] | None = None
    untrained: frozenset[int] = field(default_factory=frozenset)
    """Indices of assistant messages that are read but not learnt (``"weight": 0``)."""
    source: str = ""
    """File and row, for messages to people."""


def read(path: Path, errors: list[ChatError] | None = None) -> Iterator[Chat]:
    """Read a file of chats, whatever its form; each row may have another one.

    Args:
        path: ``.jsonl`` with an object a line, or ``.json`` with an array of objects.
        errors: gets what is wrong with a row, which is then left out; None: it is raised.

    Raises:
        ChatError: a row that is no chat, or a file that is not JSON.
    """
    for number, row in _rows(path):
        where = f"{path.name}:{number}"
        try:
            if isinstance(row, ChatError):
                raise row
            yield from_row(row, where)
        except ChatError as error:
            if errors is None:
                raise
            errors.append(error)


def _rows(path: Path) -> Iterator[tuple[int, Any]]:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        try:
            rows = json.loads(text)
        except ValueError as error:
            raise ChatError(f"{path.name}: not JSON: {error}") from None
        if not isinstance(rows, list):
            raise ChatError(f"{path.name}: expected an array of chats")
        yield from enumerate(rows, start=1)
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                row = ChatError(f"{path.name}:{number}: not JSON: {error}")
            yield number, row


def from_row(row: Any, where: str = "chat") -> Chat:
    """Make a chat of one row.

    Raises:
        ChatError: it has none of the three forms, or a message that cannot be.
    """
    if not isinstance(row, dict):
        raise ChatError(f"{where}: expected an object, got {type(row).__name__}")
    if "messages" in row:
        messages = _list(row, "messages", where)
        tools = row.get("tools")
    elif "conversations" in row:
        turns = _list(row, "conversations", where)
        messages = [
            _from_sharegpt(turn, f"{where}: conversations.{i}") for i, turn in enumerate(turns)
        ]
        if system := row.get("system"):
            messages.insert(0, {"role": "system", "content": system})
        tools = row.get("tools")
        if isinstance(tools, str):
            tools = _json(tools, f"{where}: tools") if tools.strip() else None
    elif "instruction" in row and "output" in row:
        messages, tools = _from_alpaca(row, where), None
    else:
        raise ChatError(
            f"{where}: expected messages, conversations, or instruction and output, "
            f"got the fields {sorted(row)}"
        )
    if tools is not None and not isinstance(tools, list):
        raise ChatError(f"{where}: expected a list of tools, got {type(tools).__name__}")
    tools = [
        t if isinstance(t, dict) and "function" in t else {"type": "function", "function": t}
        for t in tools or ()
    ]
    return _checked(messages, tools or None, where)


def _checked(messages: list[Any], tools: list[dict[str, Any]] | None, where: str) -> Chat:
    kept: list[dict[str, Any]] = []
    untrained = set()
    for index, message in enumerate(messages):
        at = f"{where}: messages.{index}"
        if not isinstance(message, dict) or message.get("role") not in _ROLES:
            role = message.get("role") if isinstance(message, dict) else message
            raise ChatError(f"{at}: expected a role of {list(_ROLES)}, got {role!r}")
        content = message.get("content")
        if content is not None and not isinstance(content, str | list):
            raise ChatError(f"{at}: expected content as text, got {type(content).__name__}")
        if message["role"] == "assistant":
            if not content and not message.get("tool_calls"):
                raise ChatError(f"{at}: expected the assistant to say something or call a tool")
            if message.get("weight", 1) not in (0, 1):
                raise ChatError(f"{at}: expected a weight of 0 or 1, got {message['weight']!r}")
            if message.get("weight", 1) == 0:
                untrained.add(index)
        kept.append({name: value for name, value in message.items() if name != "weight"})
    if all(m["role"] != "assistant" or i in untrained for i, m in enumerate(kept)):
        raise ChatError(f"{where}: expected a message of the assistant to learn, got none")
    return Chat(tuple(kept), tools, frozenset(untrained), where)


def _from_sharegpt(turn: Any, where: str) -> dict[str, Any]:
    if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
        raise ChatError(f"{where}: expected an object with from and value")
    role = _SHAREGPT_ROLES.get(str(turn.get("from")))
    if role is None:
        raise ChatError(
            f"{where}: expected a speaker of {sorted(_SHAREGPT_ROLES)}, got {turn.get('from')!r}"
        )
    if role != "function_call":
        return {"role": role, "content": turn["value"]}
    calls = _json(turn["value"], where)
    calls = calls if isinstance(calls, list) else [calls]
    if not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        raise ChatError(f"{where}: expected calls with a name")
    functions = [{"name": c["name"], "arguments": c.get("arguments") or {}} for c in calls]
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": function} for function in functions],
    }


def _from_alpaca(row: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    for name in ("instruction", "input", "output", "system"):
        if not isinstance(row.get(name, ""), str | None):
            raise ChatError(f"{where}: {name}: expected text, got {type(row[name]).__name__}")
    messages = []
    if row.get("system"):
        messages.append({"role": "system", "content": row["system"]})
    history = row.get("history") or []
    if not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise ChatError(f"{where}: history: expected pairs of question and answer")
    question = "\n".join(text for text in (row["instruction"], row.get("input")) if text)
    for asked, answered in [*history, (question, row["output"])]:
        messages.append({"role": "user", "content": asked})
        messages.append({"role": "assistant", "content": answered})
    return messages


def _list(row: Mapping[str, Any], name: str, where: str) -> list[Any]:
    value = row[name]
    if not isinstance(value, list) or not value:
        raise ChatError(f"{where}: {name}: expected a list of at least one message")
    return list(value)


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ChatError(f"{where}: expected JSON: {error}") from None
