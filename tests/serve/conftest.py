from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
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
    import socket
    from collections.abc import AsyncIterator, Callable, Iterator
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


class _Server(GatewayServer):
    """Stops when told to rather than at its next look at the clock."""

    def __init__(self, app: ASGIApp) -> None:
        super().__init__(app)
        self.stop = asyncio.Event()

    async def main_loop(self) -> None:
        await self.on_tick(0)
        await self.stop.wait()


@asynccontextmanager
async def _serve(apps: dict[socket.socket, ASGIApp]) -> AsyncIterator[None]:
    """Serve an application on each listening socket; the last stops first."""
    servers = [_Server(app) for app in apps.values()]
    async with asyncio.TaskGroup() as group:
        serving = [
            group.create_task(server.serve(sockets=[listener]))
            for server, listener in zip(servers, apps, strict=True)
        ]
        while not all(server.started for server in servers):  # noqa: ASYNC110 - uvicorn has no event
            await asyncio.sleep(0.002)
        try:
            yield
        finally:
            # one after the other: a probe that reaches an engine which stops would find nobody to close
            # it. Waited for also after a failure, which would cancel them with their connections open
            for server, task in reversed(list(zip(servers, serving, strict=True))):
                server.stop.set()
                await asyncio.wait({task})
                for _ in range(
                    10
                ):  # the loop takes a few rounds to make and close a new connection
                    await asyncio.sleep(0)


@asynccontextmanager
async def _start_stack(behaviour: Behaviour | None = None, **config: Any) -> AsyncIterator[Stack]:
    engine = FakeEngine(behaviour)
    engine_listener, listener = bind("127.0.0.1", 0), bind("127.0.0.1", 0)
    engine_url, url = (
        f"http://127.0.0.1:{each.getsockname()[1]}" for each in (engine_listener, listener)
    )
    config = {"engine_url": engine_url, "probe_interval_s": 0.02, **config}
    gateway = Gateway.create(GatewayConfig(**config))
    async with (
        _serve({engine_listener: engine.app, listener: build_app(gateway)}),
        httpx.AsyncClient(base_url=url, timeout=10, verify=False) as http,
        AsyncOpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0, http_client=http) as client,
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
    """Wait until a condition holds, twenty seconds at most: the machine may be busy."""

    async def wait(condition: Callable[[], object]) -> None:
        async with asyncio.timeout(20):
            while not condition():  # noqa: ASYNC110 - often about another process
                await asyncio.sleep(0.01)

    return wait


@pytest.fixture
async def fake_engine() -> AsyncIterator[tuple[FakeEngine, str]]:
    """A fake engine alone, and its URL."""
    engine = FakeEngine()
    listener = bind("127.0.0.1", 0)
    async with _serve({listener: engine.app}):
        yield engine, f"http://127.0.0.1:{listener.getsockname()[1]}"


class Stub:
    """The stand-in for vLLM's command line, installed as a package of that name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        package = folder / "packages" / "vllm" / "entrypoints" / "cli"
        package.mkdir(parents=True)
        for each in (package, package.parent, package.parent.parent):
            (each / "__init__.py").touch()
        shutil.copy(Path(__file__).parent / "engine" / "stub_vllm.py", package / "main.py")
        self.checkpoint = folder / "checkpoint"
        self.checkpoint.mkdir()
        (self.checkpoint / "config.json").write_text(json.dumps(CONFIG))

    def env(self, mode: str) -> dict[str, str]:
        """Environment in which the stub is found and behaves as ``mode`` says."""
        return {
            **{key: value for key, value in os.environ.items() if not key.startswith("SALA_")},
            "TMPDIR": str(self.folder),
            "PYTHONPATH": str(self.folder / "packages"),
            "STUB_MODE": mode,
            "STUB_PIDS": str(self.folder / "pids"),
        }

    def pids(self) -> list[int]:
        """Every process that a stub has been or has started."""
        path = self.folder / "pids"
        return [int(pid) for pid in path.read_text().split()] if path.exists() else []

    def alive(self) -> list[int]:
        """Those of :meth:`pids` that still run; zombies do not."""
        return [pid for pid in self.pids() if _runs(pid)]


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


CONFIG = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "mixer_types": ["minicpm4", "lightning-attn"],
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "scale_emb": 12,
    "scale_depth": 1.4,
    "dim_model_base": 64,
    "max_position_embeddings": 4096,
    "sparse_config": {"topk": 8, "window_size": 128, "dense_len": 512},
}


@pytest.fixture
def stub(tmp_path: Path) -> Iterator[Stub]:
    """vLLM's command line, replaced; leaves no process behind even if a test fails."""
    stub = Stub(tmp_path)
    yield stub
    for pid in stub.alive():
        os.kill(pid, signal.SIGKILL)
