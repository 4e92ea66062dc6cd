"""Runs the Lua scripts of the limits' books in this process, for a single replica without Redis.

They are the scripts that Redis runs, so there is one set of semantics; only the few commands that they call are
written again. fakeredis runs them too, but parses and wraps each command anew, which was half of what a short
request cost (docs/decisions/0011-embedded-state.md).
"""

from __future__ import annotations

import time
from heapq import heappop, heappush
from typing import TYPE_CHECKING, Any, Protocol

from lupa import lua51

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

Value = bytes | int | float
SWEEP_INTERVAL_S = 3600.0
"""Between two looks at which keys have ended."""


class Script(Protocol):
    """A script that can be run."""

    def __call__(self, keys: Sequence[str], args: Sequence[str | int]) -> Awaitable[list[Any]]:
        """Run it as one atomic step; its answer's strings are bytes."""


class Scripts(Protocol):
    """What scripts need of a store: Redis, or :class:`LuaStore`."""

    def register_script(self, script: str) -> Any:
        """Return a :class:`Script` of this source."""

    def hgetall(self, name: str) -> Any:
        """Return the hash ``name``, awaitable: fields and values are bytes."""


class ScoredSet:
    """Members in the order of their scores; one whose score has changed stays in the heap until it comes up."""

    def __init__(self) -> None:
        self._scores: dict[bytes, float] = {}
        self._heap: list[tuple[float, bytes]] = []

    def add(self, member: bytes, score: float) -> None:
        """Add a member, or change its score."""
        if self._scores.get(member) != score:
            self._scores[member] = score
            heappush(self._heap, (score, member))

    def remove(self, member: bytes) -> None:
        """Remove a member, if it is there."""
        self._scores.pop(member, None)

    def up_to(self, score: float, limit: int) -> list[bytes]:
        """Return ``limit`` members at most whose score is not above ``score``, lowest first."""
        found: list[tuple[float, bytes]] = []
        while self._heap and self._heap[0][0] <= score and len(found) < limit:
            entry = heappop(self._heap)
            if self._scores.get(entry[1]) == entry[0] and entry not in found[-1:]:
                found.append(entry)
        for entry in found:
            heappush(self._heap, entry)
        return [member for _, member in found]


class LuaStore:
    """Hashes and scored sets in this process, which scripts read and write as they do in Redis.

    Args:
        unix_clock: seconds.
    """

    def __init__(self, unix_clock: Callable[[], float] = time.time) -> None:
        self._unix_clock = unix_clock
        self._hashes: dict[bytes, dict[bytes, bytes]] = {}
        self._sets: dict[bytes, ScoredSet] = {}
        self._ends_unix_s: dict[bytes, float] = {}
        self._swept_unix_s = unix_clock()
        self._lua = lua51.LuaRuntime(encoding=None, register_eval=False)
        commands: Mapping[bytes, Callable[..., object]] = {
            b"EXPIRE": self._expire,
            b"HDEL": lambda key, field: self._hash(key).pop(field, None) is not None,
            b"HEXISTS": lambda key, field: int(field in self._hash(key)),
            b"HGET": lambda key, field: self._hash(key).get(field, False),
            b"HINCRBY": self._hincrby,
            b"HMGET": self._hmget,
            b"HSET": self._hset,
            b"PEXPIRE": lambda key, ms: self._expire(key, float(ms) / 1000),
            b"TIME": self._time,
            b"ZADD": lambda key, score, member: self._set(key).add(member, float(score)),
            b"ZRANGEBYSCORE": self._zrangebyscore,
            b"ZREM": lambda key, member: self._set(key).remove(member),
        }
        self._lua.globals()[b"redis"] = self._lua.table_from(
            {b"call": lambda name, *arguments: commands[name](*arguments)}
        )

    def register_script(self, script: str) -> Script:
        """Compile a script of the commands above."""
        source = f"return function(KEYS, ARGV)\n{script}\nend"
        function: Any = self._lua.execute(source.encode())

        async def run(keys: Sequence[str], args: Sequence[str | int]) -> list[Any]:
            self._sweep()
            answer = function(
                self._lua.table_from([key.encode() for key in keys]),
                self._lua.table_from([str(each).encode() for each in args]),
            )
            return list(answer.values())

        return run

    async def hgetall(self, name: str) -> dict[bytes, bytes]:
        """Return the hash ``name``, empty if there is none."""
        self._sweep()
        return dict(self._hashes.get(name.encode(), {}))

    def _hash(self, key: bytes) -> dict[bytes, bytes]:
        return self._hashes.setdefault(key, {})

    def _set(self, key: bytes) -> ScoredSet:
        return self._sets.setdefault(key, ScoredSet())

    def _hset(self, key: bytes, *pairs: Value) -> None:
        fields = list(map(_stored, pairs))
        self._hash(key).update(zip(fields[::2], fields[1::2], strict=True))

    def _hmget(self, key: bytes, *fields: bytes) -> object:
        found = self._hash(key)
        return self._lua.table_from([found.get(field, False) for field in fields])

    def _hincrby(self, key: bytes, field: bytes, amount: Value) -> None:
        found = self._hash(key)
        found[field] = b"%d" % (int(found.get(field, 0)) + int(amount))

    def _zrangebyscore(
        self, key: bytes, least: bytes, most: Value, _limit: bytes, offset: int, count: int
    ) -> object:
        assert (least, offset) == (b"-inf", 0)
        return self._lua.table_from(self._set(key).up_to(float(most), int(count)))

    def _time(self) -> object:
        now_us = int(self._unix_clock() * 1e6)
        return self._lua.table_from([b"%d" % (now_us // 10**6), b"%d" % (now_us % 10**6)])

    def _expire(self, key: bytes, after_s: Value) -> None:
        self._ends_unix_s[key] = self._unix_clock() + float(after_s)

    def _sweep(self) -> None:
        """Forget keys that have ended; what they hold counts for nothing by then, so there is no hurry."""
        now_unix_s = self._unix_clock()
        if now_unix_s - self._swept_unix_s < SWEEP_INTERVAL_S:
            return
        self._swept_unix_s = now_unix_s
        for key in [key for key, ends_s in self._ends_unix_s.items() if ends_s <= now_unix_s]:
            del self._ends_unix_s[key]
            self._hashes.pop(key, None)
            self._sets.pop(key, None)


def _stored(value: Value) -> bytes:
    """Return a value as Redis keeps it."""
    return value if isinstance(value, bytes) else b"%.17g" % value
