"""Traces through OpenTelemetry; imported only when they are on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from opentelemetry import trace
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter, SpanExporter
from opentelemetry.trace import SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from sala_serve.telemetry.tracing import RequestTrace, Tracing

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from opentelemetry.trace import Span, Tracer

    from sala_serve.telemetry.record import Phase, RequestRecord

_PROPAGATOR = TraceContextTextMapPropagator()


def provider_for(exporters: Sequence[str], env: Mapping[str, str]) -> TracerProvider:
    """Return a provider that sends to ``exporters`` in the background."""
    is_named = "OTEL_SERVICE_NAME" in env or "service.name" in env.get(
        "OTEL_RESOURCE_ATTRIBUTES", ""
    )
    resource = Resource.create({} if is_named else {SERVICE_NAME: "sala-serve"})
    provider = TracerProvider(resource=resource)
    for name in exporters:
        exporter: SpanExporter
        if name == "otlp":
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

            exporter = OTLPSpanExporter()
        else:
            exporter = ConsoleSpanExporter()
        provider.add_span_processor(BatchSpanProcessor(exporter))
    return provider


class OtelTracing(Tracing):
    """Traces of a provider; the gateway's own, never the global one."""

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("sala_serve")

    def start(self, record: RequestRecord, client_headers: Mapping[str, str]) -> RequestTrace:
        """Begin the request's span, as a child of the client's if it sent a context."""
        return OtelTrace(self._tracer, record, client_headers)

    def shutdown(self) -> None:
        """Send what is left; waits for the exporter, so not on the event loop."""
        self._provider.shutdown()


class OtelTrace(RequestTrace):
    """One request's spans."""

    def __init__(
        self, tracer: Tracer, record: RequestRecord, client_headers: Mapping[str, str]
    ) -> None:
        self._tracer = tracer
        # of the client's headers these two only: the propagator reads no other
        given = super().headers(client_headers)
        self._root = tracer.start_span(
            record.endpoint,
            context=_PROPAGATOR.extract(given),
            kind=SpanKind.SERVER,
            attributes={"sala.request_id": record.request_id},
        )
        self._context = trace.set_span_in_context(self._root)
        self._phase: Span | None = None
        self.trace_id = f"{self._root.get_span_context().trace_id:032x}"

    def enter(self, phase: Phase) -> None:
        """Begin the span of ``phase``; the one before ends."""
        if self._phase is not None:
            self._phase.end()
        self._phase = self._tracer.start_span(phase, context=self._context)

    def finish(self, record: RequestRecord) -> None:
        """End all spans, with the outcome in ``record``."""
        if self._phase is not None:
            self._phase.end()
        usage = record.usage
        found = {
            "http.response.status_code": record.status,
            "error.type": record.error_code,
            "sala.tenant": record.tenant_id,
            "sala.tier": record.tier,
            "sala.engine": record.engine_id,
            "sala.ttft_s": record.ttft_s,
            "gen_ai.usage.input_tokens": usage.num_prompt_tokens if usage else None,
            "gen_ai.usage.output_tokens": usage.num_completion_tokens if usage else None,
            "sala.cached_tokens": usage.num_cached_tokens if usage else None,
        }
        for name, value in found.items():
            if value is not None:
                self._root.set_attribute(name, value)
        if record.status is not None and record.status >= 500:
            self._root.set_status(Status(StatusCode.ERROR))
        self._root.end()

    def headers(self, client_headers: Mapping[str, str]) -> dict[str, str]:
        """Return the W3C headers the engine gets: its spans become children of this request's."""
        carrier: dict[str, str] = {}
        _PROPAGATOR.inject(carrier, context=self._context)
        return carrier
