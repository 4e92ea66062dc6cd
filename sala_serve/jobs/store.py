"""The store of jobs: what any replica may do to a job, and what only the worker that holds it may.

Every change is one Lua script (``scripts.py``). A worker's changes carry the token of its lease; a worker that
lost its lease, because it was silent for too long or because the job was cancelled, cannot append, nor
complete, nor fail the job: :class:`LeaseLost` tells it to stop.
"""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any, cast

from sala_serve.errors import InsufficientQuota, NotFound
from sala_serve.jobs import scripts
from sala_serve.jobs.model import Event, Job, Lease, Status, dump
from sala_serve.jobs.shelf import Shelf

if TYPE_CHECKING:
    from collections.abc import (
        AsyncGenerator,
        Callable,
        Collection,
        Coroutine,
        Mapping,
        Sequence,
    )

    from sala_serve.jobs.model import Lane
    from sala_serve.jobs.settings import JobsSettings
    from sala_serve.state import State

_EVENTS_PER_READ = 500
_FOLLOW_POLL_S = 0.25
_BATCH_BYTES_PER_TENANT = 64 * 1024**2
"""What is known of its batches, tens of thousands, apart from their files."""


class LeaseLost(Exception):  # noqa: N818 - named for what happened
    """The job is no longer this worker's."""


class JobStore:
    """Jobs of all tenants, shared by all replicas.

    Args:
        state: where they are kept.
        settings: leases, retention, bounds.
        now_ms: another clock than Redis' own, for tests.
    """

    def __init__(
        self, state: State, settings: JobsSettings, *, now_ms: Callable[[], int] | None = None
    ) -> None:
        self.settings = settings
        self._state = state
        self._now_ms = now_ms
        self._listeners: dict[str, set[asyncio.Event]] = {}
        self.submitted = {"response": asyncio.Event(), "batch": asyncio.Event()}
        """Set when this replica has queued a job of a lane, for its workers to look at once."""
        redis = state.redis
        self._submit = redis.register_script(scripts.SUBMIT)
        self._lease = redis.register_script(scripts.LEASE)
        self._heartbeat = redis.register_script(scripts.HEARTBEAT)
        self._append = redis.register_script(scripts.APPEND)
        self._update = redis.register_script(scripts.UPDATE)
        self._finish = redis.register_script(scripts.FINISH)
        self._release = redis.register_script(scripts.RELEASE)
        self._delete = redis.register_script(scripts.DELETE)
        self._counts = redis.register_script(scripts.COUNTS)
        self._cancel = redis.register_script(scripts.CANCEL)
        self._touch = redis.register_script(scripts.TOUCH)
        self._shelves = {lane: Shelf(state, lane, now_ms=now_ms) for lane in self.submitted}

    # what any replica may do

    async def submit(
        self,
        job_id: str,
        lane: Lane,
        tenant_id: str,
        *,
        document: Mapping[str, Any],
        created_unix_s: float,
        spec: Mapping[str, Any] | None = None,
        outcome: Status | None = None,
        input_items: Any = None,
        events: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        """Store a job for the workers to run, or one that is over.

        Args:
            job_id: from :func:`new_id`.
            lane: which workers run it.
            tenant_id: its owner.
            document: the object as its owner sees it from now on.
            created_unix_s: when it was asked for.
            spec: what the worker needs, if one is to run it.
            outcome: how it has ended, if it has; one step stores it and its end, so that a caller who is cut
                off, or a store that is, leaves no job that runs for ever.
            input_items: what a later response builds on.
            events: the first ones of its stream; ``None``: no stream is kept.

        Raises:
            InsufficientQuota: the tenant has too much stored.
            StateUnavailable: the store is away.
        """
        assert (spec is None) == (outcome is not None and outcome.is_final)
        large = {"spec": spec, "input": input_items}
        bodies = {
            name: await asyncio.to_thread(dump, value)
            for name, value in large.items()
            if value is not None
        }
        bound = self._max_bytes(lane)
        arguments: list[str | bytes | int] = [
            *(job_id, lane, tenant_id, outcome or Status.QUEUED),
            *(int(created_unix_s * 1000), dump(document), int(events is not None)),
            *(sum(map(len, bodies.values())), int(self._keep_s(lane) * 1000)),
            *(self._now(), bound),
            *(dump(event) for event in events or ()),
        ]

        async def store() -> None:
            with self._state.guarded():
                for name, value in bodies.items():
                    # until the job exists, so that a crash in between leaves nothing for ever
                    await self._state.redis.set(f"sala:job:{job_id}:{name}", value, px=3_600_000)
                fits = await cast("Any", self._submit(args=arguments))
            if not fits:
                raise InsufficientQuota(
                    f"Your stored {lane} objects would be larger than {bound} bytes together; delete some first."
                )

        # also when the client leaves meanwhile, so that no bodies lie about for an hour
        await to_its_end(store())
        if spec is not None:
            self.submitted[lane].set()

    async def find(self, tenant_id: str, job_id: str, lane: Lane) -> Job:
        """Return a tenant's job.

        Raises:
            NotFound: there is none with this identity, or it is another tenant's.
        """
        with self._state.guarded():
            record = await cast("Any", self._state.redis.hgetall(f"sala:job:{job_id}"))
        if (
            not record
            or record.get(b"tenant") != tenant_id.encode()
            or record[b"lane"] != lane.encode()
        ):
            raise not_found(lane, job_id)
        status = Status(record[b"status"].decode())
        progress = json.loads(record[b"progress"])
        if status is Status.QUEUED:
            with self._state.guarded():
                rank = await cast(
                    "Any", self._state.redis.lpos(f"sala:jobs:{lane}:ready:{tenant_id}", job_id)
                )
            progress = {"phase": "queued"} | ({} if rank is None else {"place": int(rank) + 1})
        return Job(
            job_id=job_id,
            lane=lane,
            tenant_id=tenant_id,
            status=status,
            created_unix_s=int(record[b"created"]) / 1000,
            attempt=int(record[b"attempt"]),
            document=json.loads(record[b"doc"]),
            progress=progress,
            has_events=record[b"events"] == b"1",
            cancel_asked_unix_s=float(record[b"cancel"]) if b"cancel" in record else None,
            counts={
                name[2:].decode(): int(value)
                for name, value in record.items()
                if name.startswith(b"n:")
            },
        )

    async def input_items(self, job: Job) -> Any:
        """Return what ``job`` was stored with as ``input_items``; ``None`` if nothing."""
        with self._state.guarded():
            body = await self._state.redis.get(f"sala:job:{job.job_id}:input")
        return None if body is None else await asyncio.to_thread(json.loads, body)

    async def page(
        self,
        tenant_id: str,
        lane: Lane,
        *,
        after: str | None,
        limit: int,
        newest_first: bool = True,
    ) -> list[Job] | None:
        """Return a tenant's jobs in order of creation; ``None`` if there is no job ``after``."""
        ids = await self._shelves[lane].page(
            tenant_id, after=after, limit=limit, newest_first=newest_first
        )
        if ids is None:
            return None
        jobs = []
        for job_id in ids:
            try:
                jobs.append(await self.find(tenant_id, job_id, lane))
            except NotFound:  # expired in between
                continue
        return jobs

    async def ask_cancel(self, job: Job, unix_s: float) -> bool:
        """Ask the worker that holds ``job``, or will, to end it in its own way; tell whether it is not over."""
        with self._state.guarded():
            is_asked = await cast("Any", self._cancel(args=[job.job_id, unix_s]))
        return bool(is_asked)

    async def finish_from_outside(
        self,
        job: Job,
        status: Status,
        document: Mapping[str, Any],
        *,
        events: Sequence[Mapping[str, Any]] = (),
    ) -> bool:
        """End a job that is not over, whoever runs it; a worker's lease on it is void at once.

        Returns:
            Whether it was this call that ended it.
        """
        return await self._end(job.job_id, "", job.lane, status, document, events=events, dead=None)

    async def delete(self, job: Job) -> None:
        """Remove a job and all that is stored of it; a worker that runs it stops."""
        with self._state.guarded():
            await self._delete(args=[job.job_id])
        self._ring(job.job_id)

    async def touch(self, job: Job) -> None:
        """Keep a finished job for as long as if it had finished now."""
        keep_ms = int(self._keep_s(job.lane) * 1000)
        with self._state.guarded():
            await self._touch(args=[job.job_id, self._now(), keep_ms])

    async def events(self, job_id: str, after: int) -> list[Event]:
        """Return stored events with a sequence number above ``after``, some hundreds at a time."""
        with self._state.guarded():
            entries = await cast(
                "Any",
                self._state.redis.xrange(
                    f"sala:job:{job_id}:events", min=f"{after + 2}-0", count=_EVENTS_PER_READ
                ),
            )
        return [Event(int(entry.partition(b"-")[0]) - 1, value[b"e"]) for entry, value in entries]

    async def follow(self, job: Job, after: int) -> AsyncGenerator[Event | Job]:
        """Yield the events of ``job`` above ``after``, and itself now and then, until it is over.

        The job comes after every look that found no new event, four times a second, so that the caller can
        show its progress and notice a client that has gone.

        Raises:
            NotFound: it was deleted meanwhile.
        """
        changed = asyncio.Event()
        self._listeners.setdefault(job.job_id, set()).add(changed)
        try:
            while True:
                changed.clear()
                # read before the events, so that a final status means that none is missing
                job = await self.find(job.tenant_id, job.job_id, job.lane)
                while events := await self.events(job.job_id, after):
                    for event in events:
                        yield event
                    after = events[-1].sequence_number
                if job.status.is_final:
                    return
                yield job
                try:
                    async with asyncio.timeout(_FOLLOW_POLL_S):
                        await changed.wait()
                except TimeoutError:
                    pass
        finally:
            self._listeners[job.job_id].discard(changed)
            if not self._listeners[job.job_id]:
                del self._listeners[job.job_id]

    # what workers do

    async def lease(self, lane: Lane, *, except_tenants: Collection[str] = ()) -> Lease | None:
        """Take the next job: tenants in turn, each one's oldest first; ``None`` if there is none.

        Jobs whose worker has been silent for ``lease_s`` are taken over here.
        """
        lease_ms = int(self.settings.lease_s * 1000)
        with self._state.guarded():
            answer = await cast(
                "Any", self._lease(args=[lane, self._now(), lease_ms, *except_tenants])
            )
            if answer is None:
                return None
            job_id = answer[0].decode()
            spec = await self._state.redis.get(f"sala:job:{job_id}:spec")
        if spec is None:  # deleted in this moment
            return None
        return Lease(
            job_id=job_id,
            lane=lane,
            tenant_id=answer[1].decode(),
            token=int(answer[2]),
            attempt=int(answer[3]),
            last_sequence_number=int(answer[4]),
            age_s=int(answer[5]) / 1000,
            spec=await asyncio.to_thread(json.loads, spec),
        )

    async def heartbeat(self, lane: Lane, leases: Sequence[Lease]) -> list[int]:
        """Renew leases; for each 0: lost, 1: held, 2: held, and its owner wants the job cancelled."""
        if not leases:
            return []
        pairs = [part for lease in leases for part in (lease.job_id, lease.token)]
        lease_ms = int(self.settings.lease_s * 1000)
        with self._state.guarded():
            answers = await cast("Any", self._heartbeat(args=[lane, self._now(), lease_ms, *pairs]))
        return [int(each) for each in answers]

    async def was_ended_by_owner(self, job_id: str) -> bool:
        """Tell whether a job was cancelled or deleted."""
        with self._state.guarded():
            status = await cast("Any", self._state.redis.hget(f"sala:job:{job_id}", "status"))
        return status is None or Status(status.decode()) is Status.CANCELLED

    async def append(self, lease: Lease, events: Sequence[Mapping[str, Any]]) -> None:
        """Add output events.

        Raises:
            LeaseLost: the job is somebody else's, over or deleted; nothing was added.
        """
        with self._state.guarded():
            last = await cast(
                "Any",
                self._append(args=[lease.job_id, lease.token, *(dump(each) for each in events)]),
            )
        if last is None:
            raise LeaseLost
        self._ring(lease.job_id)

    async def update(
        self,
        lease: Lease,
        *,
        document: Mapping[str, Any] | None = None,
        progress: Mapping[str, Any] | None = None,
    ) -> None:
        """Change what the owner sees of a running job; raises like :meth:`append`."""
        fields = {"doc": document, "progress": progress}
        pairs = [
            part
            for name, value in fields.items()
            if value is not None
            for part in (name, dump(value))
        ]
        with self._state.guarded():
            is_held = await cast("Any", self._update(args=[lease.job_id, lease.token, *pairs]))
        if not is_held:
            raise LeaseLost
        self._ring(lease.job_id)

    async def finish(
        self,
        lease: Lease,
        status: Status,
        document: Mapping[str, Any],
        *,
        events: Sequence[Mapping[str, Any]] = (),
        dead: str | None = None,
    ) -> None:
        """End a job, once and for all.

        Args:
            lease: the right to.
            status: a final one.
            document: what its owner sees from now on.
            events: the last ones of its stream.
            dead: why it is written to the dead letter; ``None``: it is not.

        Raises:
            LeaseLost: as for :meth:`append`; nothing has changed.
        """
        is_ended = await self._end(
            *(lease.job_id, str(lease.token), lease.lane, status, document),
            events=events,
            dead=dead,
        )
        if not is_ended:
            raise LeaseLost

    async def release(self, lease: Lease, *, delay_s: float = 0, is_attempt: bool = True) -> None:
        """Give a job back for another attempt; raises like :meth:`append`.

        Args:
            lease: the right to.
            delay_s: until it may be taken again.
            is_attempt: whether this start counts; not if it was the gateway's own stop that ended it.
        """
        delay_ms = int(delay_s * 1000)
        with self._state.guarded():
            is_held = await cast(
                "Any",
                self._release(
                    args=[lease.job_id, lease.token, delay_ms, self._now(), int(is_attempt)]
                ),
            )
        if not is_held:
            raise LeaseLost
        self._ring(lease.job_id)
        if not delay_ms:
            self.submitted[lease.lane].set()

    async def counts(self, lane: Lane) -> Mapping[str, int]:
        """Return how many jobs of a lane are ``queued``, ``in_progress`` and ``dead``."""
        with self._state.guarded():
            answer = await cast("Any", self._counts(args=[lane]))
        names = (Status.QUEUED.value, Status.RUNNING.value, "dead")
        return dict(zip(names, map(int, answer), strict=True))

    # inside

    async def _end(
        self,
        job_id: str,
        token: str,
        lane: Lane,
        status: Status,
        document: Mapping[str, Any],
        *,
        events: Sequence[Mapping[str, Any]],
        dead: str | None,
    ) -> bool:
        assert status.is_final
        keep_s = self._keep_s(lane)
        with self._state.guarded():
            is_ended = await cast(
                "Any",
                self._finish(
                    args=[
                        *(job_id, token, status.value, dump(document), self._now()),
                        int(keep_s * 1000),
                        int(min(self.settings.event_retention_s, keep_s) * 1000),
                        dead or "",
                        *(dump(event) for event in events),
                    ]
                ),
            )
        if is_ended:
            self._ring(job_id)
        return bool(is_ended)

    def _max_bytes(self, lane: Lane) -> int:
        is_response = lane == "response"
        return self.settings.response_bytes_per_tenant if is_response else _BATCH_BYTES_PER_TENANT

    def _keep_s(self, lane: Lane) -> float:
        settings = self.settings
        return settings.response_retention_s if lane == "response" else settings.batch_retention_s

    def _ring(self, job_id: str) -> None:
        for changed in self._listeners.get(job_id, ()):
            changed.set()

    def _now(self) -> str | int:
        return "" if self._now_ms is None else self._now_ms()


def not_found(lane: Lane, job_id: str) -> NotFound:
    """Return the error for an object that a tenant does not have."""
    shown = job_id if len(job_id) <= 80 and job_id.isprintable() else "..."
    return NotFound(f"There is no {lane} with the id '{shown}'.")


async def to_its_end(work: Coroutine[Any, Any, None]) -> None:
    """Await ``work``, which takes milliseconds, also if this is cancelled meanwhile."""
    task = asyncio.create_task(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError as error:
            cancelled = error
    failure = None if task.cancelled() else task.exception()
    if (ended_by := cancelled or failure) is not None:
        raise ended_by
