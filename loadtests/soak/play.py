"""One soak from start to end."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from soak.books import Check, look, settled
from soak.stack import started
from soak.traffic import Traffic

if TYPE_CHECKING:
    from pathlib import Path

    from soak.stack import Stack

WARM_AT_FRAC, ENGINE_AWAY_AT_FRAC, REDIS_AWAY_AT_FRAC = 0.3, 0.4, 0.65
"""Of the duration."""
MAX_STOP_S = 30.0
"""Between SIGTERM and the gateway's end, when nothing runs any more."""


@dataclass(frozen=True)
class Result:
    """What became of it."""

    duration_s: float
    checks: list[Check]
    outcomes: dict[str, dict[str, int]]
    """By kind of client: how often it ended how."""
    away_s: dict[str, float] = field(default_factory=dict)
    """How long the engine and Redis were not there."""
    settle_s: float = 0.0
    """From the last client's end until all was counted as nothing."""
    rss_mib: dict[str, float] = field(default_factory=dict)
    """Idle before, warm, at the end."""

    @property
    def is_good(self) -> bool:
        """Whether nothing leaked and nothing went wrong."""
        return all(check.is_good for check in self.checks)

    @property
    def num_requests(self) -> int:
        """All that were sent, as their clients see it."""
        return sum(sum(each.values()) for each in self.outcomes.values())


async def play(
    folder: Path,
    *,
    duration_s: float,
    num_clients: int,
    seed: int,
    away_s: float = 2.0,
    settle_timeout_s: float = 60.0,
) -> Result:
    """Start everything in ``folder``, send traffic, restart engine and Redis, and count what is left.

    Args:
        folder: empty; takes logs and what Redis stores.
        duration_s: of the traffic.
        num_clients: at work at the same time.
        seed: of all that is random.
        away_s: how long engine and Redis are away, each once.
        settle_timeout_s: how long the gateway may take to come to rest.
    """
    async with started(folder) as stack:
        idle = await look(stack)
        traffic = Traffic(stack, seed=seed)
        async with asyncio.TaskGroup() as group:
            group.create_task(traffic.run(num_clients=num_clients, duration_s=duration_s))
            start_s = time.monotonic()
            await _sleep_until(start_s + WARM_AT_FRAC * duration_s)
            warm = await look(stack)
            await _sleep_until(start_s + ENGINE_AWAY_AT_FRAC * duration_s)
            away = {"engine": await _timed(stack.restart_engine(away_s))}
            await _sleep_until(start_s + REDIS_AWAY_AT_FRAC * duration_s)
            away["Redis"] = await _timed(stack.restart_redis(away_s))
        ended_s = time.monotonic()
        found = await settled(stack, idle, warm, timeout_s=settle_timeout_s)
        settle_s = time.monotonic() - ended_s
        end = await look(stack)
        found += [
            Check("answers that none may get", traffic.num_bad),
            Check("kinds of clients that were not played", traffic.num_kinds - _num_kinds(traffic)),
            Check("status at its end", await _stop(stack)),
        ]
    return Result(
        duration_s=duration_s,
        checks=found,
        outcomes=_by_kind(traffic),
        away_s={name: round(each, 1) for name, each in away.items()},
        settle_s=round(settle_s, 1),
        rss_mib={
            name: round(each.rss_mib, 1)
            for name, each in (("idle", idle), ("warm", warm), ("end", end))
        },
    )


async def _stop(stack: Stack) -> int:
    status = await asyncio.to_thread(stack.gateway.stop, MAX_STOP_S)
    return 1 if status is None else abs(status)


async def _timed(work: object) -> float:
    start_s = time.monotonic()
    await work  # type: ignore[misc]
    return time.monotonic() - start_s


async def _sleep_until(at_s: float) -> None:
    await asyncio.sleep(max(0.0, at_s - time.monotonic()))


def _num_kinds(traffic: Traffic) -> int:
    return len({kind for kind, _ in traffic.outcomes})


def _by_kind(traffic: Traffic) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for (kind, outcome), number in sorted(traffic.outcomes.items()):
        found.setdefault(kind, {})[outcome] = number
    return found
