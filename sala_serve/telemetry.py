"""What the gateway reports: the record of each request, and every metric (docs/api.md lists them)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

if TYPE_CHECKING:
    from starlette.types import Scope

LATENCY_BUCKETS_S = (
    *(0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0),
    *(60.0, 90.0, 120.0, 180.0, 300.0, 600.0, 1200.0, 1800.0, 3600.0),
)
"""From a cached short prompt to a million tokens on a small machine."""
_SCOPE_KEY = "sala_serve.record"


@dataclass(frozen=True)
class Usage:
    """Token counts of one answer, as the engine reports them."""

    num_prompt_tokens: int
    num_cached_tokens: int
    num_completion_tokens: int


@dataclass
class RequestRecord:
    """One request: who, where, how it ended. Holds nothing of the prompt or the answer."""

    request_id: str
    endpoint: str
    """The route's path, or "other"; bounded, because it labels metrics."""
    started_at_s: float
    """Monotonic."""
    status: int | None = None
    """Outcome: the HTTP status, unless the answer failed after its first byte."""
    error_code: str | None = None
    ttft_s: float | None = None
    usage: Usage | None = None

    def attach(self, scope: Scope) -> None:
        """Make this the record of ``scope``'s request."""
        scope[_SCOPE_KEY] = self

    @classmethod
    def of(cls, scope: Scope) -> RequestRecord:
        """Return the record that :class:`~sala_serve.middleware.RecordMiddleware` attached."""
        record = scope[_SCOPE_KEY]
        assert isinstance(record, cls)
        return record


class Metrics:
    """The metrics of one gateway, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        by_endpoint = ["endpoint"]
        self._requests = Counter(
            "sala_gateway_requests_total",
            "Finished requests. status is the outcome, which may differ from the HTTP status sent: a "
            "stream that broke counts as 502, a client that left as 499.",
            ["endpoint", "status"],
            registry=registry,
        )
        self._in_flight = Gauge(
            "sala_gateway_requests_in_flight",
            "Requests now between their first byte and the end of their answer.",
            by_endpoint,
            registry=registry,
        )
        self._ttft = Histogram(
            "sala_gateway_time_to_first_token_seconds",
            "From the request's arrival to the first token sent; streamed answers only.",
            by_endpoint,
            buckets=LATENCY_BUCKETS_S,
            registry=registry,
        )
        self._duration = Histogram(
            "sala_gateway_request_duration_seconds",
            "From the request's arrival to the end of its answer, for answers that completed.",
            by_endpoint,
            buckets=LATENCY_BUCKETS_S,
            registry=registry,
        )
        self._prompt_tokens = Counter(
            "sala_gateway_prompt_tokens_total",
            "Prompt tokens of answers whose usage is known, cached ones included.",
            by_endpoint,
            registry=registry,
        )
        self._cached_tokens = Counter(
            "sala_gateway_cached_tokens_total",
            "Prompt tokens that the engine took from its prefix cache.",
            by_endpoint,
            registry=registry,
        )
        self._completion_tokens = Counter(
            "sala_gateway_completion_tokens_total",
            "Tokens generated in answers whose usage is known.",
            by_endpoint,
            registry=registry,
        )
        self._engine_up = Gauge(
            "sala_gateway_engine_up",
            "1 while the engine is ready for requests, else 0 (starting, down).",
            registry=registry,
        )

    def request_started(self, endpoint: str) -> None:
        """Count a request as running."""
        self._in_flight.labels(endpoint).inc()

    def request_finished(self, record: RequestRecord, status: int, duration_s: float) -> None:
        """Count a request's outcome; its duration is observed when it completed."""
        endpoint = record.endpoint
        self._in_flight.labels(endpoint).dec()
        self._requests.labels(endpoint, str(status)).inc()
        if status < 400:
            self._duration.labels(endpoint).observe(duration_s)
        if record.ttft_s is not None:
            self._ttft.labels(endpoint).observe(record.ttft_s)
        if (usage := record.usage) is not None:
            self._prompt_tokens.labels(endpoint).inc(usage.num_prompt_tokens)
            self._cached_tokens.labels(endpoint).inc(usage.num_cached_tokens)
            self._completion_tokens.labels(endpoint).inc(usage.num_completion_tokens)

    def engine_up(self, is_up: bool) -> None:
        """State whether the engine is ready."""
        self._engine_up.set(1 if is_up else 0)

    def render(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self.registry)
