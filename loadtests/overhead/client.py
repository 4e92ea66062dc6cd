"""A load generator that costs little: kept connections, httptools, no parsing of answers."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from httptools import HttpResponseParser

if TYPE_CHECKING:
    from collections.abc import Callable

MAX_OPEN = 128
"""Requests under way; an arrival beyond is not sent, which shows that the target does not keep up."""
REQUEST_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Timing:
    """One request; seconds since it was due, which is before it was sent if the generator is late."""

    late_s: float
    first_s: float
    """First event of a stream, or first byte of a whole answer."""
    total_s: float
    is_good: bool
    """Complete, with status 200."""


@dataclass(frozen=True)
class Ask:
    """A request and how its answer is known to be complete."""

    path: str
    body: bytes
    end: bytes
    """Stands in every complete answer's last bytes."""
    key: str | None = None

    def wire(self, port: int) -> bytes:
        """Return the request as it is sent."""
        key = f"Authorization: Bearer {self.key}\r\n" if self.key else ""
        head = (
            f"POST {self.path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n{key}"
            f"Content-Type: application/json\r\nContent-Length: {len(self.body)}\r\n\r\n"
        )
        return head.encode() + self.body


class _Connection(asyncio.Protocol):
    """One kept connection, one request at a time."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._done: asyncio.Future[None] | None = None
        self.is_open = True

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.transport = transport

    def ask(self, request: bytes) -> asyncio.Future[None]:
        """Send; the future ends with the answer, or when the connection does."""
        self._parser = HttpResponseParser(self)
        self.status, self.tail, self.first_at_s = 0, b"", 0.0
        self._done = asyncio.get_running_loop().create_future()
        self.transport.write(request)
        return self._done

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_open = False
        self._end()

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        if not self.first_at_s and not body.startswith(b":"):  # a comment is no answer yet
            self.first_at_s = self._clock()
        self.tail = (self.tail + body)[-4096:]

    def on_message_complete(self) -> None:
        self.is_open = self.is_open and self._parser.should_keep_alive()
        self._end()

    def _end(self) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_result(None)


class Client:
    """Sends requests to one port of this machine."""

    def __init__(self, port: int, *, clock: Callable[[], float] = time.perf_counter) -> None:
        self._port = port
        self._clock = clock
        self._idle: list[_Connection] = []
        self.num_open = 0

    async def ask(self, request: bytes, end: bytes, due_at_s: float | None = None) -> Timing:
        """Send one request and see it to its end."""
        sent_at_s = self._clock()
        due_at_s = sent_at_s if due_at_s is None else due_at_s
        self.num_open += 1
        connection = None
        try:
            async with asyncio.timeout(REQUEST_TIMEOUT_S):
                connection = await self._connection()
                await connection.ask(request)
        except (OSError, TimeoutError):
            pass
        finally:
            self.num_open -= 1
        done_at_s = self._clock()
        if connection is None:
            return Timing(sent_at_s - due_at_s, 0.0, done_at_s - due_at_s, is_good=False)
        is_good = connection.status == 200 and end in connection.tail
        if is_good and connection.is_open:
            self._idle.append(connection)
        else:
            connection.transport.close()
        first_s = connection.first_at_s - due_at_s
        return Timing(sent_at_s - due_at_s, first_s, done_at_s - due_at_s, is_good)

    async def _connection(self) -> _Connection:
        while self._idle:
            connection = self._idle.pop()
            if connection.is_open:
                return connection
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(
            lambda: _Connection(self._clock), "127.0.0.1", self._port
        )
        return connection

    def close(self) -> None:
        """Close what is idle."""
        while self._idle:
            self._idle.pop().transport.close()


@dataclass(frozen=True)
class Load:
    """What a stretch of load came to."""

    timings: list[Timing]
    duration_s: float
    num_not_sent: int
    generator_cores: float
    """Used by the generator itself; near 1 it is the bottleneck."""

    @property
    def num_good(self) -> int:
        """Complete answers."""
        return sum(timing.is_good for timing in self.timings)

    @property
    def num_bad(self) -> int:
        """Answers that failed, and arrivals that could not be sent."""
        return len(self.timings) - self.num_good + self.num_not_sent

    def summary(self) -> dict[str, Any]:
        """Return milliseconds at percentiles, and how many answers they are of."""
        good = [timing for timing in self.timings if timing.is_good]
        values: dict[str, Any] = {
            "num_good": len(good),
            "num_bad": self.num_bad,
            "per_s": round(len(good) / self.duration_s, 1),
            "generator_cores": round(self.generator_cores, 3),
        }
        for name in ("late", "first", "total"):
            ordered = sorted(getattr(timing, f"{name}_s") for timing in good)
            for percent in (50, 90, 99):
                if ordered:
                    at = min(len(ordered) - 1, len(ordered) * percent // 100)
                    values[f"{name}_p{percent}_ms"] = round(1e3 * ordered[at], 3)
        return values


async def open_loop(port: int, ask: Ask, *, per_s: float, duration_s: float) -> Load:
    """Send at equal intervals, whether or not earlier answers have come."""
    client, wire, end = Client(port), ask.wire(port), ask.end
    num_not_sent = 0
    tasks: list[asyncio.Task[Timing]] = []
    cpu_s, start_s = time.process_time(), time.perf_counter()
    for index in range(round(per_s * duration_s)):
        due_s = index / per_s
        if (wait_s := start_s + due_s - time.perf_counter()) > 0:
            await asyncio.sleep(wait_s)
        if client.num_open >= MAX_OPEN:
            num_not_sent += 1
            continue
        tasks.append(asyncio.create_task(client.ask(wire, end, start_s + due_s)))
    timings = list(await asyncio.gather(*tasks))
    elapsed_s = time.perf_counter() - start_s
    cores = (time.process_time() - cpu_s) / elapsed_s
    client.close()
    return Load(timings, elapsed_s, num_not_sent, cores)


async def closed_loop(port: int, ask: Ask, *, num_clients: int, duration_s: float) -> Load:
    """Keep ``num_clients`` requests under way for a time."""
    client, wire, end = Client(port), ask.wire(port), ask.end
    timings: list[Timing] = []
    cpu_s, start_s = time.process_time(), time.perf_counter()

    async def work() -> None:
        while time.perf_counter() - start_s < duration_s:
            timings.append(await client.ask(wire, end))

    async with asyncio.TaskGroup() as group:
        for _ in range(num_clients):
            group.create_task(work())
    elapsed_s = time.perf_counter() - start_s
    cores = (time.process_time() - cpu_s) / elapsed_s
    client.close()
    return Load(timings, elapsed_s, 0, cores)
