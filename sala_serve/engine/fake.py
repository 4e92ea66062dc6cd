"""A stand-in for vLLM: a small real HTTP server whose timing and failures can be set.

It speaks as much of vLLM's protocol as the gateway uses, streams words instead of computing them, and
notices when a client goes away as vLLM does. Tests and load tests run the gateway against it, in their own
process (:class:`FakeEngine` is an ASGI application) or beside it (``python -m sala_serve.engine.fake``).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from sala_serve.engine.fake_core import (
    Behaviour,
    CoreDied,
    Ending,
    FakeCore,
    Fault,
    Job,
    prompt_tokens,
)
from sala_serve.errors import ClientDisconnected
from sala_serve.running import RunningRequest

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.types import Message, Receive, Scope, Send

__all__ = ["Behaviour", "Ending", "FakeEngine", "Fault", "Journal"]

_DEAD_CORE = {
    "message": "EngineCore encountered an issue. See stack trace (above) for the root cause.",
    "type": "InternalServerError",
    "param": None,
    "code": 500,
}


@dataclass
class Journal:
    """What the engine has seen."""

    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    ends: dict[str, str] = field(default_factory=dict)
    """How each request ended, by its ``X-Request-Id``: ``finished``, ``aborted`` or ``died`` with the engine."""
    num_running: int = 0
    num_aborted: int = 0
    num_tokenized: int = 0
    """Requests to ``/tokenize``."""


class FakeEngine:
    """One engine; :attr:`app` is its ASGI application."""

    def __init__(
        self, behaviour: Behaviour | None = None, *, on_death: Callable[[], None] = lambda: None
    ) -> None:
        self.behaviour = behaviour or Behaviour()
        self.journal = Journal()
        self.core = FakeCore(self.behaviour, on_death)
        self.is_deaf = False
        """Takes connections and never answers, as a stopped process."""
        self.app = Starlette(
            routes=[
                Route("/health", self._health),
                Route("/metrics", self._metrics),
                Route("/sala/progress", self._progress),
                Route("/tokenize", self._tokenize, methods=["POST"]),
                Route("/v1/models", self._models),
                Route("/v1/chat/completions", _Generate(self, "chat.completion"), methods=["POST"]),
                Route("/v1/completions", _Generate(self, "text_completion"), methods=["POST"]),
            ]
        )

    async def listen(self) -> None:
        """Return at once unless the engine is deaf."""
        while self.is_deaf:  # noqa: ASYNC110 - a flag that tests set
            await asyncio.sleep(0.01)

    async def _health(self, _request: Request) -> Response:
        await self.listen()
        status = 503 if self.core.is_dead else self.behaviour.health_status
        return Response(status_code=status)

    async def _metrics(self, _request: Request) -> Response:
        await self.listen()
        return PlainTextResponse(self.core.metrics())

    async def _progress(self, _request: Request) -> Response:
        await self.listen()
        if not self.behaviour.has_progress:
            return JSONResponse({"detail": "Not Found"}, status_code=404)
        return JSONResponse(self.core.progress())

    async def _tokenize(self, request: Request) -> Response:
        await self.listen()
        self.journal.num_tokenized += 1
        (tokens,) = prompt_tokens(await request.json())
        count = self.behaviour.num_prompt_tokens or len(tokens)
        answer = {"count": count, "max_model_len": self.behaviour.max_model_len}
        return JSONResponse(answer | {"tokens": tokens, "token_strs": None})

    async def _models(self, _request: Request) -> Response:
        await self.listen()
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
        await self._engine.listen()
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
        answer = _Answer(self._engine, self._kind, body, request.headers, send)
        request_id = answer.job.request_id
        journal.num_running += 1
        try:
            async with RunningRequest() as running:
                is_complete = await running.while_client_stays(answer.send(), receive)
        except ClientDisconnected:
            journal.num_aborted += 1
            journal.ends.setdefault(request_id, "aborted")
        else:
            journal.ends.setdefault(request_id, "finished")
            # without the closing message the server drops the connection
            if is_complete:
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            journal.num_running -= 1
            if self._engine.core.is_dead and not journal.num_running:
                self._engine.core.on_death()


class _Answer:
    """One answer being made."""

    def __init__(
        self, engine: FakeEngine, kind: str, body: dict[str, Any], headers: Any, send: Send
    ) -> None:
        self._engine, self._behaviour, self._core = engine, engine.behaviour, engine.core
        self._kind, self._body, self._send = kind, body, send
        self._is_chat = kind == "chat.completion"
        self.job: Job = engine.core.job(body, headers.get("x-request-id", ""))
        self._is_started = False

    async def send(self) -> bool:
        """Send the answer; tell whether its end is to be sent too."""
        try:
            with self._core.holding(self.job):
                return await (self._stream() if self._body.get("stream") else self._whole())
        except CoreDied:
            self._engine.journal.ends[self.job.request_id] = "died"
            if self._body.get("stream"):
                await self._begin("text/event-stream; charset=utf-8")
                await self._event({"error": _DEAD_CORE})
                await self._write(b"data: [DONE]\n\n")
            else:
                await self._begin("application/json", 500)
                await self._write(json.dumps({"error": _DEAD_CORE}).encode())
            return True

    async def _whole(self) -> bool:
        behaviour = self._behaviour
        await self._core.prefill(self.job)
        words = self._words()
        for _ in words:
            await self._core.decode(self.job)
        if self._is_chat:
            message = {"role": "assistant", "content": "".join(words)} | self._tool_calls()
            choice: dict[str, Any] = {"message": message}
        else:
            choice = {"text": "".join(words), "logprobs": None}
        choice |= {"finish_reason": self._finish_reason(len(words))}
        document = self._document(choice) | {"usage": self._usage()}
        await self._begin("application/json")
        content = json.dumps(document).encode()
        if behaviour.ending is not Ending.COMPLETE:
            content = content[: len(content) // 2]
        await self._write(content)
        return behaviour.ending is not Ending.CONNECTION_LOST

    async def _stream(self) -> bool:
        behaviour = self._behaviour
        await self._begin("text/event-stream; charset=utf-8")
        for _ in range(behaviour.num_keep_alives):
            await self._write(b": keep-alive\n\n")
        await self._core.prefill(self.job)
        words = self._words()
        for word in words:
            await self._event(self._document(self._piece(word)))
            await self._core.decode(self.job)
        match behaviour.ending:
            case Ending.CONNECTION_LOST:
                return False
            case Ending.SILENT_END:
                return True
            case Ending.ERROR_EVENT:
                await self._event({"error": _DEAD_CORE})
            case Ending.COMPLETE:
                last = self._piece("") | {"finish_reason": self._finish_reason(len(words))}
                if self._is_chat:
                    last["delta"] |= self._tool_calls()
                await self._event(self._document(last))
                if (self._body.get("stream_options") or {}).get("include_usage"):
                    await self._event(self._document(None) | {"usage": self._usage()})
        await self._write(b"data: [DONE]\n\n")
        return True

    def _words(self) -> list[str]:
        behaviour = self._behaviour
        longest = self._body.get("max_completion_tokens") or self._body.get("max_tokens")
        num_tokens = min(behaviour.num_tokens, longest or behaviour.num_tokens)
        padding = "x" * behaviour.num_padding_chars
        return [f"word{index} {padding}" for index in range(num_tokens)]

    def _tool_calls(self) -> dict[str, Any]:
        tools = self._body.get("tools")
        if not (self._behaviour.calls_tools and tools):
            return {}
        function = {"name": tools[0]["function"]["name"], "arguments": "{}"}
        call = {"index": 0, "id": "call-1", "type": "function", "function": function}
        return {"tool_calls": [call]}

    def _finish_reason(self, num_words: int) -> str:
        if self._is_chat and self._tool_calls():
            return "tool_calls"
        return "length" if num_words < self._behaviour.num_tokens else "stop"

    def _piece(self, text: str) -> dict[str, Any]:
        if self._is_chat:
            return {"delta": {"role": "assistant", "content": text}}
        return {"text": text, "logprobs": None}

    def _document(self, choice: dict[str, Any] | None) -> dict[str, Any]:
        """Wrap a choice, repeated for each answer asked for, or none."""
        is_chunk = self._is_chat and (choice is None or "delta" in choice)
        indices = range(self.job.num_answers if choice is not None else 0)
        return {
            "id": "cmpl-1",
            "object": "chat.completion.chunk" if is_chunk else self._kind,
            "created": 1_700_000_000,
            "model": self._behaviour.model,
            "choices": [{"index": index} | (choice or {}) for index in indices],
        }

    def _usage(self) -> dict[str, Any]:
        job = self.job
        return {
            "prompt_tokens": job.num_prompt_tokens,
            "completion_tokens": job.num_output_tokens,
            "total_tokens": job.num_prompt_tokens + job.num_output_tokens,
            "prompt_tokens_details": {"cached_tokens": job.num_cached_tokens},
        }

    async def _begin(self, content_type: str, status: int = 200) -> None:
        if not self._is_started:
            self._is_started = True
            headers = [(b"content-type", content_type.encode())]
            start: Message = {"type": "http.response.start", "status": status, "headers": headers}
            await self._send(start)

    async def _event(self, document: dict[str, Any]) -> None:
        await self._write(b"data: " + json.dumps(document).encode() + b"\n\n")

    async def _write(self, data: bytes) -> None:
        await self._send({"type": "http.response.body", "body": data, "more_body": True})


def main() -> None:
    """Serve one fake engine on a port of this machine; ``BEHAVIOUR`` is JSON with fields of Behaviour."""
    import uvicorn

    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--port", type=int, default=8001)
    parser.add_argument("behaviour", nargs="?", default="{}", metavar="BEHAVIOUR")
    options = parser.parse_args()
    behaviour = Behaviour(**json.loads(options.behaviour))
    engine = FakeEngine(behaviour, on_death=lambda: os._exit(1))
    uvicorn.run(engine.app, port=options.port, log_level="warning")


if __name__ == "__main__":
    main()
