from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import pytest

from sala_serve.scheduling.settings import SchedulingSettings

ROOT = Path(__file__).parents[3]
sys.path.insert(0, str(ROOT / "loadtests"))

from fairness.engine import EngineOptions  # noqa: E402
from fairness.play import Play  # noqa: E402
from fairness.speeds import Speeds  # noqa: E402
from fairness.virtual_time import run_virtual  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

SPEEDS = Speeds((1000,), (1.0,), token_step_s=0.01)
"""1,000 prompt tokens a second, 100 steps a second."""
OPTIONS = EngineOptions(
    step_tokens=1024,
    long_prefill_tokens=2048,
    long_chunk_tokens=128,
    state_interval_tokens=4096,
    engine_block_tokens=512,
)
SETTINGS: dict[str, Any] = {
    "long_prompt_tokens": 2048,
    "piece_tokens": 2048,
    "lead_tokens": 2048,
    "give_way_tokens": 8192,
    "state_interval_tokens": 4096,
    "engine_block_tokens": 512,
    "max_prefill_ahead_tokens": 2048,
    "min_shared_tokens": 1024,
    "prefill_tokens_per_s": 1000.0,
    "decode_tokens_per_s": 100.0,
}


class RunPlay(Protocol):
    def __call__(
        self, scene: Callable[[Play], Awaitable[Any]], *, engine: Any = None, **settings: Any
    ) -> Any: ...


@pytest.fixture
def settings() -> SchedulingSettings:
    """A million tokens made small: 128 to 1."""
    return SchedulingSettings(**SETTINGS)


@pytest.fixture
def run_play() -> RunPlay:
    """Play a scene before an engine of 1,000 tokens a second, in virtual time."""

    def run(scene: Callable[[Play], Awaitable[Any]], *, engine: Any = None, **settings: Any) -> Any:
        async def main(clock: Callable[[], float]) -> Any:
            chosen = SchedulingSettings(**{**SETTINGS, **settings})
            async with Play(
                clock, SPEEDS, chosen, **{"options": OPTIONS, **(engine or {})}
            ) as play:
                return await scene(play)

        return run_virtual(main)

    return run
