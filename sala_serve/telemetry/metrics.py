"""Every metric of the gateway, in one table; dashboards and alerts name metrics from here."""

from __future__ import annotations

from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

LATENCY_BUCKETS_S = (
    *(0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0),
    *(60.0, 90.0, 120.0, 180.0, 300.0, 600.0, 1200.0, 1800.0, 3600.0),
)
"""From a cached short prompt to a million tokens on a small machine."""


@dataclass(frozen=True)
class Metric:
    """One line of the table."""

    kind: type[Counter] | type[Gauge] | type[Histogram]
    help: str
    labels: tuple[str, ...] = ()


METRICS: dict[str, Metric] = {
    "sala_gateway_requests_total": Metric(
        Counter,
        "Finished requests. status is the outcome, which may differ from the HTTP status sent: a stream "
        "that broke counts as 502, a client that left as 499.",
        ("endpoint", "status"),
    ),
    "sala_gateway_requests_in_flight": Metric(
        Gauge, "Requests now between their first byte and the end of their answer.", ("endpoint",)
    ),
    "sala_gateway_time_to_first_token_seconds": Metric(
        Histogram,
        "From the request's arrival to the first token sent; streamed answers only.",
        ("endpoint",),
    ),
    "sala_gateway_request_duration_seconds": Metric(
        Histogram,
        "From the request's arrival to the end of its answer, for answers that completed.",
        ("endpoint",),
    ),
    "sala_gateway_prompt_tokens_total": Metric(
        Counter, "Prompt tokens of completed answers, cached ones included.", ("endpoint",)
    ),
    "sala_gateway_cached_tokens_total": Metric(
        Counter, "Prompt tokens that the engine took from its prefix cache.", ("endpoint",)
    ),
    "sala_gateway_completion_tokens_total": Metric(
        Counter, "Tokens generated in completed answers.", ("endpoint",)
    ),
    "sala_gateway_engine_up": Metric(
        Gauge, "1 while the engine is ready for requests, else 0 (starting, down)."
    ),
}


@dataclass(frozen=True)
class Usage:
    """Token counts of one answer, as the engine reports them."""

    num_prompt_tokens: int
    num_cached_tokens: int
    num_completion_tokens: int


class Metrics:
    """The metrics of one gateway, in a registry of their own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._by_name = {name: self._create(name, metric) for name, metric in METRICS.items()}

    def _create(self, name: str, metric: Metric) -> Counter | Gauge | Histogram:
        if metric.kind is Histogram:
            return Histogram(
                name, metric.help, metric.labels, buckets=LATENCY_BUCKETS_S, registry=self._registry
            )
        return metric.kind(name, metric.help, metric.labels, registry=self._registry)

    def _counter(self, name: str) -> Counter:
        metric = self._by_name[name]
        assert isinstance(metric, Counter)
        return metric

    def _gauge(self, name: str) -> Gauge:
        metric = self._by_name[name]
        assert isinstance(metric, Gauge)
        return metric

    def _histogram(self, name: str) -> Histogram:
        metric = self._by_name[name]
        assert isinstance(metric, Histogram)
        return metric

    def request_started(self, endpoint: str) -> None:
        """Count a request as running."""
        self._gauge("sala_gateway_requests_in_flight").labels(endpoint).inc()

    def request_finished(self, endpoint: str, status: int, duration_s: float) -> None:
        """Count a request's outcome; its duration is observed when it completed."""
        self._gauge("sala_gateway_requests_in_flight").labels(endpoint).dec()
        self._counter("sala_gateway_requests_total").labels(endpoint, str(status)).inc()
        if status < 400:
            histogram = self._histogram("sala_gateway_request_duration_seconds")
            histogram.labels(endpoint).observe(duration_s)

    def first_token(self, endpoint: str, ttft_s: float) -> None:
        """Observe the time to the first token of a streamed answer."""
        self._histogram("sala_gateway_time_to_first_token_seconds").labels(endpoint).observe(ttft_s)

    def tokens(self, endpoint: str, usage: Usage) -> None:
        """Count the tokens of a completed answer."""
        counts = {
            "sala_gateway_prompt_tokens_total": usage.num_prompt_tokens,
            "sala_gateway_cached_tokens_total": usage.num_cached_tokens,
            "sala_gateway_completion_tokens_total": usage.num_completion_tokens,
        }
        for name, count in counts.items():
            self._counter(name).labels(endpoint).inc(count)

    def engine_up(self, is_up: bool) -> None:
        """State whether the engine is ready."""
        self._gauge("sala_gateway_engine_up").set(1 if is_up else 0)

    def render(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self._registry)
