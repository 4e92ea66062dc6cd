from __future__ import annotations

import asyncio
import socket
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import httpx
import pytest
from openai import AsyncOpenAI

from sala_serve.app import build_app
from sala_serve.config import GatewayConfig
from sala_serve.engine.fake import Behaviour, FakeEngine
from sala_serve.gateway import Gateway
from sala_serve.serving import GatewayServer, bind

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from contextlib import AbstractAsyncContextManager

    from starlette.types import ASGIApp


@dataclass(frozen=True)
class Stack:
    """A gateway in front of a fake engine, both listening, and clients of it."""

    engine: FakeEngine
    gateway: Gateway
    url: str
    client: AsyncOpenAI
    http: httpx.AsyncClient

    async def metric(self, name: str, **labels: str) -> float:
        """Scrape one value; 0 if the series does not exist yet."""
        text = (await self.http.get("/metrics")).text
        wanted = name + (
            "{" + ",".join(f'{key}="{value}"' for key, value in labels.items()) + "}"
            if labels
            else ""
        )
        values = [line.split()[-1] for line in text.splitlines() if line.split(" ")[0] == wanted]
        return float(values[0]) if values else 0.0


class StartStack(Protocol):
    def __call__(
        self, behaviour: Behaviour | None = None, **config: Any
    ) -> AbstractAsyncContextManager[Stack]: ...


@asynccontextmanager
async def _listen(app: ASGIApp) -> AsyncIterator[str]:
    listener = bind("127.0.0.1", 0)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    server = GatewayServer(app)
    async with asyncio.TaskGroup() as group:
        group.create_task(server.serve(sockets=[listener]))
        while not server.started:
            await asyncio.sleep(0.005)
        try:
            yield url
        finally:
            server.should_exit = True
            server.force_exit = False


@asynccontextmanager
async def _start_stack(behaviour: Behaviour | None = None, **config: Any) -> AsyncIterator[Stack]:
    engine = FakeEngine(behaviour)
    async with _listen(engine.app) as engine_url:
        gateway = Gateway.create(
            GatewayConfig(engine_url=engine_url, probe_interval_s=0.02, **config)
        )
        async with (
            _listen(build_app(gateway)) as url,
            httpx.AsyncClient(base_url=url, timeout=10) as http,
            AsyncOpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client,
        ):
            if engine.behaviour.health_status == 200:
                async with asyncio.timeout(5):
                    await gateway.monitor.wait_ready()
            try:
                yield Stack(engine, gateway, url, client, http)
            finally:
                gateway.running.cut_all()


@pytest.fixture
def start_stack() -> StartStack:
    """A function that starts a stack with a given engine behaviour and gateway settings."""
    return _start_stack


@pytest.fixture
async def stack() -> AsyncIterator[Stack]:
    """A stack with default settings."""
    async with _start_stack() as stack:
        yield stack


@pytest.fixture
def eventually() -> Callable[[Callable[[], object]], Any]:
    """Wait until a condition holds, five seconds at most."""

    async def wait(condition: Callable[[], object]) -> None:
        async with asyncio.timeout(5):
            while not condition():
                await asyncio.sleep(0.01)

    return wait


@pytest.fixture
def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])
