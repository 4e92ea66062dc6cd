"""The scenes that are played, and what is taken down of each."""

from __future__ import annotations

import asyncio
import random
from dataclasses import asdict, dataclass, field
from statistics import quantiles
from typing import TYPE_CHECKING, Any

from fairness.engine import EngineOptions
from fairness.play import Play
from fairness.virtual_time import run_virtual
from sala_serve.scheduling.settings import SchedulingSettings

if TYPE_CHECKING:
    from collections.abc import Callable

    from fairness.speeds import Speeds

MILLION = 1_048_576
SHORT_TOKENS = 500
ANSWER_TOKENS = 128


@dataclass(frozen=True)
class Rule:
    """Who decides what goes first."""

    settings: SchedulingSettings = field(default_factory=SchedulingSettings)
    options: EngineOptions = field(default_factory=EngineOptions)


OPEN = {"max_queued_requests": 1_000_000, "max_queued_tokens": 1 << 50}
RULES = {
    "fair": Rule(),
    # a long prefill runs to its end, whoever waits
    "no give way": Rule(SchedulingSettings(give_way_tokens=None)),
    # first come, first served; the engine's own scheduler as with fairness on
    "arrival": Rule(SchedulingSettings(order="arrival", **OPEN)),
    # no gateway: everything goes to an engine with vLLM's own scheduler
    "vllm": Rule(
        SchedulingSettings(
            order="arrival", max_long_prefills=1000, max_prefill_ahead_tokens=1 << 40, **OPEN
        ),
        EngineOptions(has_long_rule=False),
    ),
}


@dataclass(frozen=True)
class Scene:
    """Who sends what."""

    duration_s: float = 1800.0
    """Virtual seconds, warm-up included."""
    warm_up_s: float = 120.0
    """At the beginning, of which nothing is taken down."""
    short_tenants: int = 2
    short_per_s: float = 0.125
    """Of each of them, at random moments (Poisson): 500 tokens, answers of 128."""
    flood: tuple[int, ...] = (8,)
    """For each tenant that floods: how many of its million-token prompts are under way at any time."""
    seed: int = 0


@dataclass(frozen=True)
class Result:
    """What was taken down."""

    ttft_s: tuple[float, ...]
    """Of short requests, also of those that had none at the end: as long as they had waited then."""
    num_unanswered: int
    flood_tokens_per_s: tuple[float, ...]
    """Prompt tokens computed for each tenant that floods."""
    gap_tokens: float
    """The largest service gap between two tenants that both waited."""
    gap_bound_tokens: float
    num_gave_way: int

    def ttft(self) -> dict[str, float]:
        """Return percentiles of the time to first token, in seconds."""
        if len(self.ttft_s) < 2:
            return {}
        cuts = quantiles(self.ttft_s, n=100, method="inclusive")
        return {
            "median": cuts[49],
            "p10": cuts[9],
            "p90": cuts[89],
            "p99": cuts[98],
            "max": max(self.ttft_s),
        }

    def document(self) -> dict[str, Any]:
        """Return it for a results file: percentiles instead of every time."""
        rounded = {name: round(value, 4) for name, value in self.ttft().items()}
        rates = [round(each, 1) for each in self.flood_tokens_per_s]
        return asdict(self) | {
            "ttft_s": rounded,
            "num_short": len(self.ttft_s),
            "flood_tokens_per_s": rates,
        }


def play(scene: Scene, rule: Rule, speeds: Speeds) -> Result:
    """Play one scene under one rule."""
    return run_virtual(lambda clock: _play(clock, scene, rule, speeds))


async def _play(clock: Callable[[], float], scene: Scene, rule: Rule, speeds: Speeds) -> Result:
    floods = [f"flood-{idx}" for idx in range(len(scene.flood))]

    async def ask(tenant_id: str) -> None:
        # of its own, so that the moments are the same under every rule
        moments = random.Random(f"{scene.seed} {tenant_id}")
        while True:
            await asyncio.sleep(moments.expovariate(scene.short_per_s))
            stage.send(stage.work(tenant_id, SHORT_TOKENS, ANSWER_TOKENS))

    async def flood(tenant_id: str) -> None:
        while True:
            await stage.send(stage.work(tenant_id, MILLION, ANSWER_TOKENS))

    def computed() -> list[int]:
        (engine,) = stage.engines
        salts = [stage.scheduler.salt(stage.work(each, 1)) for each in floods]
        return [engine.prefilled[salt] for salt in salts]

    async with Play(clock, speeds, rule.settings, options=rule.options, seed=scene.seed) as stage:
        for idx in range(scene.short_tenants if scene.short_per_s else 0):
            stage.run(ask(f"short-{idx}"))
        for tenant_id, together in zip(floods, scene.flood, strict=True):
            for _ in range(together):
                stage.run(flood(tenant_id))
        await asyncio.sleep(scene.warm_up_s)
        before = computed()
        await asyncio.sleep(scene.duration_s - scene.warm_up_s)
        taken_s, snapshot = clock() - scene.warm_up_s, stage.scheduler.snapshot()
        shorts = [
            each
            for each in stage.outcomes
            if each.work.tenant_id.startswith("short") and each.work.arrived_at_s >= scene.warm_up_s
        ]
        return Result(
            ttft_s=tuple(
                clock() - each.work.arrived_at_s if each.first_token_at_s is None else each.ttft_s
                for each in shorts
            ),
            num_unanswered=sum(each.first_token_at_s is None for each in shorts),
            flood_tokens_per_s=tuple(
                (now - then) / taken_s for now, then in zip(computed(), before, strict=True)
            ),
            gap_tokens=snapshot.service_gap_tokens,
            gap_bound_tokens=snapshot.service_gap_bound_tokens,
            num_gave_way=snapshot.num_gave_way,
        )
