"""The parts of one gateway, made together, run together and closed together."""

from __future__ import annotations

import asyncio
import os
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sala_serve.config import ConfigError
from sala_serve.engine.pool import EnginePool
from sala_serve.generation import Deadlines, Generations
from sala_serve.generation.shared import SharedAnswers
from sala_serve.jobs.adapter import GenerationEngines
from sala_serve.jobs.service import Jobs
from sala_serve.running import RunningRequests
from sala_serve.scheduling.scheduler import Scheduler
from sala_serve.state import State
from sala_serve.telemetry import Metrics, tracing_from_env
from sala_serve.tenants.keys import KeyRing
from sala_serve.tenants.limits import Limiter
from sala_serve.tenants.secret import ServerSecret
from sala_serve.tokens.counter import TokenCounter
from sala_serve.tokens.remote import CheckedTokenCounter, EngineTokenCounter
from sala_serve.uploads import Uploads

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from sala_serve.config import Settings
    from sala_serve.engine.monitor import EngineMonitor
    from sala_serve.engine.pool import Engine
    from sala_serve.telemetry import Tracing
    from sala_serve.tokens.prompt import PromptCounter


@dataclass(frozen=True)
class Gateway:
    """What endpoints share; they get it as an argument, since no module holds state."""

    settings: Settings
    clock: Callable[[], float]
    """Monotonic seconds."""
    metrics: Metrics
    tracing: Tracing
    state: State
    keys: KeyRing
    limiter: Limiter
    pool: EnginePool
    counter: PromptCounter
    own_counter: TokenCounter | None
    """Behind ``counter``, where there is a tokenizer."""
    scheduler: Scheduler[Engine]
    generations: Generations
    answers: SharedAnswers
    running: RunningRequests
    uploads: Uploads
    jobs: Jobs

    @classmethod
    def create(cls, settings: Settings, *, clock: Callable[[], float] = time.monotonic) -> Gateway:
        """Make the parts; nothing is connected yet.

        Raises:
            ConfigError: the settings do not fit together, or name a file that cannot be used.
        """
        metrics = Metrics(max_tenant_labels=settings.telemetry.max_tenant_labels, clock=clock)
        state = State.create(settings.state, clock=clock, metrics=metrics)
        try:
            secret = ServerSecret.load(settings.tenants, is_shared=not state.is_embedded)
            pool = EnginePool.create(settings.engines, metrics=metrics, clock=clock)
            own_counter, counter = _counters(settings, pool)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        limiter = Limiter(
            state,
            settings.limits,
            tier=settings.tenants.tier,
            clock=clock,
            metrics=metrics,
        )
        scheduler = Scheduler(
            pool, settings.scheduling, secret=secret.derive("cache-salt"), clock=clock
        )
        generations = Generations(
            pool,
            counter,
            limiter,
            scheduler,
            tenants=settings.tenants,
            long_prompt_tokens=settings.scheduling.long_prompt_tokens,
            progress_interval_s=settings.server.progress_interval_s,
            metrics=metrics,
            clock=clock,
        )
        uploads = Uploads(settings.server)
        metrics.at_scrape(lambda: metrics.set_buffered_bytes(uploads.num_buffered_bytes))
        keys = KeyRing(
            state,
            settings.tenants,
            secret=secret,
            static_keys=settings.server.api_keys.values,
            has_admin=settings.admin.token is not None,
            clock=clock,
        )
        tracing = tracing_from_env(os.environ)
        running = RunningRequests(settings.server.max_running_requests)
        engines = GenerationEngines(
            generations,
            counter,
            pool,
            keys,
            tenants=settings.tenants,
            bodies=settings.bodies,
            deadlines=Deadlines(**settings.deadlines.model_dump()),
            running=running,
            settings=settings.jobs,
            metrics=metrics,
            tracing=tracing,
            clock=clock,
        )
        return cls(
            settings=settings,
            clock=clock,
            metrics=metrics,
            tracing=tracing,
            state=state,
            keys=keys,
            limiter=limiter,
            pool=pool,
            counter=counter,
            own_counter=own_counter,
            scheduler=scheduler,
            generations=generations,
            answers=SharedAnswers(generations, retry_grace_s=settings.server.retry_grace_s),
            running=running,
            uploads=uploads,
            jobs=Jobs(
                settings.jobs,
                state=state,
                engines=engines,
                bodies=settings.bodies,
                max_line_bytes=settings.server.max_body_bytes,
                metrics=metrics,
                clock=clock,
            ),
        )

    @property
    def monitor(self) -> EngineMonitor:
        """Of the first engine, which is the only one where the gateway runs it itself."""
        return next(iter(self.pool.engines.values())).monitor

    @asynccontextmanager
    async def run(self) -> AsyncIterator[None]:
        """Do what goes on beside the requests for the length of the block, then close all connections."""
        try:
            async with asyncio.TaskGroup() as group:
                works = [each.run() for each in (self.state, self.limiter, self.pool, self.answers)]
                if isinstance(self.counter, CheckedTokenCounter):
                    works.append(self.counter.run())
                tasks = [group.create_task(work) for work in works]
                jobs = group.create_task(self.jobs.run())
                try:
                    yield
                finally:
                    jobs.cancel()  # first, since what still runs is handed back
                    await asyncio.wait({jobs})
                    for task in tasks:
                        task.cancel()
        finally:
            await self.limiter.close()
            await self.state.close()
            self.uploads.close()
            if self.own_counter is not None:
                self.own_counter.close()
            await asyncio.to_thread(self.tracing.shutdown)


def _counters(settings: Settings, pool: EnginePool) -> tuple[TokenCounter | None, PromptCounter]:
    tokens, engine_counter = settings.tokens, EngineTokenCounter(pool)
    if tokens.tokenizer is None:
        return None, engine_counter
    own = TokenCounter.load(tokens.tokenizer, num_threads=tokens.num_threads)
    return own, CheckedTokenCounter(own, engine_counter, pool)
