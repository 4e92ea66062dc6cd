"""Everything durable of one gateway: what its endpoints call, and the workers beside them."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from sala_serve.bodies import DEFAULT_BOUNDS
from sala_serve.errors import StateUnavailable
from sala_serve.jobs.batch_runner import BatchRunner
from sala_serve.jobs.batch_work import LineRunner
from sala_serve.jobs.batches import Batches
from sala_serve.jobs.files import Files
from sala_serve.jobs.responses import ResponseRunner, Responses
from sala_serve.jobs.store import JobStore
from sala_serve.jobs.worker import Workers
from sala_serve.telemetry import Metrics

if TYPE_CHECKING:
    from collections.abc import Callable

    from sala_serve.bodies import BodySettings
    from sala_serve.jobs.model import Lane
    from sala_serve.jobs.running import Engines
    from sala_serve.jobs.settings import JobsSettings
    from sala_serve.state import State

LANES: tuple[Lane, ...] = ("response", "batch")
_COUNT_INTERVAL_S = 5.0


class Jobs:
    """Responses, files and batches of one replica."""

    def __init__(
        self,
        settings: JobsSettings,
        *,
        state: State,
        engines: Engines,
        bodies: BodySettings = DEFAULT_BOUNDS,
        max_line_bytes: int = 2**20,
        metrics: Metrics | None = None,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._state = state
        self._metrics = metrics or Metrics()
        self._is_cut = asyncio.Event()
        self.store = JobStore(state, settings)
        self.responses = Responses(self.store, engines, wall_clock=wall_clock)
        self.files = Files(state, settings, wall_clock=wall_clock)
        self.batches = Batches(self.store, self.files, wall_clock=wall_clock)
        response_runner = ResponseRunner(self.store, engines, clock=clock, wall_clock=wall_clock)
        batch_runner = BatchRunner(
            self.store,
            self.files,
            LineRunner(engines, self.responses, settings),
            state=state,
            bounds=bodies,
            max_line_bytes=max_line_bytes,
            wall_clock=wall_clock,
        )
        self._workers = (
            Workers(
                self.store,
                "response",
                response_runner,
                max_running=settings.max_running_responses,
                clock=clock,
            ),
            Workers(
                self.store,
                "batch",
                batch_runner,
                max_running=settings.max_running_batches,
                clock=clock,
            ),
        )

    async def run(self) -> None:
        """Run jobs until cancelled; what then still runs is handed back to the queue."""
        async with asyncio.TaskGroup() as group:
            for workers in self._workers:
                group.create_task(workers.run())
            group.create_task(self._count())

    async def drain(self) -> None:
        """Take no more jobs, wait for those that an engine works on; cancelling :meth:`run` hands them back."""
        for workers in self._workers:
            # where nobody is there to take them, they are seen to their end
            workers.drain(hands_back=not self._state.is_embedded)
        async with asyncio.TaskGroup() as group:
            ends = {group.create_task(self._wait_idle()), group.create_task(self._is_cut.wait())}
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            for each in ends:
                each.cancel()

    def cut(self) -> None:
        """End :meth:`drain` now."""
        self._is_cut.set()

    @property
    def num_running(self) -> int:
        """Jobs that this replica works on."""
        return sum(len(workers) for workers in self._workers)

    async def _wait_idle(self) -> None:
        for workers in self._workers:
            await workers.wait_idle()

    async def _count(self) -> None:
        """Keep the metric of jobs; what it says is of all replicas."""
        while True:
            counts: dict[tuple[str, str], int] = {}
            try:
                for lane in LANES:
                    found = await self.store.counts(lane)
                    counts |= {(lane, status): number for status, number in found.items()}
                self._metrics.set_jobs(counts)
            except StateUnavailable:
                self._metrics.set_jobs({})  # nothing rather than what is no longer true
            await asyncio.sleep(_COUNT_INTERVAL_S)
