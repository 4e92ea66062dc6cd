"""The workers of one replica: they take jobs, show that they live, and end each job or hand it back."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from contextlib import suppress
from typing import TYPE_CHECKING, Protocol

from sala_serve.errors import (
    EngineFailed,
    EngineLost,
    EngineStuck,
    EngineTimeout,
    EngineUnavailable,
    FirstTokenTimeout,
    GatewayError,
    InternalError,
    Overloaded,
    QueueFull,
    QueueTimeout,
    RateLimited,
    ShuttingDown,
    StateUnavailable,
)
from sala_serve.jobs.store import LeaseLost

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from sala_serve.jobs.model import Lane, Lease
    from sala_serve.jobs.settings import JobsSettings
    from sala_serve.jobs.store import JobStore

logger = logging.getLogger(__name__)

WAITS = (
    *(EngineUnavailable, Overloaded, QueueFull, QueueTimeout, RateLimited, ShuttingDown),
    StateUnavailable,
)
"""The job has not begun and can wait: tried again until its queue timeout, not counted as an attempt."""
RETRIES = (EngineLost, EngineStuck, EngineTimeout, EngineFailed, FirstTokenTimeout, InternalError)
"""The job had begun: tried again, ``max_attempts`` times in all."""
_LONGEST_BACKOFF_S = 60.0
_HAND_BACK_TIMEOUT_S = 2.0


def delay_s(settings: JobsSettings, error: GatewayError, num_attempts: int) -> float:
    """Return how long to wait after so many attempts, the last of which ended with ``error``, in seconds."""
    backoff_s = min(settings.backoff_s * 2.0 ** max(num_attempts - 1, 0), _LONGEST_BACKOFF_S)
    if isinstance(error, RateLimited | QueueFull):  # else it is advice for who cannot look
        return float(error.headers.get("Retry-After", backoff_s))
    return backoff_s


class Held:
    """A job that runs in this process."""

    def __init__(self, lease: Lease) -> None:
        self.lease = lease
        self.is_cancel_asked = asyncio.Event()
        """Set when the job's owner wants it cancelled and leaves it to the worker."""
        self.is_lost = False
        """Whether the lease is void, so that nothing may be written any more."""
        self.is_ended_by_owner = False
        """Whether it was cancelled or deleted, so that what was computed is charged."""
        self.is_stopping = asyncio.Event()
        """Set when this replica stops: what can be left to another one should be."""
        self.has_begun = False
        """Whether an engine works on it, so that another replica would have to begin again."""

    async def note_loss(self, store: JobStore) -> None:
        """Find out, before the generation of a lost job is broken off, whether its owner ended it."""
        with suppress(StateUnavailable):
            self.is_ended_by_owner = await store.was_ended_by_owner(self.lease.job_id)


class Runner(Protocol):
    """Knows what a lane's jobs are."""

    async def run(self, held: Held) -> None:
        """Run a job and end it with :meth:`JobStore.finish`.

        Raises:
            LeaseLost: it is no longer ours.
            GatewayError: it failed; the worker decides whether it is tried again.
        """

    async def fail(self, lease: Lease, error: GatewayError, *, dead: str | None) -> None:
        """End a job with an error, once and for all."""


class Workers:
    """Runs up to ``max_running`` jobs of one lane.

    Args:
        store: where the jobs are.
        lane: whose jobs.
        runner: runs one.
        max_running: at the same time. No tenant holds more than half of them, rounded up.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        store: JobStore,
        lane: Lane,
        runner: Runner,
        *,
        max_running: int,
        clock: Callable[[], float],
    ) -> None:
        self._store = store
        self._settings: JobsSettings = store.settings
        self._lane: Lane = lane
        self._runner = runner
        self._max_running = max_running
        self._clock = clock
        self._tasks: dict[asyncio.Task[None], Held] = {}
        self._changed = store.submitted[lane]
        self._idle = asyncio.Event()
        self._idle.set()
        self.is_draining = False

    def __len__(self) -> int:
        return len(self._tasks)

    async def run(self) -> None:
        """Work until cancelled; then what still runs is handed back for another replica."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._beat())
            await self._take(group.create_task)

    async def wait_idle(self) -> None:
        """Wait until no job runs here."""
        await self._idle.wait()

    def drain(self, *, hands_back: bool) -> None:
        """Take no more jobs and tell those that run.

        Args:
            hands_back: whether those that no engine works on yet are given to another replica at once.
        """
        self.is_draining = True
        for task, held in self._tasks.items():
            held.is_stopping.set()
            if hands_back and not held.has_begun:
                task.cancel()

    async def _take(
        self, start: Callable[[Coroutine[None, None, None]], asyncio.Task[None]]
    ) -> None:
        while True:
            self._changed.clear()
            while (lease := await self._next()) is not None:
                held = Held(lease)
                task = start(self._attend(held))
                self._tasks[task] = held
                self._idle.clear()
                task.add_done_callback(self._forget)
            try:
                async with asyncio.timeout(self._settings.poll_s):
                    await self._changed.wait()
            except TimeoutError:
                pass

    async def _next(self) -> Lease | None:
        if self.is_draining or len(self._tasks) >= self._max_running:
            return None
        share = (self._max_running + 1) // 2
        running = Counter(held.lease.tenant_id for held in self._tasks.values())
        full = [tenant_id for tenant_id, num in running.items() if num >= share]
        try:
            return await self._store.lease(self._lane, except_tenants=full)
        except StateUnavailable:
            return None

    def _forget(self, task: asyncio.Task[None]) -> None:
        del self._tasks[task]
        if not self._tasks:
            self._idle.set()
        self._changed.set()  # a place is free

    async def _attend(self, held: Held) -> None:
        lease = held.lease
        try:
            try:
                if lease.attempt > self._settings.max_attempts:
                    raise InternalError("The server stopped each time it worked on this request.")
                await self._runner.run(held)
            except GatewayError as error:
                await self._failed(lease, error)
            except asyncio.CancelledError:
                if held.is_lost:
                    return
                async with asyncio.timeout(_HAND_BACK_TIMEOUT_S):
                    await self._store.release(lease, is_attempt=False)
                raise
            except (LeaseLost, TimeoutError):
                raise
            except Exception:
                logger.exception("job %s failed", lease.job_id)
                await self._failed(lease, InternalError("The gateway failed on this request."))
        except LeaseLost:
            logger.info("job %s is no longer ours", lease.job_id)
        except GatewayError as error:
            # nothing can be written; the lease ends by itself and somebody takes the job over
            logger.warning("job %s is left behind: %s", lease.job_id, error.code)
        except TimeoutError:
            logger.warning("job %s could not be handed back in time", lease.job_id)

    async def _failed(self, lease: Lease, error: GatewayError) -> None:
        next_s = delay_s(self._settings, error, lease.attempt)
        if isinstance(error, WAITS):
            if not self._is_overdue(lease):
                await self._store.release(lease, delay_s=next_s, is_attempt=False)
                return
        elif isinstance(error, RETRIES) and lease.attempt < self._settings.max_attempts:
            logger.warning(
                "job %s attempt %d: %s, again in %.1f s",
                *(lease.job_id, lease.attempt, error.code, next_s),
            )
            await self._store.release(lease, delay_s=next_s)
            return
        is_dead = isinstance(error, (*RETRIES, *WAITS))
        try:
            await self._runner.fail(lease, error, dead=error.code if is_dead else None)
        except (GatewayError, LeaseLost):
            raise
        except Exception:  # somebody takes it over and gets here again
            logger.exception("job %s cannot be ended", lease.job_id)

    def _is_overdue(self, lease: Lease) -> bool:
        return lease.age_s > self._settings.queue_timeout_s

    async def _beat(self) -> None:
        renewed_at_s = self._clock()
        while True:
            await asyncio.sleep(self._settings.heartbeat_s)
            held = {task: each for task, each in self._tasks.items() if not each.is_lost}
            asked_at_s = self._clock()
            try:
                answers = await self._store.heartbeat(
                    self._lane, [each.lease for each in held.values()]
                )
                renewed_at_s = asked_at_s
            except StateUnavailable:
                if asked_at_s - renewed_at_s < self._settings.lease_s:
                    continue
                answers = [0] * len(held)  # by now another replica may run them
            for (task, each), answer in zip(held.items(), answers, strict=True):
                if answer == 0 and task in self._tasks:
                    each.is_lost = True
                    await each.note_loss(self._store)
                    task.cancel()
                elif answer == 2:
                    each.is_cancel_asked.set()
