"""Every metric's name, type, labels and meaning; docs/api.md shows the same table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

PREFIX = "sala_gateway_"


@dataclass(frozen=True)
class MetricSpec:
    """One metric as Prometheus sees it."""

    name: str
    """Without ``PREFIX``; counters end in ``_total``, others in their unit where they have one."""
    kind: Literal["counter", "gauge", "histogram"]
    labels: tuple[str, ...]
    help: str

    @property
    def full_name(self) -> str:
        """The name as scraped; a histogram adds ``_bucket``, ``_sum`` and ``_count`` to it."""
        return PREFIX + self.name


@dataclass(frozen=True)
class QueueLoad:
    """Work that waits, of one tier."""

    tier: str
    num_requests: int
    num_tokens: int
    """Prompt tokens net of the predicted prefix hit."""


@dataclass(frozen=True)
class EngineLoad:
    """What one engine holds now."""

    engine: str
    is_up: bool
    is_stuck: bool
    num_prefilling: int
    num_decoding: int
    num_prefill_tokens_left: int
    """Prompt tokens not computed yet, of the requests it has."""
    num_kv_tokens: int
    """Tokens whose keys and values it holds."""
    kv_capacity_tokens: int | None
    """None until the engine has told it."""


METRICS = (
    MetricSpec(
        "requests_total",
        "counter",
        ("endpoint", "status"),
        "Finished requests by outcome: a broken stream counts as 502, a client that left as 499.",
    ),
    MetricSpec(
        "requests_in_flight",
        "gauge",
        ("endpoint",),
        "Requests between their first byte and the end of their answer.",
    ),
    MetricSpec(
        "time_to_first_token_seconds",
        "histogram",
        ("endpoint",),
        "Arrival to first token, streams only.",
    ),
    MetricSpec(
        "request_duration_seconds",
        "histogram",
        ("endpoint",),
        "Arrival to end, of answers that completed.",
    ),
    MetricSpec(
        "prompt_tokens_total", "counter", ("endpoint",), "Prompt tokens, cached ones included."
    ),
    MetricSpec(
        "cached_tokens_total", "counter", ("endpoint",), "Prompt tokens from the prefix cache."
    ),
    MetricSpec("completion_tokens_total", "counter", ("endpoint",), "Generated tokens."),
    MetricSpec(
        "queue_wait_seconds",
        "histogram",
        ("tier",),
        "Time in the queue, of requests that have left it.",
    ),
    MetricSpec(
        "prefill_seconds",
        "histogram",
        ("tier",),
        "Dispatch to first token, of requests that got one.",
    ),
    MetricSpec(
        "between_tokens_seconds",
        "histogram",
        ("tier",),
        "Between two pieces of a streamed answer.",
    ),
    MetricSpec(
        "prefill_tokens_done_total",
        "counter",
        ("engine",),
        "Prompt tokens the engine has computed for whoever asked, counted while a prefill runs.",
    ),
    MetricSpec(
        "tenant_requests_total", "counter", ("tenant", "status"), "Finished requests by tenant."
    ),
    MetricSpec(
        "tenant_tokens_total",
        "counter",
        ("tenant", "kind"),
        "Tokens by tenant; kind is prompt (cached ones included), cached or completion.",
    ),
    MetricSpec(
        "tenant_time_to_first_token_seconds",
        "histogram",
        ("tenant",),
        "Arrival to first token by tenant, streams only.",
    ),
    MetricSpec(
        "tenant_queue_wait_seconds", "histogram", ("tenant",), "Time in the queue by tenant."
    ),
    MetricSpec(
        "limit_tokens_total",
        "counter",
        ("tenant", "kind", "outcome"),
        "Tokens in the limiter's books; kind is input or output, outcome reserved, settled or refunded.",
    ),
    MetricSpec(
        "refusals_total",
        "counter",
        ("tenant", "code"),
        "Requests answered with an error before an engine had them.",
    ),
    MetricSpec("queued_requests", "gauge", ("tier",), "Requests that wait for their turn."),
    MetricSpec(
        "queued_tokens",
        "gauge",
        ("tier",),
        "Prompt tokens that wait, net of predicted prefix hits: scale on this.",
    ),
    MetricSpec("engine_up", "gauge", ("engine",), "1 while the engine is ready."),
    MetricSpec(
        "engine_stuck", "gauge", ("engine",), "1 while the engine has work and makes no progress."
    ),
    MetricSpec(
        "engine_requests",
        "gauge",
        ("engine", "phase"),
        "Requests the engine has; phase is prefilling or decoding.",
    ),
    MetricSpec(
        "engine_prefill_tokens_left",
        "gauge",
        ("engine",),
        "Prompt tokens the engine has taken and not computed yet.",
    ),
    MetricSpec(
        "engine_kv_tokens", "gauge", ("engine",), "Tokens whose keys and values the engine holds."
    ),
    MetricSpec(
        "engine_kv_capacity_tokens", "gauge", ("engine",), "The most tokens the engine can hold."
    ),
    MetricSpec(
        "service_gap_tokens",
        "gauge",
        (),
        "Largest difference in weighted tokens served between two tenants that both waited all the while.",
    ),
    MetricSpec(
        "service_gap_bound_tokens", "gauge", (), "What the scheduler promises the gap stays under."
    ),
    MetricSpec(
        "jobs", "gauge", ("kind", "status"), "Stored background responses and batches by status."
    ),
    MetricSpec("state_up", "gauge", (), "1 while the shared state (Redis, or embedded) answers."),
    MetricSpec(
        "state_losses_total", "counter", (), "How often the shared state stopped answering."
    ),
    MetricSpec(
        "limit_refusals_total",
        "counter",
        ("limit",),
        "Requests that a limit refused; limit is its field, or state where the state was away.",
    ),
    MetricSpec(
        "limit_local_reservations_total",
        "counter",
        (),
        "Reservations granted from this replica's share while the state was away.",
    ),
    MetricSpec(
        "limit_expired_reservations_total",
        "counter",
        (),
        "Reservations given back because their gateway no longer renewed them.",
    ),
    MetricSpec("limit_reservations", "gauge", (), "Reservations that running requests hold."),
    MetricSpec(
        "limit_unconfirmed_steps",
        "gauge",
        (),
        "Settlements and refunds that the state has not confirmed yet.",
    ),
    MetricSpec("buffered_bytes", "gauge", (), "Request bodies held in memory."),
    MetricSpec(
        "tasks", "gauge", (), "Tasks of the event loop: they come with requests, and go with them."
    ),
)
