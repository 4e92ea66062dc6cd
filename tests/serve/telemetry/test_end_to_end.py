"""A request through the real gateway: its spans, its log line, its metrics."""

from __future__ import annotations

import json
import logging

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from sala_serve.engine.fake import Behaviour
from sala_serve.telemetry.otel import OtelTracing

TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
WORD = "zanzibar"
BODY = {
    "model": "sala",
    "messages": [{"role": "user", "content": WORD}],
    "stream": True,
    "stream_options": {"include_usage": True},
}
HEADERS = {"traceparent": f"00-{TRACE_ID}-00f067aa0ba902b7-01", "X-Request-Id": "req-1"}


@pytest.fixture
def exporter():
    return InMemorySpanExporter()


@pytest.fixture
def tracing(exporter):
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return OtelTracing(provider)


async def ask(stack, body=BODY, **headers):
    return await stack.http.post("/v1/chat/completions", json=body, headers=HEADERS | headers)


async def test_every_phase_of_a_stream_is_a_span_and_the_engine_continues_the_trace(
    start_stack, tracing, exporter
):
    async with start_stack(Behaviour(itl_s=0.01), tracing=tracing) as stack:
        await ask(stack)
        await stack.http.get("/healthz")
    *phases, root = exporter.get_finished_spans()
    assert [span.name for span in phases] == [
        *("receive", "count", "queue", "prefill", "decode", "settle")
    ]
    assert root.name == "/v1/chat/completions"
    assert {span.parent.span_id for span in phases} == {root.context.span_id}
    assert f"{root.context.trace_id:032x}" == TRACE_ID
    (sent,) = stack.engine.journal.headers
    assert sent["traceparent"] == f"00-{TRACE_ID}-{root.context.span_id:016x}-01"
    assert root.attributes["gen_ai.usage.input_tokens"] == 7
    assert root.attributes["sala.tenant"] == "default"
    assert WORD not in json.dumps([span.to_json() for span in exporter.get_finished_spans()])


async def test_without_traces_the_engine_gets_the_clients_context(start_stack):
    async with start_stack() as stack:
        await ask(stack)
    (sent,) = stack.engine.journal.headers
    assert sent["traceparent"] == HEADERS["traceparent"]


async def test_a_refused_request_has_a_span_with_its_code(start_stack, tracing, exporter):
    async with start_stack(tracing=tracing) as stack:
        await ask(stack, BODY | {"model": WORD})
    root = exporter.get_finished_spans()[-1]
    assert root.attributes["error.type"] == "model_not_found"
    assert root.attributes["http.response.status_code"] == 404
    assert WORD not in root.to_json()


async def test_a_stream_fills_every_histogram_of_its_phases(start_stack, caplog):
    caplog.set_level(logging.INFO, "sala_serve.request")
    async with start_stack(Behaviour(itl_s=0.01, num_tokens=4)) as stack:
        await ask(stack)
        tier, tenant = {"tier": "default"}, {"tenant": "default"}
        for name, labels, number in (
            ("queue_wait_seconds", tier, 1),
            ("prefill_seconds", tier, 1),
            ("between_tokens_seconds", tier, 4),
            ("tenant_queue_wait_seconds", tenant, 1),
            ("tenant_time_to_first_token_seconds", tenant, 1),
        ):
            assert await stack.metric(f"sala_gateway_{name}_count", **labels) == number, name
        tokens = "sala_gateway_tenant_tokens_total"
        assert await stack.metric(tokens, kind="prompt", **tenant) == 7
        assert await stack.metric(tokens, kind="cached", **tenant) == 4
        assert await stack.metric(tokens, kind="completion", **tenant) == 4
    (fields,) = [record.fields for record in caplog.records if hasattr(record, "fields")]
    assert fields["request_id"] == "req-1"
    assert {"receive_s", "count_s", "queue_s", "prefill_s", "decode_s", "settle_s"} <= set(fields)
    spent_s = sum(value for name, value in fields.items() if name[:-2] in _PHASES)
    assert spent_s <= fields["duration_s"] + 0.01


_PHASES = ("receive", "count", "queue", "prefill", "decode", "settle")
