"""Requests played against the scheduler and simulated engines, in virtual time."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from fairness.engine import (
    EngineOptions,
    Facts,
    SimulatedEngine,
    SimulatedPool,
    SimulatedPrompt,
)
from sala_serve.scheduling.scheduler import Scheduler
from sala_serve.scheduling.settings import SchedulingSettings
from sala_serve.scheduling.work import Work
from sala_serve.tokens.prompt import PREFIX_BLOCK_TOKENS

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from types import TracebackType

    from fairness.speeds import Speeds
    from sala_serve.scheduling.work import Waiting

T = TypeVar("T")

POLL_S = 0.5
"""Between two looks at an engine's progress."""


@dataclass
class Outcome:
    """What a request met."""

    work: Work
    told: list[tuple[float, Waiting]] = field(default_factory=list)
    """What it was told while it waited, and when."""
    started_at_s: float | None = None
    first_token_at_s: float | None = None
    ended_at_s: float | None = None
    predicted_cached_tokens: int = 0
    cached_tokens: int = 0
    num_gave_way: int = 0

    @property
    def ttft_s(self) -> float:
        """Arrival to first token."""
        assert self.first_token_at_s is not None
        return self.first_token_at_s - self.work.arrived_at_s


async def serve(
    scheduler: Scheduler[SimulatedEngine],
    outcome: Outcome,
    output_tokens: int,
    clock: Callable[[], float],
    *,
    poll_s: float = POLL_S,
) -> Outcome:
    """Do with a request what the gateway does: wait for its turn, send it, report how it goes."""
    work = outcome.work
    while True:
        async with scheduler.turn(
            work, lambda waiting: outcome.told.append((clock(), waiting))
        ) as turn:
            if outcome.started_at_s is None:
                outcome.started_at_s = clock()
                outcome.predicted_cached_tokens = turn.predicted_cached_tokens
            engine = turn.engine
            prompt = SimulatedPrompt(work.prompt.num_tokens, work.prompt.block_hashes)
            request = engine.submit(
                work.request_id, prompt, turn.cache_salt, output_tokens, turn.vllm_priority
            )
            try:
                for event in (request.has_first_token, request.is_done):
                    while not event.is_set() and not turn.must_give_way:
                        try:
                            async with asyncio.timeout(poll_s):
                                await event.wait()
                        except TimeoutError:
                            turn.prefill_progress(request)
                    if turn.must_give_way:
                        break
                    if outcome.first_token_at_s is None:
                        outcome.first_token_at_s = clock()
                        turn.first_token()
            finally:
                engine.close(work.request_id)
            if turn.must_give_way:
                outcome.num_gave_way += 1
                continue
            turn.finished(request.usage)
            outcome.ended_at_s = clock()
            outcome.cached_tokens = request.num_cached_tokens
            return outcome


@dataclass(frozen=True)
class PlayedTier:
    """See :class:`sala_serve.scheduling.work.TierView`."""

    weight: float = 1.0
    priority: int = 0
    name: str = "default"


class Play:
    """One run: engines, a scheduler before them, and requests; used as a block, at whose end all are cut.

    Attributes:
        scheduler: that of production.
        engines: simulated.
        outcomes: of all requests, in the order in which they were sent.
    """

    def __init__(
        self,
        clock: Callable[[], float],
        speeds: Speeds,
        settings: SchedulingSettings | None = None,
        *,
        num_engines: int = 1,
        facts: Facts | None = None,
        options: EngineOptions | None = None,
        poll_s: float = POLL_S,
        seed: int = 0,
    ) -> None:
        self.clock = clock
        self.random = random.Random(seed)
        self.engines = [
            SimulatedEngine(f"engine-{idx}", speeds, clock, facts=facts, options=options)
            for idx in range(num_engines)
        ]
        self.scheduler = Scheduler(
            SimulatedPool(self.engines),
            settings or SchedulingSettings(),
            secret=b"simulated",
            clock=clock,
        )
        self.outcomes: list[Outcome] = []
        self._poll_s = poll_s
        self._group = asyncio.TaskGroup()
        self._tasks: list[asyncio.Task[object]] = []

    async def __aenter__(self) -> Play:
        await self._group.__aenter__()
        for engine in self.engines:
            self.run(engine.run())
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for task in self._tasks:
            task.cancel()
        await self._group.__aexit__(kind, error, trace)

    def run(self, doing: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Let something go on until the end of the block."""
        task = self._group.create_task(doing)
        self._tasks.append(task)
        return task

    def blocks(self, num_tokens: int) -> tuple[bytes, ...]:
        """Return the hashes of a text that no other prompt has."""
        return tuple(self.random.randbytes(16) for _ in range(num_tokens // PREFIX_BLOCK_TOKENS))

    def work(
        self,
        tenant_id: str,
        num_tokens: int,
        output_tokens: int = 16,
        *,
        weight: float = 1.0,
        prefix: tuple[bytes, ...] = (),
        deadline_s: float | None = None,
        pin_key: str | None = None,
    ) -> Work:
        """Return a request whose prompt begins with ``prefix`` and goes on like no other."""
        blocks = prefix + self.blocks(num_tokens - len(prefix) * PREFIX_BLOCK_TOKENS)
        return Work(
            request_id=f"{tenant_id}-{self.random.getrandbits(64):x}",
            tenant_id=tenant_id,
            tier=PlayedTier(weight),
            prompt=SimulatedPrompt(num_tokens, blocks),
            output_tokens=output_tokens,
            model="any",
            arrived_at_s=self.clock(),
            deadline_s=deadline_s,
            pin_key=pin_key,
        )

    def send(self, work: Work) -> asyncio.Task[Outcome]:
        """Send a request; the answer is as long as it may be."""
        outcome = Outcome(work)
        self.outcomes.append(outcome)
        return self.run(
            serve(self.scheduler, outcome, work.output_tokens, self.clock, poll_s=self._poll_s)
        )
