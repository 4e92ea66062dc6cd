"""Does the simulated engine take the times of the real one? The measured scenes, played again."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING

from fairness.engine import EngineOptions, SimulatedEngine, SimulatedPrompt
from fairness.speeds import WHOLE_STEP_TOKENS
from fairness.virtual_time import run_virtual

if TYPE_CHECKING:
    from collections.abc import Callable

    from fairness.speeds import Measured

SHORT_TOKENS = 500
ANSWER_TOKENS = 16


@dataclass(frozen=True)
class Compared:
    """One figure."""

    figure: str
    measured: float
    simulated: float
    tolerance_frac: float
    is_close: bool = field(init=False)

    def __post_init__(self) -> None:
        off_frac = abs(self.simulated / self.measured - 1)
        object.__setattr__(self, "is_close", off_frac <= self.tolerance_frac)


def compare(measured: Measured) -> list[Compared]:
    """Return each measured time, in seconds unless said, beside the simulated one.

    The first two kinds were put in; how a short request and its answer fare beside a long prefill was not.
    """
    whole = EngineOptions(step_tokens=WHOLE_STEP_TOKENS, quiet_s=0)
    rows = [
        Compared(
            f"{num_tokens:,} tokens alone", alone_s, _alone_s(measured, whole, num_tokens), 0.02
        )
        for num_tokens, alone_s in measured.alone_s.items()
    ]
    beside = _beside(measured)
    return [
        *rows,
        Compared("500 tokens, idle engine", measured.short_idle_s, beside.idle_s, 0.02),
        Compared(
            "1M tokens, short ones beside, times alone",
            # against the prefill before it on the same machine: the times alone may be another machine's
            measured.long_beside_s / measured.long_alone_s,
            beside.long_s / measured.alone_s[measured.long_tokens],
            0.02,
        ),
        Compared(
            "500 tokens beside 1M, median", measured.short_beside_s, median(beside.short_s), 0.15
        ),
        Compared(
            "500 tokens beside 1M, slowest", measured.short_beside_max_s, max(beside.short_s), 0.15
        ),
        Compared(
            "a token of an answer beside 1M", measured.token_beside_s, median(beside.token_s), 0.1
        ),
    ]


def _alone_s(measured: Measured, options: EngineOptions, num_tokens: int) -> float:
    async def main(clock: Callable[[], float]) -> float:
        engine = SimulatedEngine("one", measured.speeds(), clock, options=options)
        running = asyncio.create_task(engine.run())
        request = engine.submit("long", SimulatedPrompt(num_tokens), "salt", 1)
        await request.has_first_token.wait()
        running.cancel()
        return clock()

    return run_virtual(main)


@dataclass(frozen=True)
class _Beside:
    idle_s: float
    long_s: float
    short_s: list[float]
    token_s: list[float]


def _beside(measured: Measured) -> _Beside:
    """Play the stage ``serving``."""

    async def main(clock: Callable[[], float]) -> _Beside:
        engine = SimulatedEngine("one", measured.speeds(), clock)
        running = asyncio.create_task(engine.run())

        async def short(name: str) -> tuple[float, float]:
            sent_at_s = clock()
            request = engine.submit(name, SimulatedPrompt(SHORT_TOKENS), "salt", ANSWER_TOKENS)
            await request.has_first_token.wait()
            first_at_s = clock()
            await request.is_done.wait()
            return first_at_s - sent_at_s, (clock() - first_at_s) / (ANSWER_TOKENS - 1)

        await short("first")
        idle_s, _ = await short("idle")
        began_at_s = clock()
        long = engine.submit("long", SimulatedPrompt(measured.long_tokens), "salt", 1)
        shorts = []
        for order in range(measured.num_arrivals):
            at_s = began_at_s + (order + 1) * measured.interval_s
            await asyncio.sleep(at_s - clock())
            shorts.append(asyncio.create_task(short(f"short {order}")))
        await long.has_first_token.wait()
        long_s = clock() - began_at_s
        times = [await each for each in shorts]
        running.cancel()
        return _Beside(idle_s, long_s, [each[0] for each in times], [each[1] for each in times])

    return run_virtual(main)
