"""The gateway's metrics, as methods that say what happened; ``specs.py`` says what they are called."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from sala_serve.telemetry.labels import OTHER, TopLabels
from sala_serve.telemetry.record import PROBES, Phase
from sala_serve.telemetry.specs import METRICS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from sala_serve.telemetry.record import RequestRecord
    from sala_serve.telemetry.specs import EngineLoad, MetricSpec, QueueLoad

LATENCY_BUCKETS_S = (
    *(0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0),
    *(60.0, 90.0, 120.0, 180.0, 300.0, 600.0, 1200.0, 1800.0, 3600.0),
)
"""From a cached short prompt to a million tokens on a small machine."""
GAP_BUCKETS_S = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""From a fast GPU to a stream that waits behind another's prefill."""
NO_TIER = "none"


class Metrics:
    """The metrics of one gateway, in a registry of their own.

    Every label's values are bounded: endpoints, statuses, codes, tiers and engines are few by nature,
    tenants are cut to ``max_tenant_labels``.
    """

    def __init__(
        self, *, max_tenant_labels: int = 50, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.registry = CollectorRegistry()
        self._of: dict[str, Any] = {}
        for spec in METRICS:
            self._of[spec.name] = _made(spec, self.registry)
        self._tenants = TopLabels(max_tenant_labels, on_demoted=self._forget_tenant, clock=clock)
        self._sources: list[Callable[[], None]] = []

    # one request

    def request_started(self, endpoint: str) -> None:
        """Count a request as running."""
        self._of["requests_in_flight"].labels(endpoint).inc()

    def request_finished(self, record: RequestRecord, status: int, duration_s: float) -> None:
        """Count a request's outcome and what it took; durations of those that completed only."""
        endpoint, tier = record.endpoint, record.tier or NO_TIER
        usage, phases_s = record.usage, record.phases_s
        self._of["requests_in_flight"].labels(endpoint).dec()
        self._of["requests_total"].labels(endpoint, str(status)).inc()
        if status < 400:
            self._of["request_duration_seconds"].labels(endpoint).observe(duration_s)
        if record.ttft_s is not None:
            self._of["time_to_first_token_seconds"].labels(endpoint).observe(record.ttft_s)
            if Phase.PREFILL in phases_s:
                self._of["prefill_seconds"].labels(tier).observe(phases_s[Phase.PREFILL])
        if Phase.QUEUE in phases_s:
            self._of["queue_wait_seconds"].labels(tier).observe(phases_s[Phase.QUEUE])
        if usage is not None:
            self._of["prompt_tokens_total"].labels(endpoint).inc(usage.num_prompt_tokens)
            self._of["cached_tokens_total"].labels(endpoint).inc(usage.num_cached_tokens)
            self._of["completion_tokens_total"].labels(endpoint).inc(usage.num_completion_tokens)
        is_before_engine = Phase.PREFILL not in phases_s
        # a gateway that tells a probe that it is not ready refuses nobody
        if record.error_code is not None and is_before_engine and endpoint not in PROBES:
            self.refused(record.tenant_id, record.error_code)
        if record.tenant_id is not None:
            self._tenant_finished(record, record.tenant_id, status)

    def token_gap(self, tier: str | None, gap_s: float) -> None:
        """Observe the time between two pieces of a streamed answer; see :meth:`RequestRecord.token`."""
        self._of["between_tokens_seconds"].labels(tier or NO_TIER).observe(gap_s)

    def refused(self, tenant_id: str | None, code: str) -> None:
        """Count an error given before an engine had the request; finished requests are counted already."""
        self._of["refusals_total"].labels(self._tenant(tenant_id), code).inc()

    # limits

    def limit_tokens(
        self,
        tenant_id: str,
        kind: Literal["input", "output"],
        outcome: Literal["reserved", "settled", "refunded"],
        num_tokens: float,
    ) -> None:
        """Count tokens that the limiter has reserved, kept as spent, or given back."""
        label = self._tenant(tenant_id)
        self._of["limit_tokens_total"].labels(label, kind, outcome).inc(num_tokens)

    def limit_refused(self, limit: str) -> None:
        """Count a refusal by the limit of this name, or by ``state``."""
        self._of["limit_refusals_total"].labels(limit).inc()

    def limit_granted_locally(self) -> None:
        """Count a reservation from this replica's share."""
        self._of["limit_local_reservations_total"].inc()

    def limit_expired(self, num_reservations: int) -> None:
        """Count reservations whose lease has ended."""
        self._of["limit_expired_reservations_total"].inc(num_reservations)

    def set_limit_books(self, *, num_reservations: int, num_unconfirmed: int) -> None:
        """State what the limiter holds, and what it still has to tell the state."""
        self._of["limit_reservations"].set(num_reservations)
        self._of["limit_unconfirmed_steps"].set(num_unconfirmed)

    # work

    def prefill_done(self, engine_id: str, num_tokens: int) -> None:
        """Count prompt tokens that an engine has computed since the last call."""
        self._of["prefill_tokens_done_total"].labels(engine_id).inc(num_tokens)

    def set_queues(self, queues: Iterable[QueueLoad]) -> None:
        """State all queues; those not named are gone."""
        self._of["queued_requests"].clear()
        self._of["queued_tokens"].clear()
        for queue in queues:
            self._of["queued_requests"].labels(queue.tier).set(queue.num_requests)
            self._of["queued_tokens"].labels(queue.tier).set(queue.num_tokens)

    def set_engines(self, engines: Iterable[EngineLoad]) -> None:
        """State all engines; those not named are gone."""
        for spec in METRICS:
            if spec.name.startswith("engine_"):
                self._of[spec.name].clear()
        for load in engines:
            engine = load.engine
            self._of["engine_up"].labels(engine).set(load.is_up)
            self._of["engine_stuck"].labels(engine).set(load.is_stuck)
            self._of["engine_requests"].labels(engine, "prefilling").set(load.num_prefilling)
            self._of["engine_requests"].labels(engine, "decoding").set(load.num_decoding)
            self._of["engine_prefill_tokens_left"].labels(engine).set(load.num_prefill_tokens_left)
            self._of["engine_kv_tokens"].labels(engine).set(load.num_kv_tokens)
            if load.kv_capacity_tokens is not None:
                capacity = self._of["engine_kv_capacity_tokens"].labels(engine)
                capacity.set(load.kv_capacity_tokens)

    def engine_up(self, is_up: bool, *, engine: str = "engine") -> None:
        """State whether an engine is ready."""
        self._of["engine_up"].labels(engine).set(is_up)

    def set_service_gap(self, gap_tokens: float, bound_tokens: float) -> None:
        """State the measured service gap between waiting tenants, and its bound."""
        self._of["service_gap_tokens"].set(gap_tokens)
        self._of["service_gap_bound_tokens"].set(bound_tokens)

    def set_jobs(self, counts: Mapping[tuple[str, str], int]) -> None:
        """State the number of jobs by kind (``response``, ``batch``) and status."""
        self._of["jobs"].clear()
        for (kind, status), count in counts.items():
            self._of["jobs"].labels(kind, status).set(count)

    def set_state_up(self, is_up: bool) -> None:
        """State whether Redis, or the embedded store, answers."""
        self._of["state_up"].set(is_up)

    def state_lost(self) -> None:
        """Count that the shared state stopped answering."""
        self._of["state_losses_total"].inc()

    def set_buffered_bytes(self, num_bytes: int) -> None:
        """State how many bytes of request bodies are held."""
        self._of["buffered_bytes"].set(num_bytes)

    def set_tasks(self, num_tasks: int) -> None:
        """State how many tasks the event loop has."""
        self._of["tasks"].set(num_tasks)

    # reading

    def at_scrape(self, source: Callable[[], None]) -> None:
        """Call ``source`` before each rendering, to set gauges from what it looks at."""
        self._sources.append(source)

    def render(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        for source in self._sources:
            source()
        return generate_latest(self.registry)

    def _tenant(self, tenant_id: str | None) -> str:
        return OTHER if tenant_id is None else self._tenants.weigh(tenant_id, 0.0)

    def _tenant_finished(self, record: RequestRecord, tenant_id: str, status: int) -> None:
        usage = record.usage
        num_tokens = usage.num_prompt_tokens + usage.num_completion_tokens if usage else 1
        label = self._tenants.weigh(tenant_id, num_tokens)
        self._of["tenant_requests_total"].labels(label, str(status)).inc()
        if usage is not None:
            tokens = self._of["tenant_tokens_total"]
            tokens.labels(label, "prompt").inc(usage.num_prompt_tokens)
            tokens.labels(label, "cached").inc(usage.num_cached_tokens)
            tokens.labels(label, "completion").inc(usage.num_completion_tokens)
        if record.ttft_s is not None:
            ttft = self._of["tenant_time_to_first_token_seconds"]
            ttft.labels(label).observe(record.ttft_s)
        if (waited_s := record.phases_s.get(Phase.QUEUE)) is not None:
            self._of["tenant_queue_wait_seconds"].labels(label).observe(waited_s)

    def _forget_tenant(self, tenant_id: str) -> None:
        for spec in METRICS:
            if "tenant" in spec.labels:
                self._of[spec.name].remove_by_labels({"tenant": tenant_id})


def _made(spec: MetricSpec, registry: CollectorRegistry) -> Counter | Gauge | Histogram:
    if spec.kind == "counter":
        return Counter(spec.full_name, spec.help, spec.labels, registry=registry)
    if spec.kind == "gauge":
        return Gauge(spec.full_name, spec.help, spec.labels, registry=registry)
    buckets = GAP_BUCKETS_S if spec.name == "between_tokens_seconds" else LATENCY_BUCKETS_S
    return Histogram(spec.full_name, spec.help, spec.labels, buckets=buckets, registry=registry)
