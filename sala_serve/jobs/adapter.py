"""The engines as jobs see them: each request becomes a :class:`Call` of the gateway's one way to generate."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from sala_serve.bodies import check_generation
from sala_serve.errors import GatewayError, InternalError, InvalidRequest, PermissionDenied
from sala_serve.generation.call import (
    PROMPT_FIELDS,
    Call,
    Chunk,
    Deadlines,
    Prefilling,
    Quiet,
    Reserved,
    Whole,
)
from sala_serve.jobs.running import Progress
from sala_serve.scheduling.work import Waiting
from sala_serve.telemetry import RequestRecord
from sala_serve.telemetry.report import report
from sala_serve.tenants.model import check_scopes

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Mapping

    from sala_serve.bodies import BodySettings, Generation
    from sala_serve.engine.pool import EnginePool
    from sala_serve.generation.call import Update
    from sala_serve.generation.life import Generations
    from sala_serve.jobs.running import EngineRequest, Piece
    from sala_serve.jobs.settings import JobsSettings
    from sala_serve.running import RunningRequest, RunningRequests
    from sala_serve.telemetry import Metrics, Tracing
    from sala_serve.tenants.keys import KeyRing
    from sala_serve.tenants.model import Principal
    from sala_serve.tenants.settings import TenantsSettings
    from sala_serve.tokens.prompt import PromptCounter


class GenerationEngines:
    """Runs what jobs ask for, see :class:`~sala_serve.jobs.running.Engines`."""

    def __init__(
        self,
        generations: Generations,
        counter: PromptCounter,
        pool: EnginePool,
        keys: KeyRing,
        *,
        tenants: TenantsSettings,
        bodies: BodySettings,
        deadlines: Deadlines,
        running: RunningRequests,
        settings: JobsSettings,
        metrics: Metrics,
        tracing: Tracing,
        clock: Callable[[], float],
    ) -> None:
        self._generations = generations
        self._counter = counter
        self._pool = pool
        self._keys = keys
        self._tenants = tenants
        self._bodies = bodies
        self._deadlines = deadlines
        self._running = running
        self._batch_tier = settings.batch_tier if settings.batch_tier in tenants.tiers else None
        # nobody waits for a job: it may take as long as it moves
        self._job_deadlines = replace(deadlines, queue_s=settings.queue_timeout_s, total_s=None)
        self._metrics = metrics
        self._tracing = tracing
        self._clock = clock

    def check(self, request: EngineRequest) -> EngineRequest:
        """Return ``request`` ready to run; raise what is wrong with it."""
        generation = self._parse(request)
        if self._pool.models():
            self._pool.require_model(generation.model)
        tier = generation.service_tier
        if tier is not None and tier not in self._tenants.tiers:
            names = ", ".join(sorted({"auto", *self._tenants.tiers}))
            raise InvalidRequest(f"service_tier: expected one of {names}.", param="service_tier")
        check_scopes(request.principal, model=generation.model, tier=tier)
        return replace(request, generation=generation)

    async def run(self, request: EngineRequest) -> AsyncGenerator[Piece]:
        """Run one generation."""
        if request.record is not None:
            async with aclosing(self._run(request, request.principal, request.record)) as pieces:
                async for piece in pieces:
                    yield piece
            return
        record = self._new_record(request)
        self._metrics.request_started(record.endpoint)
        try:
            principal = await self.current(request.principal)
            with self._running.show(record) as scope:
                async with aclosing(self._run(request, principal, record, scope)) as pieces:
                    async for piece in pieces:
                        yield piece
            record.status = 200
        except GatewayError as error:
            record.status, record.error_code = error.status, error.code
            raise
        except Exception:
            record.status, record.error_code = InternalError.status, InternalError.code
            raise
        finally:
            report(record, self._metrics)

    async def count_tokens(self, principal: Principal, document: Mapping[str, Any]) -> int:
        """Return how many prompt tokens a chat has."""
        model = self._pool.require_model(document["model"])
        check_scopes(principal, model=model.name)
        return (await self._counter.count_chat(document)).num_tokens

    async def _run(
        self,
        request: EngineRequest,
        principal: Principal,
        record: RequestRecord,
        scope: RunningRequest | None = None,
    ) -> AsyncGenerator[Piece]:
        generation = request.generation
        if generation is None:
            generation = await asyncio.to_thread(self._parse, request)
        call = Call(
            principal=principal,
            path=request.path,
            generation=generation,
            request_id=request.request_id,
            record=record,
            deadlines=request.deadlines or self._job_deadlines,
            trace_headers=record.trace.headers(request.trace_headers),
            tier=self._batch_tier if request.is_batch else None,
            is_charged_when_cut=request.is_charged_when_cut,
            scope=scope,
        )
        last: Piece | None = None
        async with aclosing(self._generations.run(call)) as updates:
            async for update in updates:
                if isinstance(update, Quiet) and isinstance(last, Progress):
                    yield last if update.phase != "decoding" else Progress(update.phase)
                else:
                    last = _piece(update)
                    yield last

    def _parse(self, request: EngineRequest) -> Generation:
        return check_generation(dict(request.document), PROMPT_FIELDS[request.path], self._bodies)

    def _new_record(self, request: EngineRequest) -> RequestRecord:
        record = RequestRecord(
            request.request_id, request.endpoint, started_at_s=self._clock(), clock=self._clock
        )
        record.trace = self._tracing.start(record, request.trace_headers)
        record.tenant_id = request.principal.tenant.tenant_id
        record.key_id = request.principal.key_id
        return record

    async def current(self, principal: Principal) -> Principal:
        """Return what the key of a job may do now; it may have been revoked since the job was asked for."""
        current = await self._keys.principal(principal.tenant.tenant_id, principal.key_id)
        if current is None:
            raise PermissionDenied("The API key that asked for this is no longer valid.")
        return current


def _piece(update: Update) -> Piece:
    match update:
        case Chunk() | Whole():
            return update.document
        case Waiting():
            return Progress(
                "queued",
                place=update.place,
                ahead_tokens=update.tokens_ahead,
                expected_start_s=update.expected_start_s,
                expected_first_token_s=update.expected_first_token_s,
            )
        case Prefilling():
            return Progress(
                "prefill",
                done_tokens=update.done_tokens,
                total_tokens=update.total_tokens,
                cached_tokens=update.cached_tokens,
                expected_first_token_s=update.expected_first_token_s,
            )
        case Quiet():
            return Progress(update.phase)
        case Reserved():
            return update
