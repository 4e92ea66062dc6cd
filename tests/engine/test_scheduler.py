"""Short requests beside long prefills: when each computes what, and that the answers stay the oracle's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.engine

Oracle = RunJob = Any  # fixtures in conftest.py; their classes are not importable from here

BLOCK_TOKENS = 128
STEP_TOKENS = 512
LONG_TOKENS = 256
CHUNK_TOKENS = 64
STEPS_PER_GAP = 4
MAX_OVERTAKES = 3
ENGINE = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 2048,
    "max_num_seqs": 16,
    "max_num_batched_tokens": STEP_TOKENS,
    "block_size": BLOCK_TOKENS,
    "kv_cache_memory_bytes": 64 << 20,
    # a request takes a block per 128 tokens and 2 for states: two of 1,500 tokens fit, a third does not
    "num_gpu_blocks_override": 38,
    "additional_config": {
        "sala_scheduler": {
            "long_prefill_tokens": LONG_TOKENS,
            "long_chunk_tokens": CHUNK_TOKENS,
            "long_steps_per_gap": STEPS_PER_GAP,
            "max_overtakes": MAX_OVERTAKES,
            "quiet_s": 3600,
        }
    },
}


def arrival(step: int, length: int, seed: int, max_tokens: int = 4) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.randint(3, 499, (length,), generator=generator).tolist()
    return {"step": step, "prompt": prompt, "max_tokens": max_tokens}


REPEATED = arrival(0, 1400, seed=1)
SCENARIOS: dict[str, dict[str, dict[str, Any]]] = {
    # before any short request was seen: a long one has the engine for itself
    "alone before": {"long": arrival(0, 1300, seed=80)},
    "alone": {"long": REPEATED},
    "two long": {
        "first": arrival(0, 1300, seed=50),
        "second": arrival(0, 1200, seed=51),
        "cached": REPEATED | {"step": 2},
    },
    "one short": {"long": arrival(0, 1500, seed=2), "short": arrival(3, 100, seed=3)},
    "stream of short": {
        "long": arrival(0, 1500, seed=4),
        **{f"short {n}": arrival(2 + n, 40, seed=10 + n, max_tokens=2) for n in range(30)},
    },
    "no memory": {
        "old 1": arrival(0, 1500, seed=60, max_tokens=80),
        "old 2": arrival(0, 1500, seed=61, max_tokens=80),
        # once the two decode
        "large": arrival(60, 1500, seed=62),
        **{f"small {n}": arrival(64 + 4 * n, 30, seed=70 + n, max_tokens=2) for n in range(6)},
    },
}


@dataclass(frozen=True)
class Scenario:
    """What happened in one."""

    requests: dict[str, dict[str, Any]]
    steps: list[dict[str, int]]
    """Tokens computed of each request, step by step."""
    outputs: dict[str, dict[str, Any]]

    def first_step(self, name: str) -> int:
        return next(n for n, step in enumerate(self.steps) if name in step)

    def prefill_steps(self, name: str) -> dict[int, int]:
        """Step -> tokens of the prompt computed in it."""
        left = len(self.requests[name]["prompt"]) - self.outputs[name]["cached"]
        chunks = {}
        for n, step in enumerate(self.steps):
            if left > 0 and name in step:
                chunks[n] = step[name]
                left -= step[name]
        return chunks

    def first_token_step(self, name: str) -> int:
        return max(self.prefill_steps(name))


@pytest.fixture(scope="module")
def scenarios(
    checkpoint: Path,
    tmp_path_factory: pytest.TempPathFactory,
    engine_environment: dict[str, str],
    run_job: RunJob,
) -> dict[str, Scenario]:
    folder = tmp_path_factory.mktemp("schedule")
    job = {
        "engine": ENGINE | {"model": str(checkpoint)},
        "scenarios": list(SCENARIOS.values()),
    }
    results, _ = run_job("schedule.py", job, folder, engine_environment)
    return {
        name: Scenario(requests, **result)
        for (name, requests), result in zip(SCENARIOS.items(), results, strict=True)
    }


def test_answers_equal_the_oracle(scenarios: dict[str, Scenario], oracle: Oracle) -> None:
    for scenario in scenarios.values():
        for name, request in scenario.requests.items():
            tokens = scenario.outputs[name]["tokens"]
            assert len(tokens) == request["max_tokens"]
            assert tokens == oracle.next_tokens(request["prompt"], tokens)


@pytest.mark.parametrize("name", ["alone before", "alone"])
def test_long_prefill_alone_takes_whole_steps(name: str, scenarios: dict[str, Scenario]) -> None:
    # the second one too: the answer to the first is not a sign of short requests
    chunks = list(scenarios[name].prefill_steps("long").values())
    assert chunks[:2] == [STEP_TOKENS, STEP_TOKENS]


def test_short_request_is_served_at_once(scenarios: dict[str, Scenario]) -> None:
    scenario = scenarios["one short"]
    arrival_step = scenario.requests["short"]["step"]
    # two steps to itself: up to the last multiple of 64, whose state is kept, and from there
    assert scenario.prefill_steps("short") == {arrival_step: 64, arrival_step + 1: 36}
    assert "long" not in scenario.steps[arrival_step] | scenario.steps[arrival_step + 1]
    assert scenario.first_token_step("long") > arrival_step + 1


def test_long_prefill_takes_small_chunks_beside_short_ones(scenarios: dict[str, Scenario]) -> None:
    scenario = scenarios["one short"]
    arrival_step = scenario.requests["short"]["step"]
    chunks = [n for step, n in scenario.prefill_steps("long").items() if step > arrival_step]
    # to its end: the last tokens see the longest context and take the most time
    assert sum(chunks) > 2 * LONG_TOKENS
    assert set(chunks[:-1]) == {CHUNK_TOKENS}
    assert chunks[-1] <= CHUNK_TOKENS


def test_long_prefill_goes_on_under_a_stream_of_short_ones(scenarios: dict[str, Scenario]) -> None:
    scenario = scenarios["stream of short"]
    chunks = scenario.prefill_steps("long")
    gaps = [n for n in range(max(chunks)) if n not in chunks]
    assert len(gaps) > 2
    assert all(b - a > STEPS_PER_GAP for a, b in zip(gaps, gaps[2:], strict=False))
    first_tokens = [
        scenario.first_token_step(name) - request["step"]
        for name, request in scenario.requests.items()
        if name != "long"
    ]
    assert max(first_tokens) <= 1
    assert max(chunks) < len(scenario.steps)


def test_long_prefills_run_one_after_another_but_cached_ones_pass(
    scenarios: dict[str, Scenario],
) -> None:
    scenario = scenarios["two long"]
    first = scenario.prefill_steps("first")
    start = scenario.first_step("second")
    num_left = sum(n for step, n in first.items() if step >= start)
    assert num_left <= LONG_TOKENS
    assert scenario.outputs["cached"]["cached"] > len(REPEATED["prompt"]) - LONG_TOKENS
    assert scenario.first_step("cached") < start


def test_request_that_does_not_fit_lets_a_few_pass(scenarios: dict[str, Scenario]) -> None:
    scenario = scenarios["no memory"]
    large = scenario.first_step("large")
    assert scenario.first_token_step("old 2") < scenario.requests["large"]["step"]
    passed = [f"small {n}" for n in range(6) if scenario.first_step(f"small {n}") < large]
    assert passed == [f"small {n}" for n in range(MAX_OVERTAKES)]
    # and it starts as soon as there is room
    assert large <= max(n for n, step in enumerate(scenario.steps) if "old 1" in step) + 1
