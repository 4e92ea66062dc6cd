"""The soak in short: the same clients, the same restarts, the same counts; scripts/soak runs ten minutes of it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "loadtests"))

from soak.books import Check
from soak.play import play
from soak.report import table
from soak.wire import Answer


@pytest.mark.slow
async def test_nothing_is_left_behind(tmp_path):
    result = await play(tmp_path, duration_s=8, num_clients=10, seed=3, away_s=0.5)
    assert result.is_good, "\n".join(["", *table(result)])
    assert result.num_requests > 40


def test_one_that_is_left_behind_is_enough():
    assert Check("reservations", 0).is_good
    assert not Check("reservations", 1).is_good
    assert Check("sockets", 64, 64).is_good


@pytest.mark.parametrize(
    ("status", "head", "body", "outcome"),
    [
        (0, b"", b"", "no answer"),
        (503, b"", b"{}", "503"),
        (200, b"content-type: application/json", b"{}", "200"),
        (200, b"content-type: text/event-stream", b"data: {}\n\ndata: [DONE]\n\n", "200"),
        (200, b"content-type: text/event-stream", b'data: {"error": {}}\n\n', "error event"),
        (200, b"content-type: text/event-stream", b"data: {}\n\n", "silent end"),
    ],
)
def test_an_end_is_told_from_a_silent_one(status, head, body, outcome):
    assert Answer(status, head, body).outcome == outcome
