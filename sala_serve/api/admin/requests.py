"""The admin API's paths about what this replica is doing now: its requests and its scheduler."""

from __future__ import annotations

from dataclasses import asdict, is_dataclass
from typing import TYPE_CHECKING, Annotated, Protocol

from fastapi import APIRouter, Path

from sala_serve.api.admin.audit import audited
from sala_serve.api.admin.router import ERRORS
from sala_serve.api.admin.schema import Cancelled, RequestList, RequestView
from sala_serve.errors import NotFound
from sala_serve.scheduling.snapshot import SchedulerSnapshot  # noqa: TC001 - FastAPI reads it from the annotation
from sala_serve.telemetry import Phase

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sala_serve.telemetry import RequestRecord

_TELLING = (Phase.QUEUE, Phase.PREFILL)
"""Phases in which a request's note is about what it waits for."""


class Running(Protocol):
    """A request that can be looked at."""

    @property
    def record(self) -> RequestRecord | None:
        """What is known of it."""


class RunningView(Protocol):
    """What is asked of the running requests (``sala_serve.running``)."""

    def snapshot(self) -> Sequence[Running]:
        """Return what runs now, oldest first."""

    def cancel(self, request_id: str) -> bool:
        """Cut the requests with this id; tell whether there was one."""


def requests_router(
    running: RunningView,
    snapshot: Callable[[], SchedulerSnapshot],
    *,
    clock: Callable[[], float],
) -> APIRouter:
    """Return the paths about what runs.

    Args:
        running: the requests.
        snapshot: of the scheduler.
        clock: monotonic seconds, the clock of the requests' records.
    """
    router = APIRouter(prefix="/admin/v1", responses=ERRORS)

    @router.get("/requests", summary="List the running requests of this replica")
    async def list_requests() -> RequestList:
        records = [each.record for each in running.snapshot() if each.record is not None]
        return RequestList(data=[_view(record, clock()) for record in records])

    @router.post("/requests/{request_id}/cancel", summary="Cut a running request of this replica")
    async def cancel_request(
        request_id: Annotated[str, Path(min_length=1, max_length=128)],
    ) -> Cancelled:
        with audited("request.cancel", request_id):
            if not running.cancel(request_id):
                raise NotFound("No such request runs on this replica.")
        return Cancelled(request_id=request_id)

    @router.get("/scheduler", summary="Show queue, shares and engines of this replica")
    async def show_scheduler() -> SchedulerSnapshot:
        return snapshot()

    return router


def _view(record: RequestRecord, now_s: float) -> RequestView:
    phase, note = record.phase, record.note
    is_told = phase in _TELLING and is_dataclass(note) and not isinstance(note, type)
    return RequestView(
        request_id=record.request_id,
        tenant_id=record.tenant_id,
        key_id=record.key_id,
        endpoint=record.endpoint,
        tier=record.tier,
        engine_id=record.engine_id,
        phase=None if phase is None else phase.value,
        age_s=now_s - record.started_at_s,
        num_prompt_tokens=record.num_prompt_tokens,
        progress=asdict(note) if is_told else None,  # type: ignore[call-overload]
    )
