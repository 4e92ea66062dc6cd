"""What the gateway reports: the record of each request, metrics, logs and traces.

docs/api.md lists every metric, docs/operations.md says what to watch. Nothing here ever holds a prompt, an
answer, a key or a body.
"""

from sala_serve.telemetry.logs import configure_logging
from sala_serve.telemetry.metrics import LATENCY_BUCKETS_S, Metrics
from sala_serve.telemetry.record import Phase, RequestRecord, Usage
from sala_serve.telemetry.report import report
from sala_serve.telemetry.settings import TelemetrySettings
from sala_serve.telemetry.specs import METRICS, EngineLoad, MetricSpec, QueueLoad
from sala_serve.telemetry.tracing import NO_TRACE, RequestTrace, Tracing, tracing_from_env

__all__ = [
    "LATENCY_BUCKETS_S",
    "METRICS",
    "NO_TRACE",
    "EngineLoad",
    "MetricSpec",
    "Metrics",
    "Phase",
    "QueueLoad",
    "RequestRecord",
    "RequestTrace",
    "TelemetrySettings",
    "Tracing",
    "Usage",
    "configure_logging",
    "report",
    "tracing_from_env",
]
