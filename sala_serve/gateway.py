"""The parts of one gateway, made together and closed together."""

from __future__ import annotations

import asyncio
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sala_serve.engine.http import HttpEngine, engine_client
from sala_serve.engine.monitor import EngineMonitor
from sala_serve.engine.settings import EngineSettings
from sala_serve.running import RunningRequests
from sala_serve.telemetry import Metrics

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    import httpx

    from sala_serve.config import GatewayConfig


@dataclass(frozen=True)
class Gateway:
    """What endpoints share; they get it as an argument, since no module holds state."""

    config: GatewayConfig
    clock: Callable[[], float]
    """Monotonic seconds."""
    engine: HttpEngine
    monitor: EngineMonitor
    running: RunningRequests
    metrics: Metrics
    clients: tuple[httpx.AsyncClient, ...]

    @classmethod
    def create(
        cls, config: GatewayConfig, *, clock: Callable[[], float] = time.monotonic
    ) -> Gateway:
        """Make the parts; nothing is connected yet."""
        # probes have a client of their own, so that no request can hold them up
        settings = EngineSettings(
            url=config.engine_url,
            socket=config.engine_socket,
            connect_timeout_s=config.engine_connect_timeout_s,
            write_timeout_s=config.engine_write_timeout_s,
            read_timeout_s=config.engine_read_timeout_s,
        )
        request_client, probe_client = engine_client(settings), engine_client(settings)
        metrics = Metrics()
        monitor = EngineMonitor(
            probe_client,
            metrics=metrics,
            probe_interval_s=config.probe_interval_s,
            stuck_after_s=config.stuck_after_s,
            clock=clock,
        )
        return cls(
            config=config,
            clock=clock,
            engine=HttpEngine(request_client),
            monitor=monitor,
            running=RunningRequests(config.max_running_requests),
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
