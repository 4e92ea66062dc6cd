"""The life of a request that generates text; chat and text completions differ in their body only."""

from __future__ import annotations

import asyncio
import json
from contextlib import aclosing, suppress
from typing import TYPE_CHECKING, Any

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.routing import Route

from sala_serve.api.sse import AnswerWriter
from sala_serve.bodies import Generation, parse_generation
from sala_serve.engine.vllm_errors import error_from_vllm
from sala_serve.errors import (
    BodyTooLarge,
    ClientDisconnected,
    EngineLost,
    GatewayError,
    InvalidRequest,
    UploadTimeout,
)
from sala_serve.events import DONE, event_data, split_events
from sala_serve.middleware import REQUEST_ID_HEADER, send_error
from sala_serve.telemetry import RequestRecord, Usage

if TYPE_CHECKING:
    from contextlib import AbstractAsyncContextManager

    from starlette.types import Receive, Scope, Send

    from sala_serve.engine.http import EngineReply
    from sala_serve.gateway import Gateway

PARSE_IN_THREAD_BYTES = 256 * 1024
"""Smaller bodies take less time to parse than a thread takes to start on them."""
_TRACE_HEADERS = ("traceparent", "tracestate")


def generation_routes(gateway: Gateway) -> list[Route]:
    """Return the routes of chats and of text completions."""
    prompt_fields = {"/v1/chat/completions": "messages", "/v1/completions": "prompt"}
    return [
        Route(path, GenerationEndpoint(gateway, path, prompt_field), methods=["POST"])
        for path, prompt_field in prompt_fields.items()
    ]


class GenerationEndpoint:
    """ASGI application of one path: checks the body, relays it to the engine, relays the answer."""

    def __init__(self, gateway: Gateway, path: str, prompt_field: str) -> None:
        self._gateway = gateway
        self._path = path
        self._prompt_field = prompt_field

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request to its end, which is always noted in its record."""
        record = RequestRecord.of(scope)
        writer = AnswerWriter(send, send_timeout_s=self._gateway.settings.server.send_timeout_s)
        try:
            async with self._gateway.running.admit() as running:
                generation = await self._receive(Request(scope, receive))
                self._gateway.monitor.require_ready()
                self._gateway.monitor.require_model(generation.model)
                headers = _engine_headers(scope, record)
                if generation.is_stream:
                    work = self._stream(generation, headers, record, writer)
                    await running.while_client_stays(work, receive)
                    await writer.finish()
                else:
                    fetching = self._fetch(generation, headers, record)
                    await writer.write_json(await running.while_client_stays(fetching, receive))
        except GatewayError as error:
            record.status, record.error_code = error.status, error.code
            if isinstance(error, ClientDisconnected) or writer.is_json_started:
                return  # the server closes the connection of an answer that is not complete
            if not writer.is_started:
                await send_error(error, scope, receive, send)
                return
            with suppress(ClientDisconnected):
                await writer.write_event(error.event())
                await writer.finish()

    async def _receive(self, request: Request) -> Generation:
        config = self._gateway.settings.server
        encoding = request.headers.get("content-encoding", "identity")
        if encoding.lower() != "identity":
            raise InvalidRequest("Content-Encoding is not supported: send the body as it is.")
        num_bytes, raw = int(request.headers.get("content-length", 0)), bytearray()
        try:
            async with asyncio.timeout(config.upload_timeout_s):
                if num_bytes <= config.max_body_bytes:
                    async for piece in request.stream():
                        raw += piece
                        num_bytes = len(raw)
                        if num_bytes > config.max_body_bytes:
                            break
        except TimeoutError:
            raise UploadTimeout("The request body did not arrive in time.") from None
        except ClientDisconnect:
            raise ClientDisconnected("The client left while sending its request.") from None
        if num_bytes > config.max_body_bytes:
            raise BodyTooLarge(
                f"The request body is larger than this server's limit of {config.max_body_bytes} bytes."
            )
        if len(raw) < PARSE_IN_THREAD_BYTES:
            return parse_generation(bytes(raw), self._prompt_field)
        return await asyncio.to_thread(parse_generation, bytes(raw), self._prompt_field)

    async def _fetch(
        self, generation: Generation, headers: dict[str, str], record: RequestRecord
    ) -> bytes:
        async with self._post(generation, headers) as reply:
            body = await reply.read()
        try:
            record.usage = _usage(json.loads(body))
        except ValueError:
            raise EngineLost("The engine's answer is not complete.") from None
        return body

    async def _stream(
        self,
        generation: Generation,
        headers: dict[str, str],
        record: RequestRecord,
        writer: AnswerWriter,
    ) -> None:
        clock = self._gateway.clock
        async with (
            self._post(generation, headers) as reply,
            aclosing(split_events(reply.chunks())) as events,
        ):
            async for event in events:
                data = event_data(event)
                if data is None:  # a keep-alive comment during a long prefill
                    await writer.write_event(event)
                    continue
                if data == DONE:
                    await writer.write_event(event)
                    return
                chunk = self._checked_chunk(data)
                if record.ttft_s is None:
                    record.ttft_s = clock() - record.started_at_s
                if (usage := _usage(chunk)) is not None:
                    record.usage = usage
                    if not chunk.get("choices") and not generation.client_wants_usage:
                        continue
                await writer.write_event(event)
        raise EngineLost("The engine's stream ended before the answer was complete.")

    def _checked_chunk(self, data: bytes) -> dict[str, Any]:
        """Parse one event of the engine; an error event is raised."""
        try:
            chunk = json.loads(data)
        except ValueError:
            raise EngineLost("The engine's stream is damaged.") from None
        if not isinstance(chunk, dict):
            raise EngineLost("The engine's stream is damaged.")
        if (error := chunk.get("error")) is not None:
            status = error.get("code") if isinstance(error, dict) else None
            status = status if isinstance(status, int) else 500
            raise error_from_vllm(status, data, prompt_field=self._prompt_field)
        return chunk

    def _post(
        self, generation: Generation, headers: dict[str, str]
    ) -> AbstractAsyncContextManager[EngineReply]:
        return self._gateway.engine.post(
            self._path, generation.body, headers=headers, prompt_field=self._prompt_field
        )


def _engine_headers(scope: Scope, record: RequestRecord) -> dict[str, str]:
    """Return the headers the engine gets; no other header of the client reaches it."""
    client_headers = Headers(scope=scope)
    trace = {name: value for name in _TRACE_HEADERS if (value := client_headers.get(name))}
    return {REQUEST_ID_HEADER: record.request_id, **trace}


def _usage(document: Any) -> Usage | None:
    usage = document.get("usage") if isinstance(document, dict) else None
    if not isinstance(usage, dict):
        return None
    details = usage.get("prompt_tokens_details") or {}
    return Usage(
        num_prompt_tokens=usage.get("prompt_tokens") or 0,
        num_cached_tokens=details.get("cached_tokens") or 0,
        num_completion_tokens=usage.get("completion_tokens") or 0,
    )
