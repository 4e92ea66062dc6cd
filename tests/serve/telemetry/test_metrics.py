"""What is counted, under which names and labels, and that nobody can make them many."""

from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families

from sala_serve.telemetry import (
    METRICS,
    EngineLoad,
    Metrics,
    Phase,
    QueueLoad,
    RequestRecord,
    Usage,
)
from sala_serve.telemetry.labels import HALF_LIFE_S, TopLabels


class Clock:
    """Seconds that tests set."""

    def __init__(self):
        self.now_s = 100.0

    def __call__(self):
        return self.now_s


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def metrics(clock):
    return Metrics(max_tenant_labels=2, clock=clock)


def series(metrics):
    """Every scraped value by name and labels, as Prometheus' own parser reads it."""
    text = metrics.render().decode()
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(metrics, name, **labels):
    return series(metrics).get((f"sala_gateway_{name}", tuple(sorted(labels.items()))))


def finished_record(clock, **fields):
    record = RequestRecord("r", "/v1/chat/completions", clock.now_s, clock=clock)
    for name, each in fields.items():
        setattr(record, name, each)
    return record


def finish(metrics, record, status=200):
    metrics.request_started(record.endpoint)
    metrics.request_finished(record, status, record.finish())


def exercise(metrics, clock):
    """Let everything happen once."""
    record = finished_record(clock, tenant_id="t-1", tier="gold", usage=Usage(10, 4, 2))
    for phase in (Phase.QUEUE, Phase.PREFILL):
        record.enter(phase)
        clock.now_s += 1
    record.token()
    clock.now_s += 0.2
    metrics.token_gap("gold", record.token())
    finish(metrics, record)
    metrics.refused("t-1", "rate_limit_exceeded")
    metrics.limit_tokens("t-1", "input", "reserved", 10)
    metrics.prefill_done("e-0", 6)
    metrics.set_queues([QueueLoad("gold", 3, 1_200_000)])
    metrics.set_engines([EngineLoad("e-0", True, False, 1, 2, 500, 900, 1000)])
    metrics.set_service_gap(5, 10)
    metrics.set_jobs({("response", "queued"): 2})
    metrics.set_state_up(True)
    metrics.state_lost()
    metrics.limit_refused("requests_per_min")
    metrics.set_buffered_bytes(77)


def test_every_metric_is_scraped_with_its_type_and_labels(metrics, clock):
    exercise(metrics, clock)
    families = {
        family.name: family
        for family in text_string_to_metric_families(metrics.render().decode())
        if not family.name.endswith("_created")
    }
    found = {
        name + "_total" * (family.type == "counter"): (
            family.type,
            {label for sample in family.samples for label in sample.labels} - {"le"},
        )
        for name, family in families.items()
    }
    assert found == {spec.full_name: (spec.kind, set(spec.labels)) for spec in METRICS}
    assert all(family.samples for family in families.values())


def test_time_in_each_phase_goes_to_its_histogram(metrics, clock):
    exercise(metrics, clock)
    assert value(metrics, "queue_wait_seconds_sum", tier="gold") == 1
    assert value(metrics, "prefill_seconds_sum", tier="gold") == 1
    assert value(metrics, "between_tokens_seconds_sum", tier="gold") == pytest.approx(0.2)
    assert value(metrics, "tenant_queue_wait_seconds_sum", tenant="t-1") == 1
    assert value(metrics, "tenant_time_to_first_token_seconds_sum", tenant="t-1") == 2
    endpoint = "/v1/chat/completions"
    assert value(metrics, "time_to_first_token_seconds_sum", endpoint=endpoint) == 2
    duration_s = value(metrics, "request_duration_seconds_sum", endpoint=endpoint)
    assert duration_s == pytest.approx(2.2)


def test_queues_and_engines_that_are_gone_leave_no_series(metrics, clock):
    exercise(metrics, clock)
    assert value(metrics, "queued_tokens", tier="gold") == 1_200_000
    metrics.set_queues([QueueLoad("free", 1, 5)])
    metrics.set_engines([EngineLoad("e-1", True, True, 0, 0, 0, 0, None)])
    metrics.set_jobs({})
    found = series(metrics)
    assert {labels for name, labels in found if name == "sala_gateway_queued_tokens"} == {
        (("tier", "free"),)
    }
    assert value(metrics, "engine_stuck", engine="e-1") == 1
    assert not [
        name
        for name, labels in found
        if ("engine", "e-0") in labels and "prefill_tokens_done" not in name
    ]
    assert not [name for name, _ in found if name in ("sala_gateway_jobs",)]
    assert value(metrics, "engine_kv_capacity_tokens", engine="e-1") is None


def test_error_before_the_engine_is_a_refusal_and_after_it_is_not(metrics, clock):
    record = finished_record(clock, tenant_id="t-1", error_code="rate_limit_exceeded")
    record.enter(Phase.COUNT)
    finish(metrics, record, 429)
    broken = finished_record(clock, tenant_id="t-1", error_code="engine_lost")
    broken.enter(Phase.PREFILL)
    finish(metrics, broken, 502)
    unknown = finished_record(clock, error_code="invalid_api_key")
    finish(metrics, unknown, 401)
    probe = RequestRecord("r", "/readyz", clock.now_s, clock=clock)
    probe.error_code = "engine_unavailable"
    finish(metrics, probe, 503)
    refusals = {
        labels: number
        for (name, labels), number in series(metrics).items()
        if name == "sala_gateway_refusals_total"
    }
    assert refusals == {
        (("code", "invalid_api_key"), ("tenant", "other")): 1,
        (("code", "rate_limit_exceeded"), ("tenant", "t-1")): 1,
    }
    assert value(metrics, "tenant_requests_total", tenant="t-1", status="502") == 1


def test_sources_are_asked_at_each_scrape(metrics):
    seen = iter([1, 0])
    metrics.at_scrape(lambda: metrics.set_state_up(next(seen)))
    assert [value(metrics, "state_up"), value(metrics, "state_up")] == [1, 0]


def tenants(metrics, name="sala_gateway_tenant_requests_total"):
    return {dict(labels)["tenant"] for found, labels in series(metrics) if found == name}


def test_a_thousand_tenants_make_no_more_series_than_the_limit(metrics, clock):
    for number in range(1000):
        finish(metrics, finished_record(clock, tenant_id=f"t-{number}", usage=Usage(5, 0, 1)))
    assert tenants(metrics) == {"t-0", "t-1", "other"}
    assert value(metrics, "tenant_requests_total", tenant="other", status="200") == 998
    assert value(metrics, "tenant_tokens_total", tenant="other", kind="prompt") == 5 * 998


def test_a_heavy_tenant_takes_the_place_of_the_lightest_with_all_its_series(metrics, clock):
    for name, num_tokens in (("a", 100), ("b", 10), ("c", 15)):
        finish(metrics, finished_record(clock, tenant_id=name, usage=Usage(num_tokens, 0, 0)))
    metrics.limit_tokens("b", "input", "settled", 10)
    assert tenants(metrics) == {"a", "b", "other"}  # 15 is not twice 10: no changing of places
    finish(metrics, finished_record(clock, tenant_id="c", usage=Usage(6, 0, 0)))
    assert tenants(metrics) == {"a", "c", "other"}
    assert not [labels for _, labels in series(metrics) if ("tenant", "b") in labels]
    finish(metrics, finished_record(clock, tenant_id="b", usage=Usage(1, 0, 0)))
    assert value(metrics, "tenant_requests_total", tenant="other", status="200") == 2


def test_a_tenant_that_was_heavy_long_ago_makes_room(clock):
    demoted = []
    labels = TopLabels(1, on_demoted=demoted.append, clock=clock)
    assert labels.weigh("old", 1000) == "old"
    clock.now_s += 12 * HALF_LIFE_S
    assert labels.weigh("new", 1) == "new"
    assert demoted == ["old"]
    assert labels.of("old") == "other"


def test_weights_stay_finite_and_few_over_years(clock):
    labels = TopLabels(2, on_demoted=lambda _: None, clock=clock)
    for year in range(20):
        for number in range(50):
            assert labels.weigh(f"{year}-{number}", 1000) in {f"{year}-{number}", "other"}
        clock.now_s += 365 * 24 * 3600
    assert len(labels) == 2
    assert len(labels._weights) <= 10
    assert all(weight < float("inf") for weight in labels._weights.values())
    assert labels.weigh("last", 1) == "last"


def test_weightless_tenants_do_not_push_each_other_out(clock):
    demoted = []
    labels = TopLabels(1, on_demoted=demoted.append, clock=clock)
    for name in ("a", "b", "a", "b"):
        labels.weigh(name, 0.0)
    assert demoted == []


def test_a_tenant_named_other_is_counted_with_the_others(clock):
    labels = TopLabels(1, on_demoted=lambda _: None, clock=clock)
    assert labels.weigh("other", 5) == "other"
    assert len(labels) == 0
