"""The two generating endpoints: what comes in becomes a call, what the call yields becomes an answer."""

from __future__ import annotations

import hashlib
from contextlib import aclosing
from typing import TYPE_CHECKING

from starlette.requests import Request
from starlette.routing import Route

from sala_serve.api.progress import PROGRESS_HEADER, progress_event
from sala_serve.api.sse import AnswerWriter
from sala_serve.bodies import parse_generation
from sala_serve.errors import GatewayError, InvalidRequest
from sala_serve.events import DONE_EVENT
from sala_serve.generation import (
    PROMPT_FIELDS,
    Call,
    Chunk,
    Deadlines,
    Prefilling,
    Reserved,
    Waiting,
)
from sala_serve.generation.life import ASSUMED_OUTPUT_TOKENS
from sala_serve.generation.shared import Asked
from sala_serve.middleware import principal_of
from sala_serve.telemetry import Phase, RequestRecord

if TYPE_CHECKING:
    from starlette.datastructures import Headers
    from starlette.types import Receive, Scope, Send

    from sala_serve.bodies import Generation
    from sala_serve.gateway import Gateway
    from sala_serve.generation import Path, Update
    from sala_serve.running import RunningRequest

TIMEOUT_HEADER = "X-Request-Timeout-S"
MIN_TIMEOUT_S = 1.0
IDEMPOTENCY_HEADER = "Idempotency-Key"
CLIENT_TIMEOUT_HEADERS = (TIMEOUT_HEADER, "X-Stainless-Read-Timeout")
"""How long a client says that it waits; the second is from OpenAI's own clients."""
RETRY_HEADER = "X-Stainless-Retry-Count"
"""How often OpenAI's own clients have sent a request before."""
MAX_IDEMPOTENCY_KEY_CHARS = 255


def generation_routes(gateway: Gateway) -> list[Route]:
    """Return the routes of chats and of text completions."""
    return [
        Route(path, GenerationEndpoint(gateway, path), methods=["POST"]) for path in PROMPT_FIELDS
    ]


class GenerationEndpoint:
    """ASGI application of one path."""

    def __init__(self, gateway: Gateway, path: Path) -> None:
        self._gateway = gateway
        self._path = path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request to its end, which is always noted in its record."""
        gateway = self._gateway
        record = RequestRecord.of(scope)
        request = Request(scope, receive)
        writer = AnswerWriter(send, send_timeout_s=gateway.settings.server.send_timeout_s)
        try:
            async with gateway.running.admit(record) as running:
                record.enter(Phase.RECEIVE)
                principal = principal_of(scope)
                sender = principal.key_id or principal.tenant.tenant_id
                deadlines = deadlines_of(request.headers, gateway)
                async with gateway.uploads.parsed(request, sender=sender, parse=self._parse) as (
                    generation,
                    digest,
                ):
                    call = Call(
                        principal=principal,
                        path=self._path,
                        generation=generation,
                        request_id=record.request_id,
                        record=record,
                        deadlines=deadlines,
                        trace_headers=record.trace.headers(request.headers),
                    )
                    if generation.is_stream:
                        as_event = wants_events(request.headers)
                        work = self._stream(call, running, writer, as_event=as_event)
                        await running.while_client_stays(work, receive)
                        await writer.finish()
                    else:
                        answering = self._whole(call, running, digest, request.headers)
                        body, headers = await running.while_client_stays(answering, receive)
                        writer.headers.update(headers)
                        await writer.write_json(body)
        except GatewayError as error:
            await writer.fail(error, scope, receive)

    def _parse(self, raw: bytes) -> tuple[Generation, bytes]:
        bounds = self._gateway.settings.bodies
        generation = parse_generation(raw, PROMPT_FIELDS[self._path], bounds)
        digest = b"" if generation.is_stream else hashlib.sha256(raw).digest()
        return generation, digest

    async def _stream(
        self, call: Call, running: RunningRequest, writer: AnswerWriter, *, as_event: bool
    ) -> None:
        server, clock = self._gateway.settings.server, self._gateway.clock
        # until then an error can still have a status of its own
        next_note_at_s = clock() + server.hold_status_s
        note = self._noting(call, running)
        async with aclosing(self._gateway.generations.run(call)) as updates:
            async for update in updates:
                note(update)
                if isinstance(update, Chunk):
                    await writer.write_event(update.event)
                elif isinstance(update, Reserved):
                    writer.headers.update(update.headers)
                elif clock() >= next_note_at_s and (
                    event := progress_event(update, as_event=as_event)
                ):
                    next_note_at_s = clock() + 0.9 * server.progress_interval_s
                    await writer.write_event(event)
        await writer.write_event(DONE_EVENT)

    async def _whole(
        self, call: Call, running: RunningRequest, digest: bytes, headers: Headers
    ) -> tuple[bytes, dict[str, str]]:
        clock = self._gateway.clock
        asked = Asked(
            principal=call.principal,
            path=call.path,
            body_digest=digest,
            idempotency_key=_idempotency_key(headers),
            is_retry=headers.get(RETRY_HEADER, "0") != "0",
        )
        patience_s = _patience_s(headers)
        ends_at_s = None if patience_s is None else call.record.started_at_s + patience_s - 1

        def comes_back() -> bool:
            timed_out = ends_at_s is not None and clock() >= ends_at_s
            return asked.idempotency_key is not None or timed_out

        whole, given = await self._gateway.answers.answer(
            call, asked, comes_back=comes_back, note=self._noting(call, running)
        )
        return whole.body, dict(given)

    def _noting(self, call: Call, running: RunningRequest) -> Noting:
        return Noting(self._gateway, call, running)


class Noting:
    """Keeps what a drain must know of a running request: whether it waits, and how long it will take."""

    def __init__(self, gateway: Gateway, call: Call, running: RunningRequest) -> None:
        self._gateway = gateway
        self._running = running
        self._num_chunks = 0
        self._first_at_s = 0.0
        self._most_tokens = call.generation.max_output_tokens or ASSUMED_OUTPUT_TOKENS

    def __call__(self, update: Update) -> None:
        """Take note of one update."""
        running = self._running
        if isinstance(update, Chunk):
            self._num_chunks += 1
            now_s = self._gateway.clock()
            if self._num_chunks == 1:
                self._first_at_s = now_s
            else:
                per_token_s = (now_s - self._first_at_s) / (self._num_chunks - 1)
                running.remaining_s = max(self._most_tokens - self._num_chunks, 0) * per_token_s
            return
        if isinstance(update, Waiting):
            running.remaining_s = update.expected_first_token_s
            self._gateway.running.note_waiting(running)
        elif isinstance(update, Prefilling):
            running.is_waiting = False
            running.remaining_s = update.expected_first_token_s


def deadlines_of(headers: Headers, gateway: Gateway) -> Deadlines:
    """Return the deadlines of a request, shortened as its client asks; else :class:`InvalidRequest`."""
    deadlines = Deadlines(**gateway.settings.deadlines.model_dump())
    if (text := headers.get(TIMEOUT_HEADER)) is None:
        return deadlines
    timeout_s = _seconds(text)
    if timeout_s is None or timeout_s < MIN_TIMEOUT_S:
        raise InvalidRequest(f"{TIMEOUT_HEADER}: expected seconds, at least {MIN_TIMEOUT_S:g}.")
    return deadlines.shortened(timeout_s)


def _patience_s(headers: Headers) -> float | None:
    """Return how long the client says that it waits, if it does."""
    stated = [_seconds(headers.get(name, "")) for name in CLIENT_TIMEOUT_HEADERS]
    return min((each for each in stated if each is not None), default=None)


def _seconds(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if 0 < value < float("inf") else None


def _idempotency_key(headers: Headers) -> str | None:
    key = headers.get(IDEMPOTENCY_HEADER)
    if key is not None and not 0 < len(key) <= MAX_IDEMPOTENCY_KEY_CHARS:
        raise InvalidRequest(
            f"{IDEMPOTENCY_HEADER}: expected 1 to {MAX_IDEMPOTENCY_KEY_CHARS} characters."
        )
    return key


def wants_events(headers: Headers) -> bool:
    """Return whether progress is to come as events; else :class:`InvalidRequest` for an unknown word."""
    wanted = headers.get(PROGRESS_HEADER, "comments").lower()
    if wanted not in ("comments", "events"):
        raise InvalidRequest(f"{PROGRESS_HEADER}: expected events or comments.")
    return wanted == "events"
