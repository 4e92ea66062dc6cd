"""Clients of every kind, most of which leave when they should not."""

from __future__ import annotations

import asyncio
import json
import random
import time
import uuid
from collections import Counter
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from soak.wire import Answer, ask, connected

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from soak.stack import Stack

CHAT, COMPLETION, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
LONG_WORDS = (3_000, 20_000, 60_000)
BAD = frozenset({"500", "silent end", "hung", "no answer"})
"""Outcomes that are never right, whatever was restarted."""
FINAL = frozenset({"completed", "incomplete", "failed", "cancelled"})


class Traffic:
    """All clients together.

    Args:
        stack: what they talk to.
        seed: of all that is random.
    """

    def __init__(self, stack: Stack, *, seed: int) -> None:
        self._stack = stack
        self._random = random.Random(seed)
        self._texts = [" ".join(f"w{index % 977}" for index in range(n)) for n in LONG_WORDS]
        self.outcomes: Counter[tuple[str, str]] = Counter()
        """By kind of client, and how it ended."""
        self._kinds: dict[Callable[[str], Awaitable[str]], int] = {
            self.whole: 12,
            self.stream: 16,
            self.completion: 4,
            self.long: 4,
            self.leaving: 24,
            self.aborted_upload: 10,
            self.slow_reader: 6,
            self.asking_again: 4,
            self.stored: 6,
            self.background: 10,
            self.wrong: 6,
            self.half_a_head: 2,
        }

        self._first = list(self._kinds)

    @property
    def num_bad(self) -> int:
        """Requests that ended as none may."""
        return sum(number for (_, outcome), number in self.outcomes.items() if outcome in BAD)

    @property
    def num_kinds(self) -> int:
        """Kinds of clients there are."""
        return len(self._kinds)

    async def run(self, *, num_clients: int, duration_s: float) -> None:
        """Keep ``num_clients`` at work for a time, then see each to its end."""
        ends_at_s = time.monotonic() + duration_s
        async with asyncio.TaskGroup() as group:
            for _ in range(num_clients):
                group.create_task(self._work(ends_at_s))

    async def _work(self, ends_at_s: float) -> None:
        kinds, weights = list(self._kinds), list(self._kinds.values())
        while time.monotonic() < ends_at_s:
            if self._first:  # each kind once, however short the soak
                kind = self._first.pop()
            else:
                (kind,) = self._random.choices(kinds, weights)
            key = self._stack.keys[self._random.choice([*self._stack.keys])]
            try:
                outcome = await kind(key)
            except TimeoutError:
                outcome = "hung"
            except OSError:
                outcome = "no answer"
            self.outcomes[kind.__name__, outcome] += 1
            await asyncio.sleep(self._random.uniform(0, 0.5 if outcome.startswith("5") else 0.1))

    # clients

    async def whole(self, key: str) -> str:
        """Take a short answer that is not streamed."""
        return await self._chat(key, stream=False)

    async def stream(self, key: str) -> str:
        """Take a stream, with usage or without, with progress as events or as comments."""
        options = {"stream_options": {"include_usage": self._often(0.5)}}
        headers = {"X_Sala_Progress": "events"} if self._often(0.3) else {}
        return await self._chat(key, stream=True, more=options, **headers)

    async def completion(self, key: str) -> str:
        """Ask for several answers of text completions."""
        body = {"model": "sala", "prompt": ["One", "Two words"], "n": 2, "stream": self._often(0.5)}
        return (await self._ask("POST", COMPLETION, key, body)).outcome

    async def long(self, key: str) -> str:
        """Send a long prompt, now and then the same one."""
        return await self._chat(key, stream=self._often(0.7), text=self._long_text())

    async def leaving(self, key: str) -> str:
        """Leave after a while, in whatever phase that is."""
        text = self._long_text() if self._often(0.3) else self._short_text()
        path, body = self._random.choice(
            [
                (CHAT, self._body(text, stream=True)),
                (CHAT, self._body(text, stream=False)),
                (RESPONSES, {"model": "sala", "input": text, "stream": True}),
                (RESPONSES, {"model": "sala", "input": text, "store": True}),
            ]
        )
        try:
            async with asyncio.timeout(self._random.choice([0.01, 0.05, 0.2, 0.5, 1.0])):
                return (await self._ask("POST", path, key, body)).outcome
        except TimeoutError:
            return "left"

    async def aborted_upload(self, key: str) -> str:
        """Send a part of what was announced, and leave."""
        text = json.dumps(self._body(self._texts[-1], stream=True)).encode()
        part = self._random.randrange(len(text))
        async with connected(self._stack.port) as exchange:
            await exchange.send("POST", CHAT, key=key, body=text[:part], stated_bytes=len(text))
            await asyncio.sleep(self._random.uniform(0, 0.3))
        return "left"

    async def slow_reader(self, key: str) -> str:
        """Read a little now and then, or nothing at all."""
        body = json.dumps(self._body(self._short_text(), stream=True)).encode()
        pause_s, last = self._random.choice([0.001, 0.3, 5.0]), b""
        ends_at_s = time.monotonic() + self._random.uniform(1, 4)
        async with connected(self._stack.port, receive_bytes=4096) as exchange:
            await exchange.send("POST", CHAT, key=key, body=body)
            while time.monotonic() < ends_at_s:
                await asyncio.sleep(min(pause_s, max(0.0, ends_at_s - time.monotonic())))
                try:
                    if not (piece := await asyncio.wait_for(exchange.reader.read(1024), 2)):
                        return "end" if b"[DONE]" in last else "cut off"
                    last = (last + piece)[-100:]
                except TimeoutError:
                    continue
                except OSError:
                    return "cut off"
        return "left"

    async def asking_again(self, key: str) -> str:
        """Leave, and ask the same again with the same key of idempotency."""
        body = self._body(self._short_text(), stream=False)
        same = {"Idempotency_Key": uuid.uuid4().hex}
        with suppress(TimeoutError):
            async with asyncio.timeout(self._random.uniform(0.02, 0.4)):
                return (await self._ask("POST", CHAT, key, body, **same)).outcome
        return (await self._ask("POST", CHAT, key, body, **same)).outcome

    async def stored(self, key: str) -> str:
        """Store a response, build another one on it, delete one of them."""
        body = {"model": "sala", "input": self._short_text(), "store": True}
        first = await self._ask("POST", RESPONSES, key, body)
        if first.status != 200:
            return first.outcome
        first_id = first.json()["id"]
        body |= {"previous_response_id": first_id, "stream": self._often(0.5)}
        second = await self._ask("POST", RESPONSES, key, body)
        if self._often(0.7):
            await self._ask("DELETE", f"{RESPONSES}/{first_id}", key)
        return second.outcome

    async def background(self, key: str) -> str:
        """Let a response be computed in the background; follow, cancel, delete or forget it."""
        text = self._long_text() if self._often(0.2) else self._short_text()
        body = {"model": "sala", "input": text, "background": True, "stream": self._often(0.3)}
        if body["stream"]:
            try:
                async with asyncio.timeout(self._random.uniform(0.05, 2)):
                    return (await self._ask("POST", RESPONSES, key, body)).outcome
            except TimeoutError:
                return "left"
        made = await self._ask("POST", RESPONSES, key, body)
        if made.status != 200:
            return made.outcome
        path = f"{RESPONSES}/{made.json()['id']}"
        await asyncio.sleep(self._random.uniform(0, 0.5))
        match self._random.choice(["poll", "poll", "cancel", "delete", "forget", "resume"]):
            case "cancel":
                return "cancel " + (await self._ask("POST", f"{path}/cancel", key)).outcome
            case "delete":
                return "delete " + (await self._ask("DELETE", path, key)).outcome
            case "resume":
                answer = await self._ask("GET", f"{path}?stream=true&starting_after=1", key)
                return "resume " + answer.outcome
            case "poll":
                return await self._followed(path, key)
            case _:
                return "forgotten"

    async def wrong(self, key: str) -> str:
        """Send what is refused."""
        body: Any = self._body(self._short_text(), stream=False)
        match self._random.choice(["key", "model", "path", "long", "number", "json"]):
            case "key":
                key = key[:-1] + ("a" if key[-1] != "a" else "b")
            case "model":
                body["model"] = "another"
            case "path":
                return (await self._ask("POST", "/v1/nothing", key, body)).outcome
            case "long":
                body["max_tokens"] = 10**9
            case "number":
                body["n"] = 1000
            case _:
                body = "not an object"
        return (await self._ask("POST", CHAT, key, body)).outcome

    async def half_a_head(self, key: str) -> str:
        """Begin a request's head and never end it."""
        async with connected(self._stack.port) as exchange:
            exchange.writer.write(f"POST {CHAT} HTTP/1.1\r\nAuthorization: {key}".encode())
            await asyncio.sleep(self._random.uniform(0, 1))
        return "left"

    # parts of them

    async def _ask(
        self, method: str, path: str, key: str, document: Any = None, **headers: str
    ) -> Answer:
        return await ask(self._stack.port, method, path, key=key, document=document, **headers)

    async def _chat(
        self,
        key: str,
        *,
        stream: bool,
        text: str | None = None,
        more: dict[str, Any] | None = None,
        **headers: str,
    ) -> str:
        body = self._body(text or self._short_text(), stream=stream) | (
            more if stream and more else {}
        )
        return (await self._ask("POST", CHAT, key, body, **headers)).outcome

    async def _followed(self, path: str, key: str) -> str:
        async with asyncio.timeout(60):
            while True:
                answer = await self._ask("GET", path, key)
                if answer.status == 200 and (status := answer.json()["status"]) in FINAL:
                    return f"poll {status}"
                if answer.status == 404:
                    return "poll 404"
                await asyncio.sleep(0.2)

    def _body(self, text: str, *, stream: bool) -> dict[str, Any]:
        body = {"model": "sala", "messages": [{"role": "user", "content": text}], "stream": stream}
        return body | ({"max_tokens": self._random.randint(1, 60)} if self._often(0.5) else {})

    def _short_text(self) -> str:
        return f"Question {self._random.random()}, " + "please " * self._random.randint(1, 40)

    def _long_text(self) -> str:
        start = self._random.choice(["the same start", f"another start {self._random.random()}"])
        return f"{start} {self._random.choice(self._texts)}"

    def _often(self, frac: float) -> bool:
        return self._random.random() < frac
