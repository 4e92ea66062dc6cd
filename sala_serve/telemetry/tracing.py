"""OpenTelemetry traces: one span a request, a child span for each of its phases.

Off unless the standard variables ask for an exporter, and then nothing of OpenTelemetry is even imported.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sala_serve.telemetry.record import Phase, RequestRecord

TRACE_HEADERS = ("traceparent", "tracestate")
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_PROTOCOL", "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL")
_PROTOCOL = "http/protobuf"


class RequestTrace:
    """The trace of one request while traces are off: does nothing, passes the client's context on."""

    trace_id: str | None = None

    def enter(self, phase: Phase) -> None:
        """Begin the span of ``phase``; the one before ends."""

    def finish(self, record: RequestRecord) -> None:
        """End all spans, with the outcome in ``record``."""

    def headers(self, client_headers: Mapping[str, str]) -> dict[str, str]:
        """Return the W3C headers the engine gets."""
        return {name: value for name in TRACE_HEADERS if (value := client_headers.get(name))}


NO_TRACE = RequestTrace()


class Tracing:
    """Makes the trace of each request; this one, while traces are off, only passes context on."""

    def start(self, record: RequestRecord, client_headers: Mapping[str, str]) -> RequestTrace:
        """Return the trace of a request that has just begun."""
        return NO_TRACE

    def shutdown(self) -> None:
        """Send what is left; waits for the exporter, so not on the event loop."""


def tracing_from_env(env: Mapping[str, str]) -> Tracing:
    """Return what the standard ``OTEL_*`` variables ask for.

    Traces are on when ``OTEL_TRACES_EXPORTER`` names ``otlp`` or ``console``, or when it is not set and an
    OTLP endpoint is; ``OTEL_SDK_DISABLED=true`` turns them off. Sampler, resource, endpoint, headers, batch sizes
    and limits are read by OpenTelemetry itself.

    Raises:
        ConfigError: an exporter or protocol that is not ours.
    """
    if env.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return Tracing()
    has_endpoint = any(env.get(name) for name in _ENDPOINTS)
    asked = env.get("OTEL_TRACES_EXPORTER", "otlp" if has_endpoint else "none")
    exporters = [name.strip() for name in asked.split(",") if name.strip() not in ("", "none")]
    if not exporters:
        return Tracing()
    from sala_serve.config import ConfigError

    if unknown := [name for name in exporters if name not in ("otlp", "console")]:
        raise ConfigError(
            f"OTEL_TRACES_EXPORTER: expected otlp, console or none, got {unknown[0]!r}"
        )
    for name in _PROTOCOLS:
        if "otlp" in exporters and env.get(name, _PROTOCOL) != _PROTOCOL:
            raise ConfigError(f"{name}: expected {_PROTOCOL}, got {env[name]!r}")
    from sala_serve.telemetry.otel import OtelTracing, provider_for

    return OtelTracing(provider_for(exporters, env))
