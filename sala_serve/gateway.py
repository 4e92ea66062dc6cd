"""The parts of one gateway, made together and closed together."""

from __future__ import annotations

import asyncio
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sala_serve.engine.http import HttpEngine, engine_client
from sala_serve.engine.monitor import EngineMonitor
from sala_serve.running import RunningRequests
from sala_serve.telemetry import Metrics

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    import httpx

    from sala_serve.config import Settings


@dataclass(frozen=True)
class Gateway:
    """What endpoints share; they get it as an argument, since no module holds state."""

    settings: Settings
    clock: Callable[[], float]
    """Monotonic seconds."""
    engine: HttpEngine
    monitor: EngineMonitor
    running: RunningRequests
    metrics: Metrics
    clients: tuple[httpx.AsyncClient, ...]

    @classmethod
    def create(cls, settings: Settings, *, clock: Callable[[], float] = time.monotonic) -> Gateway:
        """Make the parts; nothing is connected yet."""
        # probes have a client of their own, so that no request can hold them up
        engine = settings.engines[0]
        request_client, probe_client = engine_client(engine), engine_client(engine)
        metrics = Metrics()
        monitor = EngineMonitor(
            probe_client,
            metrics=metrics,
            probe_interval_s=engine.probe_interval_s,
            stuck_after_s=engine.stuck_after_s,
            clock=clock,
        )
        return cls(
            settings=settings,
            clock=clock,
            engine=HttpEngine(request_client),
            monitor=monitor,
            running=RunningRequests(settings.server.max_running_requests),
            metrics=metrics,
            clients=(request_client, probe_client),
        )

    @asynccontextmanager
    async def run(self) -> AsyncIterator[None]:
        """Watch the engine for the length of the block, then close all connections."""
        try:
            async with asyncio.TaskGroup() as group:
                monitoring = group.create_task(self.monitor.run())
                yield
                monitoring.cancel()
        finally:
            for client in self.clients:
                await client.aclose()
