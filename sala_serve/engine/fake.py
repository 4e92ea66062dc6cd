"""A stand-in for vLLM: a small real HTTP server whose timing and failures can be set.

It speaks as much of vLLM's protocol as the gateway uses, streams words instead of computing them, and
notices when a client goes away as vLLM does. Tests and load tests run the gateway against it.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from sala_serve.errors import ClientDisconnected
from sala_serve.running import RunningRequest

if TYPE_CHECKING:
    from collections.abc import Mapping

    from starlette.types import Receive, Scope, Send


class Ending(StrEnum):
    """How an answer ends."""

    COMPLETE = "complete"
    CONNECTION_LOST = "connection lost"
    """The connection closes after the last token, as when the process dies."""
    SILENT_END = "silent end"
    """The stream ends in order but without its closing event."""
    ERROR_EVENT = "error event"
    """vLLM's error event, then its closing event."""


@dataclass
class Behaviour:
    """How the engine behaves; may be changed while it runs."""

    model: str = "sala"
    max_model_len: int = 4096
    health_status: int = 200
    ttft_s: float = 0.0
    """Silence before the first token; the prefill."""
    itl_s: float = 0.0
    """Between two tokens."""
    num_tokens: int = 3
    num_padding_chars: int = 0
    """Added to each token, to fill buffers soon."""
    num_prompt_tokens: int = 7
    num_cached_tokens: int = 4
    num_keep_alives: int = 0
    """Comments sent before the first token of a stream."""
    ending: Ending = Ending.COMPLETE
    error: tuple[int, Mapping[str, Any]] | None = None
    """Status and ``error`` object to answer every request with."""


@dataclass
class Journal:
    """What the engine has seen."""

    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    num_running: int = 0
    num_aborted: int = 0


class FakeEngine:
    """One engine; :attr:`app` is its ASGI application."""

    def __init__(self, behaviour: Behaviour | None = None) -> None:
        self.behaviour = behaviour or Behaviour()
        self.journal = Journal()
        self.app = Starlette(
            routes=[
                Route("/health", self._health),
                Route("/v1/models", self._models),
                Route("/v1/chat/completions", _Generate(self, "chat.completion"), methods=["POST"]),
                Route("/v1/completions", _Generate(self, "text_completion"), methods=["POST"]),
            ]
        )

    async def _health(self, _request: Request) -> Response:
        return Response(status_code=self.behaviour.health_status)

    async def _models(self, _request: Request) -> Response:
        entry = {
            "id": self.behaviour.model,
            "object": "model",
            "created": 1_700_000_000,
            "owned_by": "vllm",
            "max_model_len": self.behaviour.max_model_len,
        }
        return JSONResponse({"object": "list", "data": [entry]})


class _Generate:
    """ASGI application of one generating path."""

    def __init__(self, engine: FakeEngine, kind: str) -> None:
        self._engine = engine
        self._kind = kind

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        try:
            body = await request.json()
        except ClientDisconnect:
            return
        journal, behaviour = self._engine.journal, self._engine.behaviour
        journal.bodies.append(body)
        journal.headers.append(dict(request.headers))
        if behaviour.error is not None:
            status, error = behaviour.error
            await JSONResponse({"error": error}, status_code=status)(scope, receive, send)
            return
        answer = self._stream(body, send) if body.get("stream") else self._whole(send)
        journal.num_running += 1
        try:
            async with RunningRequest() as running:
                is_complete = await running.while_client_stays(answer, receive)
        except ClientDisconnected:
            journal.num_aborted += 1
        else:
            # without the closing message the server drops the connection
            if is_complete:
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            journal.num_running -= 1

    async def _whole(self, send: Send) -> bool:
        behaviour = self._engine.behaviour
        await asyncio.sleep(behaviour.ttft_s + behaviour.itl_s * behaviour.num_tokens)
        text = "".join(self._words())
        choice = self._choice(text)
        if self._kind == "chat.completion":
            choice = {"index": 0, "message": {"role": "assistant", "content": text}}
        document = self._document([choice | {"finish_reason": "stop"}]) | {"usage": self._usage()}
        await _start(send, "application/json")
        content = json.dumps(document).encode()
        if behaviour.ending is not Ending.COMPLETE:
            content = content[: len(content) // 2]
        await send({"type": "http.response.body", "body": content, "more_body": True})
        return behaviour.ending is not Ending.CONNECTION_LOST

    async def _stream(self, body: dict[str, Any], send: Send) -> bool:
        behaviour = self._engine.behaviour
        await _start(send, "text/event-stream; charset=utf-8")
        for _ in range(behaviour.num_keep_alives):
            await _write(send, b": keep-alive\n\n")
        await asyncio.sleep(behaviour.ttft_s)
        for word in self._words():
            await _event(send, self._document([self._choice(word)]))
            await asyncio.sleep(behaviour.itl_s)
        match behaviour.ending:
            case Ending.CONNECTION_LOST:
                return False
            case Ending.SILENT_END:
                return True
            case Ending.ERROR_EVENT:
                message = (
                    "EngineCore encountered an issue. See stack trace (above) for the root cause."
                )
                error = {"message": message, "type": "InternalServerError", "param": None}
                await _event(send, {"error": error | {"code": 500}})
            case Ending.COMPLETE:
                last = self._choice("") | {"finish_reason": "stop"}
                await _event(send, self._document([last]))
                if (body.get("stream_options") or {}).get("include_usage"):
                    await _event(send, self._document([]) | {"usage": self._usage()})
        await _write(send, b"data: [DONE]\n\n")
        return True

    def _words(self) -> list[str]:
        behaviour = self._engine.behaviour
        padding = "x" * behaviour.num_padding_chars
        return [f"word{index} {padding}" for index in range(behaviour.num_tokens)]

    def _choice(self, text: str) -> dict[str, Any]:
        if self._kind == "chat.completion":
            return {"index": 0, "delta": {"role": "assistant", "content": text}}
        return {"index": 0, "text": text, "logprobs": None}

    def _document(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        is_chunk = any("delta" in choice for choice in choices) or not choices
        is_chat_chunk = is_chunk and self._kind == "chat.completion"
        return {
            "id": "cmpl-1",
            "object": "chat.completion.chunk" if is_chat_chunk else self._kind,
            "created": 1_700_000_000,
            "model": self._engine.behaviour.model,
            "choices": choices,
        }

    def _usage(self) -> dict[str, Any]:
        behaviour = self._engine.behaviour
        return {
            "prompt_tokens": behaviour.num_prompt_tokens,
            "completion_tokens": behaviour.num_tokens,
            "total_tokens": behaviour.num_prompt_tokens + behaviour.num_tokens,
            "prompt_tokens_details": {"cached_tokens": behaviour.num_cached_tokens},
        }


async def _start(send: Send, content_type: str) -> None:
    headers = [(b"content-type", content_type.encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})


async def _event(send: Send, document: dict[str, Any]) -> None:
    await _write(send, b"data: " + json.dumps(document).encode() + b"\n\n")


async def _write(send: Send, data: bytes) -> None:
    await send({"type": "http.response.body", "body": data, "more_body": True})
