from __future__ import annotations

import time
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import httpx
import pytest
from pydantic import SecretStr

from sala_serve.api.admin.app import admin_app
from sala_serve.config import Settings
from sala_serve.scheduling.snapshot import SchedulerSnapshot
from sala_serve.tenants.keys import KeyRing
from sala_serve.tenants.limits import Limiter
from sala_serve.tenants.secret import ServerSecret
from sala_serve.tenants.settings import TierSection

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from contextlib import AbstractAsyncContextManager

    from sala_serve.state import State
    from sala_serve.telemetry import RequestRecord

TOKEN = "the admin token of the tests"
HEADERS = {"Authorization": f"Bearer {TOKEN}"}
IDLE = SchedulerSnapshot(0, 0, 0, None, (), (), 0.0, 0.0, 0.0, 0, 0)


@dataclass
class Running:
    record: RequestRecord | None


@dataclass
class Requests:
    """Running requests that are there until they are cancelled."""

    running: list[Running] = field(default_factory=list)

    def snapshot(self) -> list[Running]:
        return list(self.running)

    def cancel(self, request_id: str) -> bool:
        before = len(self.running)
        self.running = [
            each
            for each in self.running
            if each.record is None or each.record.request_id != request_id
        ]
        return len(self.running) < before


class Scheduler:
    def snapshot(self) -> SchedulerSnapshot:
        return IDLE


@dataclass
class Replica:
    """What of a gateway the admin port is about; keys and limits are real."""

    settings: Settings
    keys: KeyRing
    limiter: Limiter
    clock: Callable[[], float] = time.monotonic
    running: Requests = field(default_factory=Requests)
    scheduler: Scheduler = field(default_factory=Scheduler)


def _make_replica(state: State) -> Replica:
    tenants = {"tiers": {"default": TierSection(), "gold": TierSection(weight=4)}}
    settings = Settings(admin={"token": SecretStr(TOKEN)}, tenants=tenants)
    return Replica(
        settings,
        KeyRing(
            state,
            settings.tenants,
            secret=ServerSecret(b"a server secret of the tests"),
            has_admin=True,
        ),
        Limiter(state, settings.limits, tier=settings.tenants.tier, clock=time.monotonic),
    )


@asynccontextmanager
async def _client_of(replica: Replica, page=(), **headers: str) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(admin_app(replica, page))
    async with httpx.AsyncClient(
        transport=transport, base_url="http://admin", headers={**HEADERS, **headers}
    ) as client:
        yield client


@pytest.fixture
def replica(state: State) -> Replica:
    return _make_replica(state)


@pytest.fixture
async def admin(replica: Replica) -> AsyncIterator[httpx.AsyncClient]:
    """A client with the admin token, of an admin port over each of the two stores."""
    async with _client_of(replica) as client:
        yield client


@pytest.fixture(scope="session")
def token() -> str:
    return TOKEN


@pytest.fixture(scope="session")
def headers() -> dict[str, str]:
    """What lets a request in."""
    return HEADERS


@pytest.fixture(scope="session")
def make_replica() -> Callable[[State], Replica]:
    """A function that makes a replica over a state."""
    return _make_replica


@pytest.fixture(scope="session")
def client_of() -> Callable[..., AbstractAsyncContextManager[httpx.AsyncClient]]:
    """A function that opens a client of a replica's admin port; takes routes of a page, and headers."""
    return _client_of
