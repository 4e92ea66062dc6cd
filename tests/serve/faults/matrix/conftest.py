"""A gateway with work in every phase, and what its clients, its books and its engine then show, in words."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import time
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from inspect import isawaitable
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from sala_serve.config import Settings
from sala_serve.engine.fake import Behaviour
from sala_serve.engine.fake_server import FakeServer
from sala_serve.gateway import Gateway
from sala_serve.tenants.model import Limits, Scopes, Tenant

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine

    from sala_serve.engine.fake import FakeEngine

PHASES = ("queued", "prefilling", "streaming", "background")
NUM_LONG_TOKENS, NUM_SHORT_TOKENS = 6001, 10
LIMITS = Limits(tokens_in_flight=10**6, tokens_per_day=10**9, cached_token_rate=1.0)
SETTINGS: dict[str, dict[str, Any]] = {
    "tenants": {"require_keys": True, "secret": "a secret of all the replicas"},
    "limits": {"lease_s": 3},
    "scheduling": {"long_prompt_tokens": 1000, "max_long_prefills": 2},
    "server": {"hold_status_s": 0, "progress_interval_s": 0.1, "drain_timeout_s": 30},
    "jobs": {"lease_s": 1, "heartbeat_s": 0.1, "poll_s": 0.1, "backoff_s": 0.05},
}
ROUND_S = 0.01
ROUNDS_OF_A_SECOND = 100
"""Rounds of the loop rather than a clock: a busy machine is no slow gateway."""


@dataclass
class Seen:
    """What a fault did to one phase."""

    client: str
    billed: str
    engine: str


@dataclass
class Client:
    """One who asks; ``kind`` is ``stream``, ``whole`` or ``follower`` (of a background response)."""

    phase: str
    kind: str
    headers: dict[str, str] = field(default_factory=dict)
    body: dict[str, Any] = field(default_factory=dict)
    task: asyncio.Task[None] | None = None
    status: int | None = None
    pieces: list[str] = field(default_factory=list)
    """Of what it got."""
    is_broken: bool = False
    has_left: bool = False
    goes_on: asyncio.Event = field(default_factory=asyncio.Event)
    is_late: bool = False
    """Whether the engine took more than a second to stop."""
    before: str = ""
    """What it saw before the end."""

    @property
    def name(self) -> str:
        return f"{self.phase}-{self.kind}"

    @property
    def text(self) -> str:
        self.pieces[:] = ["".join(self.pieces)]
        return self.pieces[0]

    @property
    def path(self) -> str:
        return "/v1/responses" if self.kind == "follower" else "/v1/chat/completions"

    @property
    def num_prompt_tokens(self) -> int:
        return NUM_LONG_TOKENS if self.phase in ("queued", "prefilling") else NUM_SHORT_TOKENS

    @property
    def num_words_seen(self) -> int:
        return len(re.findall(r"word\d+ ", self.text))

    @property
    def tenant(self) -> Tenant:
        return Tenant(self.name, self.name, "default", LIMITS)

    async def ask(self, http: httpx.AsyncClient) -> None:
        """Ask, and read to the end."""
        try:
            async with http.stream(
                "POST", self.path, json=self.body, headers=self.headers, timeout=30
            ) as answer:
                self.status = answer.status_code
                async for piece in answer.aiter_text():
                    self.pieces.append(piece)
        except (httpx.RemoteProtocolError, httpx.ReadError):
            self.is_broken = True

    async def ask_until_answered(self, http: httpx.AsyncClient) -> None:
        """Ask again whenever a proxy has lost its patience, with the same ``Idempotency-Key``."""
        self.headers["Idempotency-Key"] = self.name
        while self.status in (None, 504):
            if self.status is not None:
                self.before = "504 by the proxy, asks again: "
            self.pieces.clear()
            await self.ask(http)

    async def ask_and_stall(self, url: str) -> None:
        """Ask, read the beginning, and take nothing more until :attr:`goes_on` is set."""
        host, port = url.removeprefix("http://").split(":")
        body = json.dumps(self.body).encode()
        headers = {**self.headers, "Host": host, "Content-Length": str(len(body))}
        head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        reader, writer = await asyncio.open_connection(host, int(port), limit=1024)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        writer.write(f"POST {self.path} HTTP/1.1\r\n{head}\r\n".encode() + body)
        try:
            raw = b""
            while b"word0 " not in raw:
                raw += await reader.read(1024)
            await self.goes_on.wait()
            with suppress(ConnectionError):
                while piece := await reader.read(1024 * 1024):
                    raw += piece
        finally:
            writer.close()
        self.status = int(raw.split()[1])
        self.pieces.append(re.sub(r"\r\n[0-9a-f]+\r\n", "", raw.decode()))
        self.is_broken = not raw.endswith(b"0\r\n\r\n")

    async def leave(self) -> None:
        """Close the connection."""
        assert self.task is not None
        self.has_left = True
        self.task.cancel()
        await asyncio.wait({self.task})

    def events(self) -> list[dict[str, Any]]:
        whole, _, _ = self.text.rpartition("\n\n")
        lines = [each for each in whole.split("\n") if each.startswith("data: {")]
        return [json.loads(each.removeprefix("data: ")) for each in lines]

    def word(self, num_tokens: int) -> str:
        """Say how it ended for the client."""
        words = "".join(f"word{index} " for index in range(num_tokens))
        return self.before + self._word(words)

    def _word(self, words: str) -> str:
        assert self.task is not None
        if self.has_left:
            return "left"
        if not self.task.done():
            return "hangs"
        self.task.result()
        if self.is_broken:
            looks_whole = re.search(r"\[DONE\]|finish_reason\": \"|response.completed", self.text)
            return "looks whole" if looks_whole else "connection breaks"
        if self.status != 200:
            return f"{self.status} {json.loads(self.text)['error']['code']}"
        if self.kind == "whole":
            message = json.loads(self.text)["choices"][0]["message"]["content"]
            return "whole answer" if without_padding(message) == words else "half answer"
        events = self.events()
        errors = [each["error"]["code"] for each in events if "error" in each]
        if errors:
            is_last = "error" in events[-1] and "[DONE]" not in self.text
            assert len(errors) == 1
            assert is_last
            return f"error event {errors[0]}"
        if self.kind == "follower":
            assert events[-1]["type"] == "response.completed", self.text[-500:]
            return whole_response(events[-1]["response"], words)
        said = "".join(
            choice["delta"].get("content", "") for each in events for choice in each["choices"]
        )
        is_done = self.text.endswith("data: [DONE]\n\n")
        return "whole answer" if is_done and without_padding(said) == words else "silent end"


def without_padding(text: str) -> str:
    """Return the words of an answer of the fake engine."""
    return re.sub("x+", "", text)


def whole_response(document: dict[str, Any], words: str) -> str:
    """Say what a finished response is."""
    (item,) = document["output"]
    assert document["status"] == "completed", document
    assert without_padding(item["content"][0]["text"]) == words
    return "whole answer"


class World:
    """Clients in every phase: two that queue, two whose prompts are read, two that get tokens, a background job.

    They are held there until :meth:`release`, but for what the fault does.
    """

    def __init__(
        self, engine: FakeServer, gateway: Gateway, num_tokens: int, *, is_held: bool = True
    ) -> None:
        self.engine = engine
        self.is_held = is_held
        self.gateway = gateway
        """Its books are looked at; clients ask whom they are told to."""
        self.num_tokens = num_tokens
        kinds = ("stream", "whole")
        self.clients = {
            (phase, kind): Client(phase, kind)
            for phase in PHASES
            for kind in (kinds if phase != "background" else ("follower",))
        }
        self._lives: list[FakeEngine] = [engine.engine]

    def __getitem__(self, phase: str) -> list[Client]:
        return [each for each in self.clients.values() if each.phase == phase]

    @property
    def stream(self) -> Client:
        """The one that gets tokens."""
        return self.clients["streaming", "stream"]

    @property
    def follower(self) -> Client:
        """The one that reads the background response."""
        return self.clients["background", "follower"]

    async def begin(
        self,
        http: httpx.AsyncClient,
        *phases: str,
        ask: Callable[[Client], Coroutine[Any, Any, None]] | None = None,
    ) -> None:
        """Bring clients into their phases; all phases if none is named.

        Args:
            http: asks the gateway.
            phases: of the clients.
            ask: how a client asks, unless as :meth:`Client.ask` does.
        """
        phases = phases or ("streaming", "background", "prefilling", "queued")
        store = self.gateway.keys.store
        for phase in phases:
            for client in self[phase]:
                name = client.name
                await store.create_tenant(name=name, tier="default", limits=LIMITS, tenant_id=name)
                _, token = await store.create_key(name, name="k", scopes=Scopes())
                client.headers = {
                    "Authorization": f"Bearer {token}",
                    "X-Request-Id": name,
                    **client.headers,
                }
                client.body = self._body(client)
                client.task = asyncio.create_task(ask(client) if ask else client.ask(http))
            if self.is_held:
                await self._reached(phase, http)

    def _body(self, client: Client) -> dict[str, Any]:
        # the role counts as a word, too
        text = " ".join(map(str, range(client.num_prompt_tokens - 1)))
        if client.kind == "follower":
            choices = {"background": True, "stream": True, "max_output_tokens": self.num_tokens}
            return {"model": "sala", "input": text, **choices}
        messages = [{"role": "user", "content": text}]
        choices = {"stream": client.kind == "stream", "max_tokens": self.num_tokens}
        return {"model": "sala", "messages": messages, **choices}

    async def _reached(self, phase: str, http: httpx.AsyncClient) -> None:
        """Wait until the gateway knows that its clients are in their phase."""
        stream, *whole = self[phase]
        marks = {
            "queued": r": queued place=",
            "prefilling": r": prefill done_tokens=[1-9]",
            "streaming": r"word3 ",
            "background": r"word3 ",
        }
        assert await until(lambda: re.search(marks[phase], stream.text)), stream
        if phase == "queued":  # nothing that the other one gets, or the engine has, shows it
            pattern = re.compile(r"^sala_gateway_queued_requests{.*} 2\.0$", re.MULTILINE)

            async def both_wait() -> object:
                return pattern.search((await http.get("/metrics")).text)

            assert await until(both_wait)
            return
        for client in whole:
            assert await until(lambda client=client: self._is_known(client, phase)), client

    def _is_known(self, client: Client, phase: str) -> bool:
        """Tell whether the gateway knows how far it is; one in another process is given time instead."""
        if phase == "prefilling":
            for each in self.gateway.running.snapshot():
                if each.record is not None and each.record.request_id == client.name:
                    return bool(getattr(each.record.note, "done_tokens", 0))
        (engine,) = self.gateway.pool.engines.values()
        jobs = {job.request_id: job for job in self.engine.engine.core.jobs}
        for request_id, at in (dict(engine.progress) or jobs).items():
            if request_id.startswith(f"{client.name}."):
                # more than one look long, so that the look before it has been taken note of
                return (
                    at.num_output_tokens > 4 if phase == "streaming" else at.num_computed_tokens > 0
                )
        return False

    def release(self) -> None:
        """Let the engine be quick."""
        self.engine.behaviour.prefill_tokens_per_s, self.engine.behaviour.itl_s = None, 0.0

    async def restart_engine(self) -> None:
        """Start the engine again, as another process."""
        self.engine.kill()
        await self.engine.start()
        self._lives.append(self.engine.engine)

    def another_replica(self, start_stack: Any) -> Any:
        """Start a gateway with the same settings, on the same Redis and engine."""
        sections = self.gateway.settings.model_dump(
            exclude={"engines", "admin"}, exclude_unset=True
        )
        return start_stack(engine_urls=[self.engine.url], **sections)

    async def answered(self, *phases: str) -> None:
        """Wait for the ends of the clients of these phases; those that hang are left to :meth:`seen`."""
        tasks = [each.task for phase in phases or PHASES for each in self[phase]]
        await asyncio.wait({task for task in tasks if task is not None}, timeout=25)

    async def follow_on(self, http: httpx.AsyncClient) -> None:
        """Have the follower of the background response read on where it was cut off, as its client would."""
        follower = self.follower
        cut = follower.word(self.num_tokens)
        events = follower.events()
        job_id = events[0]["response"]["id"]
        seen = [each for each in events if "sequence_number" in each]
        follower.pieces = [f"data: {json.dumps(each)}\n\n" for each in seen]
        query = {"stream": "true", "starting_after": str(seen[-1]["sequence_number"])}
        follower.is_broken = False
        async with http.stream(
            "GET", f"/v1/responses/{job_id}", params=query, headers=follower.headers, timeout=30
        ) as answer:
            follower.status = answer.status_code
            async for piece in answer.aiter_text():
                follower.pieces.append(piece)
        numbers = [each["sequence_number"] for each in follower.events()]
        assert numbers == list(range(len(numbers)))
        follower.before = f"{cut}, reads on: "

    async def stopped(self, *clients: Client) -> None:
        """Wait until the engine has stopped working on these, a second at most."""
        for client in clients:
            for _ in range(ROUNDS_OF_A_SECOND):
                if not self._runs(client):
                    break
                await asyncio.sleep(ROUND_S)
            else:
                client.is_late = True

    def _runs(self, client: Client) -> bool:
        jobs = self.engine.engine.core.jobs
        return any(job.request_id.startswith(f"{client.name}.") for job in jobs)

    async def seen(self) -> dict[str, Seen]:
        """Say for each phase what became of it, once the books are closed."""
        seen = {}
        for phase in PHASES:
            clients = [each for each in self[phase] if each.task is not None]
            if not clients:
                continue
            seen[phase] = Seen(
                client=_together({each.kind: each.word(self.num_tokens) for each in clients}),
                billed=_together({each.kind: await self._billed(each) for each in clients}),
                engine=_together({each.kind: self._computed(each) for each in clients}),
            )
        assert not self.engine.engine.core.jobs
        return seen

    async def _billed(self, client: Client) -> str:
        limiter, tenant = self.gateway.limiter, client.tenant

        async def holds_nothing() -> bool:
            return (await limiter.used(tenant)).flight == 0

        if not await until(holds_nothing):
            return "its reservation is leaked"
        today = int(time.time() // 86400)
        days = await limiter.usage_by_day(tenant.tenant_id, [today - 1, today])
        num_requests, num_prompt, num_output = (
            sum(day.get(name, 0) for day in days)
            for name in ("requests", "prompt_tokens", "completion_tokens")
        )
        assert (await limiter.used(tenant)).day == num_prompt + num_output
        if num_requests == num_prompt == num_output == 0:
            return "nothing"
        prompt_tokens = client.num_prompt_tokens
        if (num_requests, num_prompt, num_output) == (1, prompt_tokens, self.num_tokens):
            return "all, once"
        is_part = num_prompt <= prompt_tokens and num_output < self.num_tokens
        if num_requests == 1 and is_part and num_output >= client.num_words_seen:
            return "what was computed"
        return f"{num_requests} requests, {num_prompt} and {num_output} tokens"

    def _computed(self, client: Client) -> str:
        ends = [
            life.journal.ends.get(each, "still runs")
            for life in self._lives
            for headers in life.journal.headers
            if (each := headers["x-request-id"]).startswith(f"{client.name}.")
        ]
        stops = "stops late" if client.is_late else "stops within 1 s"
        names = {"finished": "computes it once", "died": "is gone", "aborted": stops}
        return ", then ".join(names.get(each, each) for each in ends) or "never reached"


def _together(words: dict[str, str]) -> str:
    """Say once what holds for both kinds of clients."""
    if len(set(words.values())) == 1:
        return next(iter(words.values()))
    return "; ".join(f"{kind}: {word}" for kind, word in words.items())


async def until(condition: Callable[[], Any]) -> bool:
    """Wait for something that should happen, 20 s or longer on a busy machine; tell whether it did."""
    for _ in range(2000):
        if (found := condition()) and (not isawaitable(found) or await found):
            return True
        await asyncio.sleep(ROUND_S)
    return False


@pytest.fixture
def start_process(durable_redis, run_gateway):
    """A function that starts an engine, a gateway in a process of its own, and a Redis that others can join."""

    @asynccontextmanager
    async def start() -> AsyncIterator[tuple[World, asyncio.subprocess.Process, httpx.AsyncClient]]:
        async with FakeServer(slow_behaviour(100)) as engine:
            settings = merged({"state": {"url": durable_redis.url}})
            books = Gateway.create(Settings(**settings, engines=[{"url": engine.url}]))
            async with run_gateway(engine.url, settings) as (process, http):
                yield World(engine, books, 100), process, http
            await books.limiter.close()
            await books.state.close()

    return start


@pytest.fixture
def start_world(start_stack):
    """A function that starts an engine and a gateway in this process, without any work yet."""

    @asynccontextmanager
    async def start(
        *, num_tokens: int = 100, behaviour: dict[str, Any] | None = None, **settings: Any
    ) -> AsyncIterator[tuple[World, Any]]:
        async with (
            FakeServer(slow_behaviour(num_tokens, **(behaviour or {}))) as engine,
            start_stack(engine_urls=[engine.url], **merged(settings)) as stack,
        ):
            is_held = not (behaviour or {}).get("num_padding_chars")
            yield World(engine, stack.gateway, num_tokens, is_held=is_held), stack

    return start


def slow_behaviour(num_tokens: int, **fields: Any) -> Behaviour:
    """An engine that takes its time with every phase."""
    return Behaviour(
        **{
            "prefill_tokens_per_s": 300,
            "itl_s": 0.1,
            "num_tokens": num_tokens,
            "num_prompt_tokens": None,
            "num_cached_tokens": 0,
            "max_model_len": 100_000,
            **fields,
        }
    )


def merged(more: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of all worlds, by section, with ``more``: sections, or fields without one."""
    sections = {name: {**each, **more.pop(name, {})} for name, each in SETTINGS.items()}
    return sections | more
