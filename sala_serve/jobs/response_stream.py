"""Turns the chunks of a streamed chat into the events of a response, and into the response itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sala_serve.errors import GatewayError, InsufficientQuota, RateLimited, RequestError
from sala_serve.jobs.model import Status, new_id

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sala_serve.jobs.response_request import ResponseRequest

Event = dict[str, Any]


def response_document(
    request: ResponseRequest, response_id: str, created_unix_s: float, status: Status
) -> dict[str, Any]:
    """Return the response object of a request that has no output yet."""
    return {
        "id": response_id,
        "object": "response",
        "created_at": int(created_unix_s),
        "status": status.value,
        "completed_at": None,
        "error": None,
        "incomplete_details": None,
        "output": [],
        "usage": None,
        **request.echo,
        "sala": None,
    }


def event(kind: str, document: Mapping[str, Any]) -> Event:
    """Return an event that carries the whole response."""
    return {"type": f"response.{kind}", "response": document}


def error_document(error: GatewayError) -> dict[str, Any]:
    """Return ``error`` as a response's ``error``, whose codes are OpenAI's few."""
    match error:
        case RateLimited() | InsufficientQuota():
            code = "rate_limit_exceeded"
        case RequestError():
            code = "invalid_prompt"
        case _:
            code = "server_error"
    return {"code": code, "message": error.message, "param": error.param, "type": error.code}


def failed(document: Mapping[str, Any], error: GatewayError) -> dict[str, Any]:
    """Return a response that ended with ``error``."""
    return {
        **document,
        "status": Status.FAILED.value,
        "error": error_document(error),
        "output": [],
    }


class ResponseStream:
    """One attempt at a response.

    Args:
        document: the response as it is before, with status ``in_progress``.
        first_output_idx: of this attempt's first item. A later attempt counts on where the one before it
            stopped, since clients refuse an index that they have seen.
    """

    def __init__(self, document: Mapping[str, Any], *, first_output_idx: int = 0) -> None:
        self._document = document
        self._first_output_idx = first_output_idx
        self._items: list[dict[str, Any]] = []
        self._kind: tuple[str, int] | None = None
        """Of the item that is open: message, reasoning, or which function call."""
        self._texts: list[str] = []
        """Pieces of the open item's text or arguments."""
        self._logprobs: list[dict[str, Any]] = []
        self._finish_reason: str | None = None
        self._usage: dict[str, Any] | None = None

    def feed(self, chunk: Mapping[str, Any]) -> list[Event]:
        """Return the events of one chunk; most have one or none."""
        if isinstance(usage := chunk.get("usage"), dict):
            self._usage = _usage(usage)
        events: list[Event] = []
        for choice in chunk.get("choices") or ():
            if choice.get("index", 0) != 0:
                continue
            delta = choice.get("delta") or {}
            if reasoning := delta.get("reasoning") or delta.get("reasoning_content"):
                events += self._text("reasoning", reasoning, [])
            if content := delta.get("content"):
                logprobs = (choice.get("logprobs") or {}).get("content") or []
                events += self._text("message", content, [_logprob(each) for each in logprobs])
            for call in delta.get("tool_calls") or ():
                events += self._call(call)
            self._finish_reason = choice.get("finish_reason") or self._finish_reason
        return events

    def finish(self, completed_unix_s: float) -> tuple[Status, dict[str, Any], list[Event]]:
        """Return how the response ended, the response, and the last events."""
        is_whole = self._finish_reason not in ("length", "content_filter")
        events = self._close("completed" if is_whole else "incomplete")
        if not self._items:  # the model said nothing: an empty message, as OpenAI answers
            events = self._open("message", 0, {}) + self._close(
                "completed" if is_whole else "incomplete"
            )
        status = Status.COMPLETED if is_whole else Status.INCOMPLETE
        reason = "max_output_tokens" if self._finish_reason == "length" else "content_filter"
        document = {
            **self._document,
            "status": status.value,
            "completed_at": int(completed_unix_s) if is_whole else None,
            "incomplete_details": None if is_whole else {"reason": reason},
            "output": self._items,
            "usage": self._usage,
        }
        return status, document, [*events, event(status.value, document)]

    @property
    def num_output_items(self) -> int:
        """Items so far, an open one included."""
        return len(self._items)

    def _text(self, kind: str, text: str, logprobs: list[dict[str, Any]]) -> list[Event]:
        events = [] if self._kind == (kind, 0) else self._open(kind, 0, {})
        self._texts.append(text)
        self._logprobs += logprobs
        delta: Event = self._at(content_index=0) | {"delta": text}
        if kind == "reasoning":
            return [*events, delta | {"type": "response.reasoning_text.delta"}]
        return [*events, delta | {"type": "response.output_text.delta", "logprobs": logprobs}]

    def _call(self, call: Mapping[str, Any]) -> list[Event]:
        function, index = call.get("function") or {}, call.get("index") or 0
        events = (
            []
            if self._kind == ("function_call", index)
            else self._open("function_call", index, call)
        )
        item = self._items[-1]
        item["name"] = item["name"] or function.get("name") or ""
        if arguments := function.get("arguments"):
            self._texts.append(arguments)
            kind = "response.function_call_arguments.delta"
            events.append(self._at() | {"type": kind, "delta": arguments})
        return events

    def _open(self, kind: str, index: int, call: Mapping[str, Any]) -> list[Event]:
        events = self._close("completed")
        self._kind, self._texts, self._logprobs = (kind, index), [], []
        item: dict[str, Any] = {"type": kind, "status": "in_progress"}
        part: dict[str, Any] | None = None
        match kind:
            case "message":
                item |= {"id": new_id("msg_"), "role": "assistant", "content": []}
                part = _output_text("", [])
            case "reasoning":
                item |= {"id": new_id("rs_"), "summary": [], "content": []}
                part = {"type": "reasoning_text", "text": ""}
            case _:
                name = (call.get("function") or {}).get("name") or ""
                call_id = call.get("id") or new_id("call_")
                item |= {"id": new_id("fc_"), "call_id": call_id, "name": name, "arguments": ""}
        self._items.append(item)
        place = {"output_index": self._output_idx}
        events.append({"type": "response.output_item.added", **place, "item": dict(item)})
        if part is not None:
            added = {"type": "response.content_part.added", "part": part}
            events.append(self._at(content_index=0) | added)
        return events

    def _close(self, status: str) -> list[Event]:
        if self._kind is None:
            return []
        item, text = self._items[-1], "".join(self._texts)
        item["status"] = status
        events: list[Event] = []
        done: Event
        match self._kind[0]:
            case "function_call":
                item["arguments"] = text
                kind = "response.function_call_arguments.done"
                done = {"type": kind, "arguments": text, "name": item["name"]}
                events.append(self._at() | done)
            case "message":
                part = _output_text(text, self._logprobs)
                done = {
                    "type": "response.output_text.done",
                    "text": text,
                    "logprobs": self._logprobs,
                }
                events += self._close_part(part, done)
            case _:
                part = {"type": "reasoning_text", "text": text}
                events += self._close_part(
                    part, {"type": "response.reasoning_text.done", "text": text}
                )
        done = {"type": "response.output_item.done", "output_index": self._output_idx}
        self._kind = None
        return [*events, done | {"item": dict(item)}]

    def _close_part(self, part: dict[str, Any], done: Event) -> list[Event]:
        place = self._at(content_index=0)
        self._items[-1]["content"] = [part]
        return [place | done, place | {"type": "response.content_part.done", "part": part}]

    @property
    def _output_idx(self) -> int:
        return self._first_output_idx + len(self._items) - 1

    def _at(self, **more: int) -> dict[str, Any]:
        return {"item_id": self._items[-1]["id"], "output_index": self._output_idx, **more}


def abandoned_items(events: list[Mapping[str, Any]]) -> tuple[list[Event], int]:
    """Look at the events of an attempt that was cut off.

    Returns:
        Events that close what it left open, as incomplete, and the index of the next item.
    """
    items: dict[int, Mapping[str, Any]] = {}
    next_idx = 0
    for each in events:
        match each["type"]:
            case "response.output_item.added":
                items[each["output_index"]] = each["item"]
                next_idx = each["output_index"] + 1
            case "response.output_item.done":
                items.pop(each["output_index"], None)
    return [
        {
            "type": "response.output_item.done",
            "output_index": index,
            "item": {**item, "status": "incomplete"},
        }
        for index, item in items.items()
    ], next_idx


def _output_text(text: str, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


def _logprob(given: Mapping[str, Any]) -> dict[str, Any]:
    return _one_logprob(given) | {
        "top_logprobs": [_one_logprob(each) for each in given.get("top_logprobs") or ()]
    }


def _one_logprob(given: Mapping[str, Any]) -> dict[str, Any]:
    token = given.get("token") or ""
    return {
        "token": token,
        "bytes": given.get("bytes") or list(token.encode()),
        "logprob": given.get("logprob") or 0.0,
    }


def _usage(given: Mapping[str, Any]) -> dict[str, Any]:
    num_input, num_output = given.get("prompt_tokens") or 0, given.get("completion_tokens") or 0
    prompt_details = given.get("prompt_tokens_details") or {}
    output_details = given.get("completion_tokens_details") or {}
    return {
        "input_tokens": num_input,
        "input_tokens_details": {
            "cached_tokens": prompt_details.get("cached_tokens") or 0,
            # vLLM keeps every full block of a prompt and neither counts nor bills it
            "cache_write_tokens": prompt_details.get("cache_write_tokens") or 0,
        },
        "output_tokens": num_output,
        "output_tokens_details": {"reasoning_tokens": output_details.get("reasoning_tokens") or 0},
        "total_tokens": num_input + num_output,
    }
