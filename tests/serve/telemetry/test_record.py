"""The phases of a request and its tokens."""

from __future__ import annotations

import pytest

from sala_serve.telemetry import Phase, RequestRecord


class Clock:
    now_s = 0.0

    def __call__(self):
        return self.now_s


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def record(clock):
    return RequestRecord("r", "/v1/completions", clock.now_s, clock=clock)


def test_phases_follow_each_other_and_a_retry_adds_to_its_phase(record, clock):
    for phase, spent_s in (
        *((Phase.RECEIVE, 1), (Phase.COUNT, 2), (Phase.QUEUE, 4), (Phase.PREFILL, 8)),
        *((Phase.QUEUE, 16), (Phase.PREFILL, 32)),
    ):
        record.enter(phase)
        record.enter(phase)
        clock.now_s += spent_s
    assert record.finish() == 63
    assert record.phases_s == {
        Phase.RECEIVE: 1,
        Phase.COUNT: 2,
        Phase.QUEUE: 20,
        Phase.PREFILL: 40,
    }
    assert record.phase is None


def test_first_token_ends_the_prefill_and_later_ones_give_gaps(record, clock):
    record.enter(Phase.PREFILL)
    clock.now_s += 5
    assert record.token() is None
    assert (record.ttft_s, record.phase) == (5, Phase.DECODE)
    clock.now_s += 0.25
    assert record.token() == 0.25
    clock.now_s += 0.5
    assert record.token() == 0.5
    record.finish()
    assert record.phases_s == {Phase.PREFILL: 5, Phase.DECODE: 0.75}
    assert record.ttft_s == 5


def test_a_request_that_never_began_a_phase_has_none(record, clock):
    clock.now_s += 3
    assert record.finish() == 3
    assert record.phases_s == {}
