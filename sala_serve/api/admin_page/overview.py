"""Fills the admin page from the parts of a gateway, and does what its buttons say."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from sala_serve.api.admin_page.routes import AdminPage
from sala_serve.api.admin_page.view import (
    Bar,
    EngineRow,
    KeyRow,
    Overview,
    RequestRow,
    TenantRow,
)
from sala_serve.errors import NotFound, StateUnavailable
from sala_serve.generation.call import Prefilling
from sala_serve.jobs.service import LANES
from sala_serve.scheduling.work import Waiting
from sala_serve.telemetry import Phase
from sala_serve.tenants.model import DEFAULT_TENANT_ID

if TYPE_CHECKING:
    from starlette.routing import Route

    from sala_serve.engine.pool import Engine
    from sala_serve.gateway import Gateway
    from sala_serve.scheduling.snapshot import EngineSnapshot, SchedulerSnapshot
    from sala_serve.telemetry import RequestRecord
    from sala_serve.tenants.ledger import Used
    from sala_serve.tenants.model import Limits, Tenant
    from sala_serve.tenants.store import StoredKey

    _TenantParts = tuple[Tenant, Used, list[StoredKey]]

MAX_TENANTS = 100
"""On the page; the admin API lists all."""
_LIMITS = (
    ("requests a minute", "requests_per_min", "requests"),
    ("input tokens a minute", "input_tokens_per_min", "input"),
    ("output tokens a minute", "output_tokens_per_min", "output"),
    ("tokens in flight", "tokens_in_flight", "flight"),
    ("long prefills", "long_prefills", "long"),
    ("tokens today", "tokens_per_day", "day"),
)
"""What the page calls a limit, its field of ``Limits`` and of ``Used``."""


def admin_page_routes(gateway: Gateway) -> list[Route]:
    """Return the routes of the page for the admin port; the gateway's settings have an admin token."""
    token = gateway.settings.admin.token
    assert token is not None
    return AdminPage(GatewayActions(gateway), token=token.get_secret_value()).routes()


class GatewayActions:
    """What the page can read and do on one gateway."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    async def overview(self) -> Overview:
        """Look at everything."""
        gateway = self._gateway
        jobs: tuple[tuple[str, str, int], ...] = ()
        try:
            tenants = await self._tenants()
            jobs = await self._jobs()
        except* StateUnavailable:
            tenants = None
        # from here on at one instant: what the scheduler says is about the requests that are shown
        snapshot = gateway.scheduler.snapshot()
        # the scheduler opens an engine's page with its first request
        pages = {page.engine_id: page for page in snapshot.engines}
        return Overview(
            engines=tuple(
                _engine(engine, pages.get(engine.engine_id))
                for engine in gateway.pool.engines.values()
            ),
            requests=tuple(
                _request(each.record, gateway.clock())
                for each in gateway.running.snapshot()
                if each.record is not None
            ),
            tenants=None if tenants is None else _tenant_rows(tenants, snapshot),
            jobs=jobs,
            queued_tokens=snapshot.queued_work_tokens,
            expected_drain_s=snapshot.expected_drain_s,
            service_gap_tokens=snapshot.service_gap_tokens,
            service_gap_bound_tokens=snapshot.service_gap_bound_tokens,
            is_draining=gateway.running.is_draining,
        )

    async def revoke_key(self, key_id: str) -> bool:
        """Revoke a key; False if there is none.

        Raises:
            StateUnavailable: Redis is away.
        """
        try:
            await self._gateway.keys.store.revoke_key(key_id)
        except NotFound:
            return False
        return True

    async def cancel_request(self, request_id: str) -> bool:
        """Cut a running request; False if there is none."""
        return self._gateway.running.cancel(request_id)

    async def _tenants(self) -> list[_TenantParts]:
        """Read tenants, the one of requests without a key last."""
        gateway = self._gateway
        tenants = await gateway.keys.store.tenants(limit=MAX_TENANTS)
        default = await gateway.keys.principal(DEFAULT_TENANT_ID, None)
        if default is not None:
            tenants.append(default.tenant)
        async with asyncio.TaskGroup() as group:
            reading = [group.create_task(self._read(tenant)) for tenant in tenants]
        return [(tenant, *task.result()) for tenant, task in zip(tenants, reading, strict=True)]

    async def _jobs(self) -> tuple[tuple[str, str, int], ...]:
        store = self._gateway.jobs.store
        counts = [(lane, await store.counts(lane)) for lane in LANES]
        return tuple(
            (lane, status, number)
            for lane, of_lane in counts
            for status, number in of_lane.items()
            if number
        )

    async def _read(self, tenant: Tenant) -> tuple[Used, list[StoredKey]]:
        used = await self._gateway.limiter.used(tenant)
        if tenant.tenant_id == DEFAULT_TENANT_ID:
            return used, []
        try:
            return used, await self._gateway.keys.store.keys(tenant.tenant_id)
        except NotFound:  # deleted since it was listed
            return used, []


def _engine(engine: Engine, page: EngineSnapshot | None) -> EngineRow:
    if engine.is_stuck:
        state = "stuck"
    else:
        state = "ready" if engine.status.is_ready else engine.status.reason
    capacity = engine.facts.kv_capacity_tokens
    if page is None:
        return EngineRow(engine.engine_id, state, memory=Bar("memory", 0, capacity))
    return EngineRow(
        engine_id=engine.engine_id,
        state=state,
        num_prefilling=page.num_prefilling,
        num_decoding=page.num_decoding,
        prefill_left_tokens=page.prefill_left_tokens,
        memory=Bar("memory", page.kv_held_tokens, capacity),
        prefill_tokens_per_s=page.prefill_tokens_per_s,
    )


def _tenant_rows(tenants: list[_TenantParts], snapshot: SchedulerSnapshot) -> tuple[TenantRow, ...]:
    """Return a row for each, the busy ones first; the default tenant's only where it is of interest."""
    busy = {each.tenant_id: each for each in snapshot.tenants}
    rows = []
    for tenant, used, keys in tenants:
        part = busy.get(tenant.tenant_id)
        if tenant.tenant_id == DEFAULT_TENANT_ID and part is None and len(tenants) > 1:
            continue
        rows.append(
            TenantRow(
                tenant_id=tenant.tenant_id,
                name=tenant.name,
                tier=tenant.tier,
                is_active=tenant.is_active,
                num_queued=part.num_queued if part else 0,
                queued_tokens=part.queued_tokens if part else 0,
                num_running=part.num_running if part else 0,
                limits=_bars(tenant.limits, used),
                keys=tuple(_key(key) for key in keys),
            )
        )
    return tuple(sorted(rows, key=lambda row: (-row.num_running - row.num_queued, row.name)))


def _bars(limits: Limits, used: Used) -> tuple[Bar, ...]:
    return tuple(
        Bar(label, round(getattr(used, used_name)), limit)
        for label, limit_name, used_name in _LIMITS
        if (limit := getattr(limits, limit_name)) is not None
    )


def _key(key: StoredKey) -> KeyRow:
    status = key.status(time.time())
    return KeyRow(key.key_id, status, can_revoke=status == "active")


def _request(record: RequestRecord, now_s: float) -> RequestRow:
    note, phase = record.note, record.phase or Phase.RECEIVE
    place = ahead = done = cached = expected_s = None
    # a note of an earlier phase says nothing any more
    if isinstance(note, Waiting) and phase is Phase.QUEUE:
        place, ahead, expected_s = note.place, note.tokens_ahead, note.expected_start_s
    elif isinstance(note, Prefilling) and phase is Phase.PREFILL:
        done, cached = note.done_tokens, note.cached_tokens
        expected_s = note.expected_first_token_s
    return RequestRow(
        request_id=record.request_id,
        tenant_id=record.tenant_id or "",
        endpoint=record.endpoint,
        phase=phase.value,
        age_s=now_s - record.started_at_s,
        tier=record.tier or "",
        engine_id=record.engine_id or "",
        num_prompt_tokens=record.num_prompt_tokens,
        place=place,
        ahead_tokens=ahead,
        expected_s=expected_s,
        done_tokens=done,
        cached_tokens=cached,
    )
