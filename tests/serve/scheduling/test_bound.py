"""The service gap between tenants that wait stays below the published bound, whatever they send."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

if TYPE_CHECKING:
    from fairness.play import Play
    from tests.serve.scheduling.conftest import RunPlay

LONG = 81_920


@dataclass(frozen=True)
class Arrival:
    """``num`` alike requests at one moment."""

    at_s: int
    tenant: int
    num: int
    num_tokens: int
    output_tokens: int
    leaves_after_s: float | None


arrivals = st.builds(
    Arrival,
    at_s=st.integers(0, 60),
    tenant=st.integers(0, 3),
    num=st.integers(1, 12),
    num_tokens=st.sampled_from([100, 700, 2000, 2049, 5000, LONG]),
    output_tokens=st.sampled_from([1, 20, 200]),
    leaves_after_s=st.one_of(st.none(), st.floats(0, 40)),
)
FLOODS = [Arrival(0, tenant, 8, LONG, 1, None) for tenant in (0, 1)]
UNEVEN = [Arrival(0, 0, 12, LONG, 1, None), Arrival(5, 1, 12, 700, 20, None)]


async def send(play: Play, arrival: Arrival, weights: list[float]) -> None:
    await asyncio.sleep(arrival.at_s)
    works = [
        play.work(
            f"tenant-{arrival.tenant}",
            arrival.num_tokens,
            arrival.output_tokens,
            weight=weights[arrival.tenant],
        )
        for _ in range(arrival.num)
    ]
    tasks = [play.send(work) for work in works]
    if arrival.leaves_after_s is not None:
        await asyncio.sleep(arrival.leaves_after_s)
        for task in tasks[::2]:
            task.cancel()


async def gap_and_bound(
    play: Play, scene: list[Arrival], weights: list[float]
) -> tuple[float, float]:
    for arrival in scene:
        play.run(send(play, arrival, weights))
    await asyncio.sleep(150)
    snapshot = play.scheduler.snapshot()
    return snapshot.service_gap_tokens, snapshot.service_gap_bound_tokens


@given(
    scene=st.lists(arrivals, min_size=2, max_size=8),
    weights=st.lists(st.sampled_from([1.0, 1.0, 2.0, 8.0]), min_size=4, max_size=4),
)
@example(scene=FLOODS, weights=[1.0] * 4)
@example(scene=UNEVEN, weights=[1.0] * 4)
@settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_gap_stays_below_its_bound(run_play: RunPlay, scene: list[Arrival], weights: list[float]):
    gap, bound = run_play(lambda play: gap_and_bound(play, scene, weights))
    assert gap <= bound


@pytest.mark.parametrize("scene", [FLOODS, UNEVEN])
def test_first_come_first_served_exceeds_it(run_play: RunPlay, scene: list[Arrival]):
    gap, bound = run_play(lambda play: gap_and_bound(play, scene, [1.0] * 4), order="arrival")
    assert gap > bound


def test_without_giving_way_the_bound_holds_a_whole_prompt(run_play: RunPlay):
    def play(**settings: int | None) -> tuple[float, float]:
        return run_play(lambda play: gap_and_bound(play, FLOODS, [1.0] * 4), **settings)

    (gap, bound), (_, usual_bound) = play(give_way_tokens=None), play()
    assert usual_bound < gap <= bound
