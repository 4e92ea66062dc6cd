"""What must be nothing when nobody asks for anything any more."""

from __future__ import annotations

import asyncio
import re
import time
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from machine import usage
from soak.wire import ask

if TYPE_CHECKING:
    from soak.stack import Stack

MAX_RSS_GROWTH_FRAC = 0.2
MAX_RSS_GROWTH_MIB = 32.0
"""On top of it, for what is kept on purpose and bounded."""
MAX_REDIS_SOCKETS = 64
"""As ``state.max_connections``."""
_LISTENING = "0A"
_WRONG_LINES = re.compile(
    r"internal_error|Traceback|never retrieved|never awaited|was destroyed|settlements are lost"
)


@dataclass(frozen=True)
class Check:
    """One thing that is counted, and how many of it there may be."""

    name: str
    number: float
    most: float = 0

    @property
    def is_good(self) -> bool:
        """Whether nothing has leaked."""
        return self.number <= self.most


@dataclass(frozen=True)
class Look:
    """The process at one moment."""

    num_tasks: int
    num_threads: int
    rss_mib: float


async def metrics(stack: Stack) -> dict[str, float]:
    """Return the sums of the gateway's metrics; those of requests without the one that asks."""
    answer = await ask(stack.port, "GET", "/metrics", key="")
    sums: dict[str, float] = defaultdict(float)
    for line in answer.body.decode().splitlines():
        if line.startswith("sala_gateway_") and 'endpoint="/metrics"' not in line:
            name, _, value = line.rpartition(" ")
            sums[name.partition("{")[0].removeprefix("sala_gateway_")] += float(value)
    return dict(sums)


async def look(stack: Stack) -> Look:
    """Look at the gateway's process."""
    used = usage(stack.gateway.pid)
    num_tasks = int((await metrics(stack))["tasks"])
    return Look(num_tasks, used.num_threads, used.rss_mib)


async def checks(stack: Stack, idle: Look, warm: Look) -> list[Check]:
    """Count everything once.

    Args:
        stack: after the traffic.
        idle: the gateway before it.
        warm: the gateway in the middle of it.
    """
    sockets = Counter(_sockets(stack))
    told = await metrics(stack)
    now = await look(stack)
    running = (await stack.admin.get("/admin/v1/requests")).json()["data"]
    scheduler = (await stack.admin.get("/admin/v1/scheduler")).json()
    engine = (await stack.engine_client.get("/sala/progress")).json()
    most_rss_mib = warm.rss_mib * (1 + MAX_RSS_GROWTH_FRAC) + MAX_RSS_GROWTH_MIB
    log = stack.gateway.log.read_text(errors="replace")
    return [
        Check("requests in flight (metrics)", told.get("requests_in_flight", 0)),
        Check("running requests (admin API)", len(running)),
        Check("queued requests (admin API)", scheduler["num_queued"]),
        Check("requests in the ledger of engines", _sum(scheduler["engines"], "num_running")),
        Check("KV tokens promised in that ledger", _sum(scheduler["engines"], "kv_held_tokens")),
        Check("requests in the ledger of tenants", _sum(scheduler["tenants"], "num_running")),
        Check("requests in the engine", len(engine["requests"])),
        Check("tokens held in the engine", engine["kv"]["used_tokens"]),
        Check("reservations of the replica", told["limit_reservations"]),
        Check("settlements not confirmed", told["limit_unconfirmed_steps"]),
        *await _held_in_redis(stack),
        *await _jobs_in_redis(stack),
        Check("buffered bytes of bodies", told["buffered_bytes"]),
        Check("sockets of clients", sockets["client"]),
        Check("sockets to the engine", sockets["engine"]),
        Check("sockets to Redis", sockets["redis"], MAX_REDIS_SOCKETS),
        Check("tasks", now.num_tasks, idle.num_tasks),
        Check("threads", now.num_threads, max(warm.num_threads, idle.num_threads) + 8),
        Check("resident memory, MiB", round(now.rss_mib, 1), round(most_rss_mib, 1)),
        Check("lines of the log about failures of its own", len(_WRONG_LINES.findall(log))),
    ]


async def settled(stack: Stack, idle: Look, warm: Look, *, timeout_s: float) -> list[Check]:
    """Count again and again until all is nothing; return the last counts after ``timeout_s`` at most."""
    ends_at_s = time.monotonic() + timeout_s
    while True:
        found = await checks(stack, idle, warm)
        if all(check.is_good for check in found) or time.monotonic() > ends_at_s:
            return found
        await asyncio.sleep(0.25)


async def _held_in_redis(stack: Stack) -> list[Check]:
    redis, num_held, num_tokens, num_long = stack.redis, 0, 0, 0
    async for key in redis.scan_iter("sala:held:*", count=1000):
        entries = await cast("Any", redis.hvals(key))
        num_held += sum(entry != b"done" for entry in entries)
    async for key in redis.scan_iter("sala:limits:*", count=1000):
        flight, long = await cast("Any", redis.hmget(key, "flight", "long"))
        num_tokens, num_long = num_tokens + int(flight), num_long + int(long)
    return [
        Check("reservations in Redis", num_held),
        Check("tokens in flight in Redis", num_tokens),
        Check("long prefills in Redis", num_long),
    ]


async def _jobs_in_redis(stack: Stack) -> list[Check]:
    redis = stack.redis
    num_leases = num_waiting = num_specs = num_unfinished = 0
    for lane in ("response", "batch"):
        num_leases += await cast("Any", redis.zcard(f"sala:jobs:{lane}:leases"))
        num_waiting += await cast("Any", redis.zcard(f"sala:jobs:{lane}:delayed"))
        async for key in redis.scan_iter(f"sala:jobs:{lane}:ready:*"):
            num_waiting += await cast("Any", redis.llen(key))
    async for _ in redis.scan_iter("sala:job:*:spec", count=1000):
        num_specs += 1
    async for key in redis.scan_iter("sala:job:*", count=1000, _type="hash"):
        if key.count(b":") == 2:
            status = await cast("Any", redis.hget(key, "status"))
            num_unfinished += status in (b"queued", b"in_progress")
    return [
        Check("leases of jobs", num_leases),
        Check("jobs that wait", num_waiting),
        Check("bodies of jobs that are over", num_specs),
        Check("jobs without an end", num_unfinished),
    ]


def _sum(rows: list[dict[str, Any]], field: str) -> float:
    return float(sum(row[field] for row in rows))


def _sockets(stack: Stack) -> list[str]:
    """Return whom each socket of the gateway leads to: client, engine, redis or other."""
    pid = stack.gateway.pid
    inodes = set()
    for path in Path(f"/proc/{pid}/fd").iterdir():
        try:
            inodes.add(str(path.readlink()).removeprefix("socket:[").removesuffix("]"))
        except OSError:  # closed since
            continue
    found = []
    for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]:
        _, local, remote, state, *_, inode = line.split()[:10]
        if inode not in inodes or state == _LISTENING:
            continue
        local_port, remote_port = (int(each.partition(":")[2], 16) for each in (local, remote))
        found.append(
            {stack.engine_port: "engine", stack.redis_port: "redis"}.get(
                remote_port, "client" if local_port == stack.port else "other"
            )
        )
    return found
