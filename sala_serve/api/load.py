"""What queues and engines hold, told to the metrics whenever they are scraped."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sala_serve.scheduling.snapshot import QueueSnapshot
from sala_serve.telemetry import EngineLoad, QueueLoad

if TYPE_CHECKING:
    from sala_serve.engine.pool import Engine
    from sala_serve.gateway import Gateway
    from sala_serve.scheduling.snapshot import EngineSnapshot


def watch_load(gateway: Gateway) -> None:
    """Let every scrape of ``gateway.metrics`` look at the scheduler and the engines."""
    gateway.metrics.at_scrape(lambda: _publish(gateway))


def _publish(gateway: Gateway) -> None:
    metrics, snapshot = gateway.metrics, gateway.scheduler.snapshot()
    queues = {each.tier: each for each in snapshot.queues}
    metrics.set_queues(
        # an empty queue is a zero, not a series that ends
        QueueLoad(tier, queue.num_queued, queue.queued_work_tokens)
        for tier in gateway.settings.tenants.tiers
        for queue in [queues.get(tier, QueueSnapshot(tier, 0, 0))]
    )
    metrics.set_service_gap(snapshot.service_gap_tokens, snapshot.service_gap_bound_tokens)
    # the scheduler opens an engine's page with its first request
    pages = {page.engine_id: page for page in snapshot.engines}
    metrics.set_engines(
        _engine_load(engine, pages.get(engine.engine_id))
        for engine in gateway.pool.engines.values()
    )


def _engine_load(engine: Engine, page: EngineSnapshot | None) -> EngineLoad:
    return EngineLoad(
        engine=engine.engine_id,
        is_up=engine.status.is_ready,
        is_stuck=engine.is_stuck,
        num_prefilling=page.num_prefilling if page else 0,
        num_decoding=page.num_decoding if page else 0,
        num_prefill_tokens_left=page.prefill_left_tokens if page else 0,
        num_kv_tokens=page.kv_held_tokens if page else 0,
        kv_capacity_tokens=engine.facts.kv_capacity_tokens,
    )
