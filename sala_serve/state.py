"""What outlives a request and is shared by replicas: one pool of connections to Redis, or a store in this process.

Without a URL the store is fakeredis with its Lua interpreter, so that one replica runs the same commands and
scripts that several run on Redis (docs/decisions/0011-embedded-state.md).
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from pydantic import SecretStr, field_validator
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import (
    BusyLoadingError,
    ClusterError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    TryAgainError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from sala_serve.errors import StateUnavailable
from sala_serve.lua import LuaStore
from sala_serve.settings import PositiveInt, Seconds, Section
from sala_serve.telemetry import Metrics

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from redis.asyncio import ConnectionPool

    from sala_serve.lua import Scripts

logger = logging.getLogger(__name__)

OLDEST_VERSION = (6, 2)
_WATCH_KEY = b"sala:watch"
_SCHEMES = ("redis", "rediss", "unix")
# what says "not now" rather than "this command is wrong": gone, silent, loading, a replica, full
_AWAY = (
    *(RedisConnectionError, RedisTimeoutError, BusyLoadingError, ReadOnlyError, OutOfMemoryError),
    *(ClusterError, TryAgainError, OSError),
)


class StateSettings(Section):
    """Where state lives."""

    url: SecretStr | None = None
    """``redis://``, ``rediss://`` or ``unix://``, with user, password and database as in redis-py; none: a
    store in this process, for one replica, lost at its end."""
    command_timeout_s: Seconds = 2.0
    """For a connection, and for the answer to a command; then Redis counts as away."""
    watch_interval_s: Seconds = 0.5
    """Between two looks at whether Redis answers."""
    max_connections: PositiveInt = 64
    """Of this process; a command waits for a free one."""

    @field_validator("url")
    @classmethod
    def _check_url(cls, url: SecretStr | None) -> SecretStr | None:
        if url is not None and urlsplit(url.get_secret_value()).scheme not in _SCHEMES:
            expected = ", ".join(f"{scheme}://" for scheme in _SCHEMES)
            raise ValueError(f"expected a URL with {expected}")
        return url


class _Cancellable:
    """A connection on which a task can be cancelled at any moment.

    redis-py and fakeredis use ``asyncio.wait_for``, which before Python 3.12 drops a cancellation that comes
    when what it waits for has just ended. Goes when Python 3.11 is no longer supported.
    """

    async def send_packed_command(self, *arguments: Any, **named: Any) -> None:
        """Send a command."""
        try:
            with _seeing_cancellation():
                await super().send_packed_command(*arguments, **named)  # type: ignore[misc]
        except asyncio.CancelledError:
            # else the answer would be taken for that of the next command
            await self.disconnect(nowait=True)  # type: ignore[attr-defined]
            raise

    async def read_response(self, *arguments: Any, **named: Any) -> Any:
        """Read an answer."""
        with _seeing_cancellation():
            return await super().read_response(*arguments, **named)  # type: ignore[misc]


@contextmanager
def _seeing_cancellation() -> Iterator[None]:
    task = asyncio.current_task()
    assert task is not None
    num_before = task.cancelling()
    yield
    if task.cancelling() > num_before:
        raise asyncio.CancelledError


def _make_cancellable(pool: ConnectionPool) -> None:
    base = pool.connection_class
    pool.connection_class = type(f"Cancellable{base.__name__}", (_Cancellable, base), {})


class State:
    """One replica's way to the shared state.

    Commands go through :attr:`redis` inside :meth:`guarded`, which turns an absent Redis into
    :class:`~sala_serve.errors.StateUnavailable`. A command that blocks (``XREAD BLOCK``) must block for less
    than ``command_timeout_s``.
    """

    def __init__(
        self,
        redis: Redis,
        settings: StateSettings,
        *,
        is_embedded: bool,
        clock: Callable[[], float],
        metrics: Metrics | None = None,
    ) -> None:
        self.redis = redis
        """Answers are bytes; every key starts with ``sala:``."""
        self.scripts: Scripts = LuaStore() if is_embedded else redis
        """Runs the scripts of the limits' books; embedded, these have a store of their own."""
        self.is_embedded = is_embedded
        self._settings = settings
        self._clock = clock
        self.num_losses = 0
        """How often the state went away; what was kept here meanwhile has to be entered after each."""
        self._lost_at_s: float | None = None
        self._is_checked = is_embedded
        self._metrics = metrics or Metrics()
        self._metrics.set_state_up(True)

    @classmethod
    def create(
        cls,
        settings: StateSettings,
        *,
        clock: Callable[[], float],
        metrics: Metrics | None = None,
    ) -> State:
        """Make the pool or the embedded store; nothing is connected yet.

        Args:
            settings: where the state lives.
            clock: monotonic seconds.
            metrics: say whether it answers; none: of its own.
        """
        if settings.url is None:
            # only here, since it takes a while and a gateway with Redis never needs it
            from fakeredis import FakeAsyncRedis, FakeServer

            server = FakeServer(version=OLDEST_VERSION)
            embedded: Redis = FakeAsyncRedis(
                server=server,
                version=OLDEST_VERSION,
                protocol=2,
                connection_pool_class=BlockingConnectionPool,
                max_connections=settings.max_connections,
                timeout=None,  # busy is not away
            )
            _make_cancellable(embedded.connection_pool)
            return cls(embedded, settings, is_embedded=True, clock=clock, metrics=metrics)
        pool = BlockingConnectionPool.from_url(
            settings.url.get_secret_value(),
            protocol=2,  # the shapes of answers that the embedded store gives too
            max_connections=settings.max_connections,
            timeout=settings.command_timeout_s,
            socket_timeout=settings.command_timeout_s,
            socket_connect_timeout=settings.command_timeout_s,
            # a command that may have run must not run again behind its sender's back
            retry=Retry(NoBackoff(), 0),
        )
        _make_cancellable(pool)
        redis = Redis.from_pool(pool)
        return cls(redis, settings, is_embedded=False, clock=clock, metrics=metrics)

    @property
    def is_available(self) -> bool:
        """Whether the last thing asked was answered."""
        return self._lost_at_s is None

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Run commands; while the state is away none is tried.

        Raises:
            StateUnavailable: Redis is away, or went away in the block, in which case a command may have
                run all the same.
        """
        if not self.is_available:
            raise StateUnavailable("The gateway's shared state is not available; please retry.")
        try:
            yield
        except _AWAY as error:
            self._lose(error)
            message = "The gateway's shared state is not available; please retry."
            raise StateUnavailable(message) from error

    async def run(self) -> None:
        """Watch whether Redis answers, until cancelled."""
        while not self.is_embedded:
            await self.check()
            # a loss noticed by a command is looked at again soon, not at once
            await asyncio.sleep(self._settings.watch_interval_s)

    async def check(self) -> None:
        """Ask Redis once; note that it is away, or is back."""
        try:
            if not (self._is_checked and self.is_available):
                await self._check_server()
            # a write: one that is full, or has become a replica, answers a ping
            await self.redis.set(_WATCH_KEY, b"1", px=60_000)
        except _AWAY as error:
            self._lose(error)
        except RedisError as error:  # answers, but not to us: no permission, too old
            self._lose(error)
        else:
            self._is_checked = True
            self._regain()

    async def close(self) -> None:
        """Close all connections."""
        await self.redis.aclose(close_connection_pool=True)

    async def _check_server(self) -> None:
        """Look at what kind of Redis came (back)."""
        info = await self.redis.info()
        version = str(info.get("redis_version", "0"))
        if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_VERSION:
            raise RedisError(f"Redis {version} is too old, 6.2 is needed")
        if (policy := info.get("maxmemory_policy", "noeviction")) != "noeviction":
            logger.warning(
                "Redis has maxmemory-policy %s: it may drop keys and jobs; set noeviction", policy
            )

    def _lose(self, error: Exception) -> None:
        if self._lost_at_s is None:
            # the class alone: a message may hold the URL, which may hold a password
            logger.error("the shared state is away: %s", type(error).__name__)
            self.num_losses += 1
            self._metrics.state_lost()
            self._metrics.set_state_up(False)
            self._lost_at_s = self._clock()

    def _regain(self) -> None:
        if self._lost_at_s is not None:
            logger.warning("the shared state is back after %.1f s", self._clock() - self._lost_at_s)
            self._lost_at_s = None
            self._metrics.set_state_up(True)
