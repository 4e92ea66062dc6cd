"""A stand-in for the engines as jobs see them: what it says, how long it waits and how it fails is set."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import pytest
from openai import AsyncOpenAI
from pydantic import SecretStr

from sala_serve.errors import ModelNotFound
from sala_serve.jobs.running import EngineRequest, Progress
from sala_serve.tenants.model import Limits, Principal, Scopes, Tenant

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping

QUICK = {"heartbeat_s": 0.05, "poll_s": 0.05, "backoff_s": 0.01, "progress_interval_s": 0.05}
USAGE = {
    "prompt_tokens": 9,
    "completion_tokens": 3,
    "total_tokens": 12,
    "prompt_tokens_details": {"cached_tokens": 4},
}


def text_chunks(*words: str, finish: str = "stop") -> list[dict[str, Any]]:
    """A streamed chat that says ``words``, as vLLM sends it."""
    deltas = [{"role": "assistant", "content": ""}, *({"content": word} for word in words)]
    chunks = [{"choices": [{"index": 0, "delta": delta}]} for delta in deltas]
    chunks.append({"choices": [{"index": 0, "delta": {}, "finish_reason": finish}]})
    return [*chunks, {"choices": [], "usage": USAGE}]


@dataclass
class ScriptedEngines:
    """Plays ``pieces``: chunks are yielded, an event is waited for, an exception is raised."""

    pieces: list[Any] = field(default_factory=lambda: text_chunks("Hello ", "world"))
    later: list[list[Any]] = field(default_factory=list)
    """What the following runs play instead."""
    requests: list[EngineRequest] = field(default_factory=list)
    waits_as: str = "prefill"
    scopes: Scopes | None = None
    """What keys reach by now; ``None``: what they did."""
    num_running: int = 0
    num_stopped: int = 0
    """Runs that were closed before their end."""

    def check(self, request: EngineRequest) -> EngineRequest:
        if request.document["model"] != "sala":
            raise ModelNotFound("There is no such model.")
        return request

    async def run(self, request: EngineRequest) -> AsyncGenerator[Progress | dict[str, Any]]:
        self.requests.append(request)
        pieces = self.pieces
        if self.later:
            self.pieces = self.later.pop(0)
        self.num_running += 1
        is_whole = False
        try:
            for piece in pieces:
                if isinstance(piece, asyncio.Event):
                    while not piece.is_set():
                        yield Progress(self.waits_as, done_tokens=5, total_tokens=9)
                        await asyncio.sleep(0.01)
                elif isinstance(piece, Exception):
                    raise piece
                else:
                    yield piece
            is_whole = True
        finally:
            self.num_running -= 1
            self.num_stopped += not is_whole

    async def current(self, principal: Principal) -> Principal:
        return principal if self.scopes is None else replace(principal, scopes=self.scopes)

    async def count_tokens(self, principal: Principal, document: Mapping[str, Any]) -> int:
        return sum(len(str(message["content"]).split()) for message in document["messages"])


@pytest.fixture
def engines() -> ScriptedEngines:
    """Engines that answer "Hello world"."""
    return ScriptedEngines()


@pytest.fixture
def chunks() -> Callable[..., list[dict[str, Any]]]:
    """A function that makes the chunks of a streamed chat."""
    return text_chunks


@pytest.fixture
def alice() -> Principal:
    """Somebody who asks."""
    return Principal(Tenant("alice", "Alice", "default"), key_id="k1")


@pytest.fixture
def bob(alice: Principal) -> Principal:
    """Somebody else."""
    return replace(alice, tenant=Tenant("bob", "Bob", "default"))


@pytest.fixture(params=["embedded", "redis"])
def start(request: pytest.FixtureRequest, start_stack: Any) -> Callable[..., Any]:
    """A function that starts a stack with quick workers, on each store."""

    def start(behaviour: Any = None, **config: Any) -> Any:
        if request.param == "redis":
            url = SecretStr(request.getfixturevalue("redis_server").url)
            config = {"url": url, "command_timeout_s": 20, "secret": "a" * 32, **config}
        return start_stack(behaviour, **{**QUICK, **config})

    return start


@pytest.fixture
def client_of() -> Callable[..., Any]:
    """A function that makes a client with a key of a tenant of its own."""

    @asynccontextmanager
    async def client_of(stack: Any, tenant_id: str, **scopes: Any) -> AsyncIterator[AsyncOpenAI]:
        given = dict.fromkeys(("models", "endpoints", "max_context_tokens", "tiers")) | scopes
        store = stack.gateway.keys.store
        await store.create_tenant(
            name=tenant_id, tier="default", limits=Limits(), tenant_id=tenant_id
        )
        _, token = await store.create_key(tenant_id, name="one", scopes=Scopes(**given))
        yield AsyncOpenAI(
            base_url=f"{stack.url}/v1", api_key=token, max_retries=0, http_client=stack.http
        )

    return client_of
