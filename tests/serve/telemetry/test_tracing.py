"""Traces: spans of a request, context in and through, nothing at all when off."""

from __future__ import annotations

import subprocess
import sys

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from sala_serve.config import ConfigError
from sala_serve.telemetry import (
    NO_TRACE,
    Metrics,
    Phase,
    RequestRecord,
    Tracing,
    Usage,
    report,
    tracing_from_env,
)
from sala_serve.telemetry.otel import OtelTracing, provider_for

TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
CLIENTS = {"traceparent": f"00-{TRACE_ID}-00f067aa0ba902b7-01", "tracestate": "vendor=1"}


@pytest.fixture
def exporter():
    return InMemorySpanExporter()


@pytest.fixture
def tracing(exporter):
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracing = OtelTracing(provider)
    yield tracing
    tracing.shutdown()


def start(tracing, headers=CLIENTS):
    record = RequestRecord("req-1", "/v1/chat/completions", 0.0, clock=lambda: 0.0)
    record.trace = tracing.start(record, headers)
    return record


def end(record):
    metrics = Metrics()
    metrics.request_started(record.endpoint)
    report(record, metrics)


def test_each_phase_is_a_span_under_the_requests_which_is_under_the_clients(tracing, exporter):
    record = start(tracing)
    for phase in (Phase.RECEIVE, Phase.COUNT, Phase.QUEUE, Phase.PREFILL):
        record.enter(phase)
    record.token()
    record.token()
    record.enter(Phase.SETTLE)
    record.tenant_id, record.status, record.usage = "acme", 200, Usage(1000, 64, 5)
    end(record)
    *phases, root = exporter.get_finished_spans()
    assert [span.name for span in phases] == [
        "receive",
        "count",
        "queue",
        "prefill",
        "decode",
        "settle",
    ]
    assert {span.parent.span_id for span in phases} == {root.context.span_id}
    assert f"{root.context.trace_id:032x}" == TRACE_ID == record.trace.trace_id
    assert f"{root.parent.span_id:016x}" == "00f067aa0ba902b7"
    assert all(
        earlier.end_time <= later.start_time
        for earlier, later in zip(phases, phases[1:], strict=False)
    )
    assert dict(root.attributes) == {
        "sala.request_id": "req-1",
        "http.response.status_code": 200,
        "sala.tenant": "acme",
        "sala.ttft_s": 0.0,
        "gen_ai.usage.input_tokens": 1000,
        "gen_ai.usage.output_tokens": 5,
        "sala.cached_tokens": 64,
    }


def test_the_engine_gets_the_requests_span_as_its_parent(tracing, exporter):
    record = start(tracing)
    headers = record.trace.headers(CLIENTS)
    end(record)
    (root,) = exporter.get_finished_spans()
    assert headers == {
        "traceparent": f"00-{TRACE_ID}-{root.context.span_id:016x}-01",
        "tracestate": "vendor=1",
    }


@pytest.mark.parametrize("headers", [{}, {"traceparent": "00-zz-1-01"}])
def test_without_a_usable_context_a_trace_begins_here(tracing, exporter, headers):
    record = start(tracing, headers)
    end(record)
    (root,) = exporter.get_finished_spans()
    assert root.parent is None
    assert root.context.trace_id != 0


def test_a_failed_request_is_marked_with_its_code(tracing, exporter):
    record = start(tracing)
    record.status, record.error_code = 502, "engine_lost"
    end(record)
    (root,) = exporter.get_finished_spans()
    assert root.status.status_code is StatusCode.ERROR
    assert root.attributes["error.type"] == "engine_lost"


def test_a_clients_decision_not_to_sample_is_kept(tracing, exporter):
    headers = {"traceparent": f"00-{TRACE_ID}-00f067aa0ba902b7-00"}
    record = start(tracing, headers)
    record.enter(Phase.RECEIVE)
    passed = record.trace.headers(headers)["traceparent"]
    end(record)
    assert exporter.get_finished_spans() == ()
    assert passed.endswith("-00")


def test_when_off_the_clients_context_goes_through_as_it_is():
    tracing = tracing_from_env({})
    record = start(tracing)
    assert record.trace is NO_TRACE
    assert record.trace.headers({**CLIENTS, "authorization": "Bearer sk-1"}) == CLIENTS


@pytest.mark.parametrize(
    ("env", "is_on"),
    [
        ({}, False),
        ({"OTEL_TRACES_EXPORTER": "none"}, False),
        ({"OTEL_TRACES_EXPORTER": "console"}, True),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"}, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://127.0.0.1:9"}, True),
        ({"OTEL_TRACES_EXPORTER": "otlp", "OTEL_SDK_DISABLED": "true"}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://a", "OTEL_TRACES_EXPORTER": "none"}, False),
    ],
)
def test_standard_variables_turn_traces_on(env, is_on):
    tracing = tracing_from_env(env)
    assert type(tracing) is (OtelTracing if is_on else Tracing)
    tracing.shutdown()


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"OTEL_TRACES_EXPORTER": "zipkin"}, "expected otlp, console or none, got 'zipkin'"),
        (
            {"OTEL_TRACES_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"},
            "OTEL_EXPORTER_OTLP_PROTOCOL: expected http/protobuf, got 'grpc'",
        ),
    ],
)
def test_what_we_cannot_send_is_an_error_at_the_start(env, message):
    with pytest.raises(ConfigError, match=message):
        tracing_from_env(env)


@pytest.mark.parametrize(
    ("variables", "name"),
    [
        ({}, "sala-serve"),
        ({"OTEL_SERVICE_NAME": "mine"}, "mine"),
        ({"OTEL_RESOURCE_ATTRIBUTES": "service.name=ours,a=b"}, "ours"),
    ],
)
def test_the_service_has_our_name_unless_told_otherwise(monkeypatch, variables, name):
    for key, each in variables.items():
        monkeypatch.setenv(key, each)
    provider = provider_for([], variables)
    assert provider.resource.attributes["service.name"] == name


def test_nothing_of_opentelemetry_is_loaded_when_off():
    code = (
        # Redis's client loads the metrics of it where it is installed, used or not
        "import sys, fakeredis.aioredis, redis.asyncio\n"
        "before = set(sys.modules)\n"
        "import sala_serve.app\n"
        "from sala_serve.telemetry import tracing_from_env\n"
        "tracing_from_env({})\n"
        "names = set(sys.modules) - before\n"
        "print(*[name for name in names if name.startswith('opentelemetry')])"
    )
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert process.stdout.strip() == ""
