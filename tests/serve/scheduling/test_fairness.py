"""The fairness benchmark in short: an engine at the speeds of the stored GPU run, and a flood of million-token prompts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from fairness.calibration import compare
from fairness.report import MAX_TTFT_RATIO, MIN_FLOOD_FRAC
from fairness.scenes import RULES, Result, Scene, play
from fairness.speeds import Measured

ROOT = Path(__file__).parents[3]
SCENE = Scene(duration_s=300, warm_up_s=60, flood=(3,), seed=3)


@pytest.fixture(scope="module")
def measured() -> Measured:
    return Measured.load(ROOT / "kernels/bench/results/h200/results.jsonl")


@pytest.fixture(scope="module")
def short_alone(measured: Measured) -> Result:
    return play(replace(SCENE, flood=()), RULES["fair"], measured.speeds())


@pytest.fixture(scope="module")
def flood_alone(measured: Measured) -> Result:
    return play(replace(SCENE, short_per_s=0), RULES["fair"], measured.speeds())


def test_simulated_engine_takes_the_times_of_the_real_one(measured: Measured):
    rows = compare(measured)
    assert len(rows) == len(measured.alone_s) + 5
    assert [row for row in rows if not row.is_close] == []


def figures(result: Result, short_alone: Result, flood_alone: Result) -> tuple[float, float]:
    (flood,), (alone,) = result.flood_tokens_per_s, flood_alone.flood_tokens_per_s
    return result.ttft()["p99"] / short_alone.ttft()["p99"], flood / alone


def test_short_requests_stay_fast_and_the_flood_keeps_its_speed(
    measured: Measured, short_alone: Result, flood_alone: Result
):
    result = play(SCENE, RULES["fair"], measured.speeds())
    assert len(result.ttft_s) > 50
    ttft_ratio, flood_frac = figures(result, short_alone, flood_alone)
    assert ttft_ratio <= MAX_TTFT_RATIO
    assert flood_frac >= MIN_FLOOD_FRAC
    assert result.gap_tokens <= result.gap_bound_tokens


@pytest.mark.parametrize("rule", ["arrival", "vllm"])
def test_without_fairness_short_requests_wait_for_the_flood(
    rule: str, measured: Measured, short_alone: Result, flood_alone: Result
):
    result = play(SCENE, RULES[rule], measured.speeds())
    ttft_ratio, _ = figures(result, short_alone, flood_alone)
    assert ttft_ratio > 30 * MAX_TTFT_RATIO
