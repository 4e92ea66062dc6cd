"""``/v1/responses``: the wire of OpenAI's Responses API; what it does is in ``jobs/responses.py``."""

from __future__ import annotations

from contextlib import aclosing, suppress
from typing import TYPE_CHECKING, Any, Literal

from fastapi import APIRouter
from pydantic import BaseModel, Field
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from sala_serve.api.generate import deadlines_of, wants_events
from sala_serve.api.objects import (
    Deleted,
    Page,
    StoredObject,
    answers,
    json_body,
    page_of,
    page_parameters,
    path_parameter,
    query_parameter,
    read_choice,
    read_int,
)
from sala_serve.api.progress import EVENT_NAME
from sala_serve.api.sse import AnswerWriter
from sala_serve.bodies import parse_object
from sala_serve.errors import GatewayError, InvalidRequest
from sala_serve.events import comment, named_event
from sala_serve.generation.call import Reserved
from sala_serve.jobs.model import Event, Job, dump
from sala_serve.jobs.response_request import parse_response_request
from sala_serve.jobs.responses import response_view
from sala_serve.jobs.running import Progress
from sala_serve.middleware import principal_of
from sala_serve.telemetry import RequestRecord

if TYPE_CHECKING:
    from collections.abc import Awaitable
    from contextlib import AbstractAsyncContextManager

    from starlette.types import Receive, Scope, Send

    from sala_serve.gateway import Gateway
    from sala_serve.jobs.response_request import ResponseRequest
    from sala_serve.jobs.responses import Prepared
    from sala_serve.running import RunningRequest
    from sala_serve.tenants.model import Principal

_NEWEST_SEQUENCE_NUMBER = 2**53


class ResponseObject(StoredObject):
    """A response."""

    id: str
    object: Literal["response"]
    created_at: float
    status: Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]
    model: str
    output: list[dict[str, Any]]
    usage: dict[str, Any] | None
    error: dict[str, Any] | None
    sala: dict[str, Any] | None
    """Where a response that is not over stands: attempt, phase, place, done_tokens, total_tokens, ..."""


class CreateResponse(BaseModel):
    """The fields of a body most used; OpenAI's documentation has all of them."""

    model: str
    input: str | list[InputMessage] = Field(min_length=1)
    instructions: str | None = None
    previous_response_id: str | None = None
    stream: bool | None = None
    store: bool | None = None
    background: bool | None = None
    max_output_tokens: int | None = Field(default=None, ge=1, le=2**31)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, ge=0, le=1)
    metadata: dict[str, str] | None = Field(default=None, max_length=16)
    prompt_cache_key: str | None = Field(default=None, max_length=256)


class InputMessage(BaseModel):
    """One item of the input; calls of functions, their outputs and reasoning are others."""

    type: Literal["message"] = "message"
    role: Literal["user", "system", "developer", "assistant"]
    content: str


class InputTokens(StoredObject):
    """How many tokens the model would read."""

    object: Literal["response.input_tokens"]
    input_tokens: int


_OPENING_EVENTS = ("response.created", "response.in_progress")
_ONE = {"parameters": [path_parameter("response_id")]}


def responses_router(gateway: Gateway) -> APIRouter:
    """Return the routes of responses."""
    router = APIRouter()
    responses = gateway.jobs.responses

    @router.post(
        "/v1/responses",
        responses=answers(ResponseObject, also="text/event-stream"),
        openapi_extra=json_body(CreateResponse),
    )
    async def create_response(_request: Request) -> Response:
        """Answer a conversation; streamed, stored, or in the background."""
        return _Create(gateway)

    @router.post(
        "/v1/responses/input_tokens",
        responses=answers(InputTokens),
        openapi_extra=json_body(CreateResponse),
    )
    async def count_input_tokens(request: Request) -> Response:
        """Count the tokens that a response's prompt would have."""
        principal = principal_of(request.scope)
        async with _parsed(gateway, request, principal) as parsed:
            num_tokens = await responses.count_input_tokens(principal, parsed)
        return JSONResponse({"object": "response.input_tokens", "input_tokens": num_tokens})

    @router.get(
        "/v1/responses/{response_id}",
        responses=answers(ResponseObject, also="text/event-stream"),
        openapi_extra={
            "parameters": [
                path_parameter("response_id"),
                query_parameter("stream", {"type": "boolean", "default": False}),
                query_parameter("starting_after", {"type": "integer", "minimum": 0}),
            ]
        },
    )
    async def show_response(request: Request) -> Response:
        """Show a stored response, or stream the events of a background one from ``starting_after`` on."""
        principal = principal_of(request.scope)
        if read_choice(request, "stream", "false", "true") == "true":
            after = read_int(request, "starting_after", -1, -1, _NEWEST_SEQUENCE_NUMBER)
            job = await responses.resumable(principal, _id(request))
            return _Follow(gateway, job, after)
        if "starting_after" in request.query_params:
            raise InvalidRequest("It needs stream=true.", param="starting_after")
        return JSONResponse(response_view(await responses.get(principal, _id(request))))

    @router.post(
        "/v1/responses/{response_id}/cancel",
        responses=answers(ResponseObject),
        openapi_extra=_ONE,
    )
    async def cancel_response(request: Request) -> Response:
        """End a background response."""
        job = await responses.cancel(principal_of(request.scope), _id(request))
        return JSONResponse(response_view(job))

    @router.delete("/v1/responses/{response_id}", responses=answers(Deleted), openapi_extra=_ONE)
    async def delete_response(request: Request) -> Response:
        """Remove a stored response; one that runs is stopped."""
        await responses.delete(principal_of(request.scope), _id(request))
        return JSONResponse({"id": _id(request), "object": "response", "deleted": True})

    @router.get(
        "/v1/responses/{response_id}/input_items",
        responses=answers(Page),
        openapi_extra={
            "parameters": [
                path_parameter("response_id"),
                *page_parameters(100, 20),
                query_parameter("order", {"type": "string", "enum": ["asc", "desc"]}),
            ]
        },
    )
    async def list_input_items(request: Request) -> Response:
        """List the items of a response's own input."""
        limit = read_int(request, "limit", 20, 1, 100)
        order = read_choice(request, "order", "desc", "asc")
        items = await responses.input_items(principal_of(request.scope), _id(request))
        if order == "desc":
            items.reverse()
        if (after := request.query_params.get("after")) is not None:
            ids = [item["id"] for item in items]
            if after not in ids:
                raise InvalidRequest("There is no such item.", param="after")
            items = items[ids.index(after) + 1 :]
        return JSONResponse(page_of(items[: limit + 1], limit))

    return router


def _id(request: Request) -> str:
    response_id: str = request.path_params["response_id"]
    return response_id


def _parsed(
    gateway: Gateway, request: Request, principal: Principal
) -> AbstractAsyncContextManager[ResponseRequest]:
    """Receive a body; it counts as held for the length of the block."""
    bounds = gateway.settings.bodies

    def parse(raw: bytes) -> ResponseRequest:
        return parse_response_request(parse_object(raw, bounds))

    sender = principal.key_id or principal.tenant.tenant_id
    return gateway.uploads.parsed(request, sender=sender, parse=parse)


class _Answer(Response):
    """An answer that takes long: the client may leave, the gateway may cut it, it may fail in the middle."""

    def __init__(self, gateway: Gateway) -> None:
        super().__init__()
        self._gateway = gateway
        self._sequence_number = -1
        self._told_at_s = float("-inf")
        self._wants_progress_events = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, to the end, which is noted in the request's record."""
        record = RequestRecord.of(scope)
        writer = AnswerWriter(send, send_timeout_s=self._gateway.settings.server.send_timeout_s)
        try:
            self._wants_progress_events = wants_events(Headers(scope=scope))
            async with self._gateway.running.admit(record) as running:
                await self._answer(Request(scope, receive), running, writer)
        except GatewayError as error:
            await writer.fail(error, scope, receive, last_event=self._last_event)

    async def _answer(
        self, request: Request, running: RunningRequest, writer: AnswerWriter
    ) -> None:
        raise NotImplementedError

    async def _last_event(self, error: GatewayError) -> bytes:
        """Return what ends a stream that broke; clients raise it."""
        return error.event()

    def _numbered(self, event: dict[str, Any]) -> bytes:
        self._sequence_number += 1
        return Event(self._sequence_number, dump(event)).sse()

    async def _write_progress(self, writer: AnswerWriter, fields: dict[str, Any]) -> None:
        """Show where the response stands, once a second at most, in a line that clients ignore."""
        now_s = self._gateway.clock()
        if now_s - self._told_at_s < self._gateway.settings.server.progress_interval_s:
            return
        self._told_at_s = now_s
        if self._wants_progress_events:
            await writer.write_event(named_event(EVENT_NAME, fields))
            return
        phase = fields.get("phase", "in_progress")
        numbers = {
            name: round(value) for name, value in fields.items() if isinstance(value, int | float)
        }
        await writer.write_event(comment(phase, numbers))


class _Follow(_Answer):
    """The stored events of a background response, and those to come."""

    def __init__(self, gateway: Gateway, job: Job, after: int) -> None:
        super().__init__(gateway)
        self._job = job
        self._after = after

    async def _answer(
        self, request: Request, running: RunningRequest, writer: AnswerWriter
    ) -> None:
        await running.while_client_stays(self._write(self._job, running, writer), request.receive)
        await writer.finish()

    async def _write(self, job: Job, running: RunningRequest, writer: AnswerWriter) -> None:
        if not self._gateway.state.is_embedded:
            # the job goes on without its reader, who can follow it from any replica
            self._gateway.running.note_waiting(running)
        async with aclosing(self._gateway.jobs.responses.follow(job, self._after)) as updates:
            async for each in updates:
                if isinstance(each, Event):
                    await writer.write_event(each.sse())
                else:
                    await self._write_progress(writer, response_view(each)["sala"])
        if not writer.is_started:  # everything was seen before
            await writer.write_event(b": complete\n\n")


class _Create(_Follow):
    """A new response."""

    def __init__(self, gateway: Gateway) -> None:
        _Answer.__init__(self, gateway)
        self._after = -1
        self._prepared: Prepared | None = None
        """Set while a response streams that only this request runs."""

    async def _answer(
        self, request: Request, running: RunningRequest, writer: AnswerWriter
    ) -> None:
        principal = principal_of(request.scope)
        deadlines = deadlines_of(request.headers, self._gateway)
        async with _parsed(self._gateway, request, principal) as parsed:
            record = RequestRecord.of(request.scope)
            work = self._work(
                parsed,
                self._gateway.jobs.responses.prepare(
                    principal,
                    parsed,
                    request_id=record.request_id,
                    trace_headers=record.trace.headers(request.headers),
                    record=None if parsed.is_background else record,
                    deadlines=deadlines,
                ),
                running,
                writer,
            )
            whole = await running.while_client_stays(work, request.receive)
        if whole is None:
            await writer.finish()
        else:
            await writer.write_json(dump(whole))

    async def _work(
        self,
        parsed: ResponseRequest,
        preparing: Awaitable[Prepared],
        running: RunningRequest,
        writer: AnswerWriter,
    ) -> dict[str, Any] | None:
        """Run the response; return it unless it was streamed."""
        responses = self._gateway.jobs.responses
        prepared = await preparing
        if parsed.is_background:
            job = await responses.start(prepared)
            if not parsed.is_stream:
                return response_view(job)
            await self._write(job, running, writer)
            return None
        if parsed.is_stream:
            await self._stream(prepared, running, writer)
            return None
        document: dict[str, Any] = {}
        async with aclosing(responses.run(prepared)) as updates:
            async for each in updates:
                if not isinstance(each, dict):
                    self._note(each, running, writer)
                elif "response" in each:
                    document = each["response"]
        return document

    def _note(
        self, update: Progress | Reserved, running: RunningRequest, writer: AnswerWriter
    ) -> None:
        """Keep what the answer's headers and a drain need."""
        if isinstance(update, Reserved):
            writer.headers.update(update.headers)
            return
        running.remaining_s = update.expected_first_token_s
        if update.phase == "queued":
            self._gateway.running.note_waiting(running)
        else:
            running.is_waiting = False

    async def _stream(
        self, prepared: Prepared, running: RunningRequest, writer: AnswerWriter
    ) -> None:
        """Relay a response; its first events wait a little, so that an early error keeps its status."""
        clock = self._gateway.clock
        hold_until_s = clock() + self._gateway.settings.server.hold_status_s
        held = b""
        self._prepared = prepared
        async with aclosing(self._gateway.jobs.responses.run(prepared)) as updates:
            async for each in updates:
                if isinstance(each, dict):
                    held += self._numbered(each)
                    is_first_word = each["type"] not in _OPENING_EVENTS
                else:
                    self._note(each, running, writer)
                    is_first_word = False
                if not writer.is_started and not is_first_word and clock() < hold_until_s:
                    continue
                if held:
                    await writer.write_event(held)
                    held = b""
                if isinstance(each, Progress):
                    await self._write_progress(writer, each.fields())

    async def _last_event(self, error: GatewayError) -> bytes:
        if self._prepared is None:
            return error.event()
        with suppress(GatewayError):  # the store may be what is away
            return self._numbered(await self._gateway.jobs.responses.fail(self._prepared, error))
        return error.event()
