"""Responses: answered to a client that waits, or run in the background; stored, continued, read again."""

from __future__ import annotations

import asyncio
import json
import logging
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sala_serve.errors import InsufficientQuota, InvalidRequest, NotFound, StateUnavailable
from sala_serve.jobs.model import Job, Status, new_id
from sala_serve.jobs.principals import dump_principal, load_principal
from sala_serve.jobs.response_stream import (
    ResponseStream,
    abandoned_items,
    event,
    failed,
    response_document,
)
from sala_serve.jobs.running import EngineRequest, Progress
from sala_serve.jobs.store import LeaseLost

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Mapping

    from sala_serve.errors import GatewayError
    from sala_serve.generation.call import Deadlines
    from sala_serve.jobs.model import Event, Lease
    from sala_serve.jobs.response_request import ResponseRequest
    from sala_serve.jobs.running import Engines, Piece
    from sala_serve.jobs.store import JobStore
    from sala_serve.jobs.worker import Held
    from sala_serve.telemetry import RequestRecord
    from sala_serve.tenants.model import Principal

logger = logging.getLogger(__name__)

MAX_CHAIN = 1000
_PROGRESS_INTERVAL_S = 1.0


@dataclass(frozen=True)
class Prepared:
    """A response that may begin."""

    request: ResponseRequest
    engine_request: EngineRequest
    document: Mapping[str, Any] = field(repr=False)
    """With status ``in_progress``."""


class Responses:
    """What clients do with responses.

    Args:
        store: where they are kept.
        engines: runs them.
        wall_clock: Unix seconds.
    """

    def __init__(
        self, store: JobStore, engines: Engines, *, wall_clock: Callable[[], float]
    ) -> None:
        self._store = store
        self._engines = engines
        self._wall_clock = wall_clock

    async def prepare(
        self,
        principal: Principal,
        request: ResponseRequest,
        *,
        request_id: str,
        trace_headers: Mapping[str, str],
        record: RequestRecord | None,
        deadlines: Deadlines | None = None,
    ) -> Prepared:
        """Resolve what a request refers to and check the chat that it becomes.

        Raises:
            RequestError: it cannot be served as it is.
            StateUnavailable: it refers to a stored response and the store is away.
        """
        history = await self._history(principal.tenant.tenant_id, request.previous_response_id)
        engine_request = EngineRequest(
            principal=principal,
            path="/v1/chat/completions",
            document={
                **request.chat_document(history),
                "stream": True,
                "stream_options": {"include_usage": True},
            },
            request_id=request_id,
            trace_headers=trace_headers,
            record=record,
            deadlines=deadlines,
        )
        engine_request = await asyncio.to_thread(self._engines.check, engine_request)
        document = response_document(request, new_id("resp_"), self._wall_clock(), Status.RUNNING)
        return Prepared(request, engine_request, document)

    async def run(self, prepared: Prepared) -> AsyncGenerator[Piece]:
        """Run a response for a client that waits; yields progress and events, the final one last.

        It is stored, if it is to be, before its last event. Raises GatewayError.
        """
        stream = ResponseStream(prepared.document)
        yield event("created", prepared.document)
        yield event("in_progress", prepared.document)
        async with aclosing(self._engines.run(prepared.engine_request)) as pieces:
            async for piece in pieces:
                if isinstance(piece, dict):
                    for each in stream.feed(piece):
                        yield each
                else:
                    yield piece
        status, document, events = stream.finish(self._wall_clock())
        try:
            await self._keep(prepared, status, document)
        except (InsufficientQuota, StateUnavailable) as error:
            # an answer that was computed is given; it says itself that it cannot be read again
            logger.warning("response %s is not stored: %s", document["id"], error.code)
            document["store"] = False
        for each in events:
            yield each

    async def fail(self, prepared: Prepared, error: GatewayError) -> dict[str, Any]:
        """Store that a response which had begun failed; return the event that says so."""
        document = failed(prepared.document, error)
        await self._keep(prepared, Status.FAILED, document)
        return event("failed", document)

    async def start(self, prepared: Prepared) -> Job:
        """Hand a background response to the workers of all replicas; return it as it is stored."""
        document = {**prepared.document, "status": Status.QUEUED.value}
        engine_request = prepared.engine_request
        tenant_id = engine_request.principal.tenant.tenant_id
        job_id = document["id"]
        await self._store.submit(
            job_id,
            "response",
            tenant_id,
            document=document,
            created_unix_s=self._wall_clock(),
            spec={
                "principal": dump_principal(engine_request.principal),
                "chat": engine_request.document,
                "request_id": engine_request.request_id,
                "trace_headers": dict(engine_request.trace_headers),
                "response": document,
            },
            input_items=prepared.request.items,
            events=[event("created", document), event("queued", document)],
        )
        return await self._store.find(tenant_id, job_id, "response")

    async def get(self, principal: Principal, response_id: str) -> Job:
        """Return a stored response; raises NotFound."""
        return await self._store.find(principal.tenant.tenant_id, response_id, "response")

    async def cancel(self, principal: Principal, response_id: str) -> Job:
        """End a background response now; one that is over stays as it is.

        Raises:
            NotFound: the tenant has no such response.
            InvalidRequest: it is not a background response.
        """
        job = await self.get(principal, response_id)
        if not job.document["background"]:
            raise InvalidRequest("Only background responses can be cancelled.")
        if not job.status.is_final:
            document = {**job.document, "status": Status.CANCELLED.value}
            # there is no event of its own for this in OpenAI's list
            last = event("incomplete", document)
            await self._store.finish_from_outside(job, Status.CANCELLED, document, events=[last])
        return await self.get(principal, response_id)

    async def delete(self, principal: Principal, response_id: str) -> None:
        """Remove a response; one that runs is stopped."""
        await self._store.delete(await self.get(principal, response_id))

    async def input_items(self, principal: Principal, response_id: str) -> list[dict[str, Any]]:
        """Return a response's own input, oldest item first."""
        job = await self.get(principal, response_id)
        items: list[dict[str, Any]] = await self._store.input_items(job) or []
        return items

    async def resumable(self, principal: Principal, response_id: str) -> Job:
        """Return a response whose events can be streamed.

        Raises:
            NotFound: the tenant has no such response.
            InvalidRequest: its events are not stored, or no longer.
        """
        job = await self.get(principal, response_id)
        if not job.has_events:
            raise InvalidRequest(
                "Only a response that was created with background=true can be streamed again.",
                param="stream",
            )
        if job.status.is_final and not await self._store.events(job.job_id, -1):
            raise InvalidRequest("The events of this response are no longer kept.", param="stream")
        return job

    def follow(self, job: Job, after: int) -> AsyncGenerator[Event | Job]:
        """Yield its events above ``after`` until it is over; see :meth:`JobStore.follow`."""
        return self._store.follow(job, after)

    async def count_input_tokens(self, principal: Principal, request: ResponseRequest) -> int:
        """Return how many tokens the model reads for a request; raises like :meth:`prepare`."""
        history = await self._history(principal.tenant.tenant_id, request.previous_response_id)
        return await self._engines.count_tokens(principal, request.chat_document(history))

    async def _history(self, tenant_id: str, response_id: str | None) -> list[dict[str, Any]]:
        """Return all items before a response's own, oldest first, and keep what they come from alive."""
        turns: list[list[dict[str, Any]]] = []
        while response_id is not None:
            try:
                job = await self._store.find(tenant_id, response_id, "response")
            except NotFound:
                raise InvalidRequest(
                    "The response of 'previous_response_id', or one before it, is not stored (any more).",
                    param="previous_response_id",
                ) from None
            if job.status not in (Status.COMPLETED, Status.INCOMPLETE):
                raise InvalidRequest(
                    f"The response of 'previous_response_id' is {job.status}; only a finished one can be "
                    "continued.",
                    param="previous_response_id",
                )
            if len(turns) == MAX_CHAIN:
                raise InvalidRequest(
                    f"The conversation has more than {MAX_CHAIN} turns.",
                    param="previous_response_id",
                )
            turns.append([*(await self._store.input_items(job) or []), *job.document["output"]])
            await self._store.touch(job)
            response_id = job.document["previous_response_id"]
        return [item for turn in reversed(turns) for item in turn]

    async def _keep(self, prepared: Prepared, status: Status, document: Mapping[str, Any]) -> None:
        if not prepared.request.is_stored:
            return
        tenant_id = prepared.engine_request.principal.tenant.tenant_id
        await self._store.submit(
            document["id"],
            "response",
            tenant_id,
            document=document,
            created_unix_s=document["created_at"],
            outcome=status,
            input_items=prepared.request.items,
        )


class ResponseRunner:
    """Runs background responses; every event is stored under the lease before anybody sees it."""

    def __init__(
        self,
        store: JobStore,
        engines: Engines,
        *,
        clock: Callable[[], float],
        wall_clock: Callable[[], float],
    ) -> None:
        self._store = store
        self._engines = engines
        self._clock = clock
        self._wall_clock = wall_clock

    async def run(self, held: Held) -> None:
        """Run one attempt; see :class:`~sala_serve.jobs.worker.Runner`."""
        lease, spec = held.lease, held.lease.spec
        sala = {"attempt": lease.attempt}
        document = {**spec["response"], "status": Status.RUNNING.value, "sala": sala}
        stream = await self._begin(lease, document)
        request = EngineRequest(
            principal=load_principal(spec["principal"]),
            path="/v1/chat/completions",
            document=spec["chat"],
            request_id=spec["request_id"],
            trace_headers=spec["trace_headers"],
            is_charged_when_cut=lambda: held.is_ended_by_owner,
        )
        told_at_s = float("-inf")
        async with aclosing(self._engines.run(request)) as pieces:
            try:
                async for piece in pieces:
                    if isinstance(piece, dict):
                        held.has_begun = True
                        if events := stream.feed(piece):
                            await self._store.append(lease, events)
                    elif isinstance(piece, Progress):
                        held.has_begun = piece.phase in ("prefill", "decoding")
                        if self._clock() - told_at_s >= _PROGRESS_INTERVAL_S:
                            told_at_s = self._clock()
                            # an outage shorter than the lease costs no prefill
                            with suppress(StateUnavailable):
                                await self._store.update(lease, progress=piece.fields())
            except LeaseLost:
                await held.note_loss(self._store)
                raise
        status, document, events = stream.finish(self._wall_clock())
        await self._store.finish(lease, status, document, events=events)

    async def fail(self, lease: Lease, error: GatewayError, *, dead: str | None) -> None:
        """End a response with an error."""
        sala = {"attempt": lease.attempt}
        document = failed({**lease.spec["response"], "sala": sala}, error)
        closing, _ = abandoned_items(await self._stored_events(lease.job_id))
        last = event("failed", document)
        await self._store.finish(lease, Status.FAILED, document, events=[*closing, last], dead=dead)

    async def _begin(self, lease: Lease, document: Mapping[str, Any]) -> ResponseStream:
        """Say that the response runs; what an earlier attempt left in its stream is closed first."""
        stored = await self._stored_events(lease.job_id)
        closing, next_idx = abandoned_items(stored)
        is_known = any(each["type"] == "response.in_progress" for each in stored)
        if next_idx > 0 or not is_known:  # nothing is said of an attempt of which nothing was seen
            await self._store.append(lease, [*closing, event("in_progress", document)])
        return ResponseStream(document, first_output_idx=next_idx)

    async def _stored_events(self, job_id: str) -> list[Mapping[str, Any]]:
        found: list[Mapping[str, Any]] = []
        last = -1
        while events := await self._store.events(job_id, last):
            found += [json.loads(each.body) for each in events]
            last = events[-1].sequence_number
        return found


def response_view(job: Job) -> dict[str, Any]:
    """Return a stored response as its owner sees it; ``sala`` says where one that is not over stands."""
    if job.status.is_final:
        return dict(job.document)
    progress = {"attempt": job.attempt, **job.progress}
    return {**job.document, "status": job.status.value, "sala": progress}
