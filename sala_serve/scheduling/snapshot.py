"""The state of the scheduler at one moment, for people, metrics and autoscaling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sala_serve.scheduling.ledger import EngineLedger, Job
    from sala_serve.scheduling.queue import Tenant
    from sala_serve.scheduling.shares import Shares


@dataclass(frozen=True)
class TenantSnapshot:
    """One tenant's part."""

    tenant_id: str
    weight: float
    num_queued: int
    queued_tokens: int
    """Prompt tokens of its waiting requests."""
    num_running: int
    charged_tokens: float
    """Work charged to it so far: uncached prompt tokens, and generated ones at their cost."""
    lead_tokens: float
    """How far its account is above the lowest that waits, at weight 1."""
    longest_wait_s: float


@dataclass(frozen=True)
class QueueSnapshot:
    """What waits of one tier."""

    tier: str
    num_queued: int
    queued_work_tokens: int
    """Prompt tokens that are expected to be computed."""


@dataclass(frozen=True)
class EngineSnapshot:
    """One engine's page of the ledger."""

    engine_id: str
    is_ready: bool
    num_running: int
    """Requests it has been given, by this gateway and others."""
    num_prefilling: int
    num_long_prefills: int
    num_decoding: int
    prefill_left_tokens: int
    """Uncached prompt tokens it has been given and has not computed."""
    kv_held_tokens: int
    """Of memory: taken and promised."""
    kv_capacity_tokens: int | None
    prefill_tokens_per_s: float
    """Learned, of short prompts."""
    long_prefill_tokens_per_s: float
    """Learned, of long prompts, beside whatever else ran."""
    decode_tokens_per_s: float
    """Learned, of one answer."""
    num_prefix_blocks: int
    """Remembered of its prefix cache."""


@dataclass(frozen=True)
class SchedulerSnapshot:
    """Everything at one moment."""

    num_queued: int
    queued_tokens: int
    """Prompt tokens of all waiting requests."""
    queued_work_tokens: int
    """Of those, what is expected to be computed: net of prefix hits. The signal to scale by."""
    expected_drain_s: float | None
    """Until all that waits now would have its first token; None while no engine is ready."""
    tenants: tuple[TenantSnapshot, ...]
    engines: tuple[EngineSnapshot, ...]
    service_gap_tokens: float
    """Largest difference of service so far between two tenants that both waited, at weight 1."""
    service_gap_now_tokens: float
    """The same, of those that wait now."""
    service_gap_bound_tokens: float
    """What it can be at most; see docs/scheduling.md."""
    num_gave_way: int
    """Long prefills that were put back for another tenant's, so far."""
    num_refused: int
    """Requests that found the queue full, so far."""
    queues: tuple[QueueSnapshot, ...] = ()
    """By tier, of those that have something waiting."""


def tenant_snapshot(tenant: Tenant, shares: Shares, now_s: float) -> TenantSnapshot:
    """Return one tenant's part."""
    return TenantSnapshot(
        tenant_id=tenant.tenant_id,
        weight=tenant.account.weight,
        num_queued=len(tenant.waiting),
        queued_tokens=tenant.queued_tokens,
        num_running=len(tenant.running),
        charged_tokens=tenant.account.total_tokens,
        lead_tokens=max(tenant.account.work - shares.level(), 0.0),
        longest_wait_s=max((now_s - job.work.arrived_at_s for job in tenant.waiting), default=0.0),
    )


def queue_snapshots(waiting: Iterable[Job]) -> tuple[QueueSnapshot, ...]:
    """Return what waits by tier."""
    work_tokens: dict[str, list[int]] = {}
    for job in waiting:
        work_tokens.setdefault(job.work.tier.name, []).append(job.uncached_tokens)
    return tuple(QueueSnapshot(tier, len(each), sum(each)) for tier, each in work_tokens.items())


def engine_snapshot(ledger: EngineLedger, is_ready: bool) -> EngineSnapshot:
    """Return one engine's page."""
    prefills_left = ledger.prefills_left()
    num_running = ledger.num_running()
    return EngineSnapshot(
        engine_id=ledger.engine.engine_id,
        is_ready=is_ready,
        num_running=num_running,
        num_prefilling=len(prefills_left),
        num_long_prefills=ledger.num_long(),
        num_decoding=num_running - len(prefills_left),
        prefill_left_tokens=sum(prefills_left),
        kv_held_tokens=ledger.kv_held_tokens(),
        kv_capacity_tokens=ledger.engine.facts.kv_capacity_tokens,
        prefill_tokens_per_s=ledger.short_rate.tokens_per_s,
        long_prefill_tokens_per_s=ledger.long_rate.tokens_per_s,
        decode_tokens_per_s=ledger.decode_rate.tokens_per_s,
        num_prefix_blocks=len(ledger.prefixes),
    )
