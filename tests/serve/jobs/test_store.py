"""The store of jobs, in this process and on a real Redis."""

import asyncio
import json

import pytest

from sala_serve.errors import InsufficientQuota, NotFound
from sala_serve.jobs.lines import LineResults
from sala_serve.jobs.model import Status, new_id
from sala_serve.jobs.settings import JobsSettings
from sala_serve.jobs.store import JobStore, LeaseLost


class Clock:
    """Milliseconds that a test sets."""

    def __init__(self):
        self.ms = 1_795_000_000_000

    def __call__(self):
        return self.ms

    def pass_s(self, seconds):
        self.ms += int(seconds * 1000)


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def store(state, clock):
    return JobStore(state, JobsSettings(lease_s=10, response_bytes_per_tenant=2000), now_ms=clock)


async def submit(store, clock, tenant="alice", spec=None, **more):
    job_id = new_id("resp_")
    await store.submit(
        job_id,
        "response",
        tenant,
        document={"id": job_id},
        created_unix_s=clock.ms / 1000,
        spec={"n": 1} if spec is None else spec or None,
        **more,
    )
    return job_id


async def test_a_job_that_is_over_is_stored_with_its_end_in_one_step(store, state, clock):
    job_id = new_id("resp_")
    await store.submit(
        job_id,
        "response",
        "alice",
        document={"id": job_id},
        created_unix_s=clock.ms / 1000,
        outcome=Status.COMPLETED,
        input_items=["Hello"],
    )
    job = await store.find("alice", job_id, "response")
    assert job.status is Status.COMPLETED
    assert await store.input_items(job) == ["Hello"]
    assert await store.lease("response") is None
    for key in (f"sala:job:{job_id}", f"sala:job:{job_id}:input"):
        assert await state.redis.ttl(key) == pytest.approx(
            store.settings.response_retention_s, abs=60
        )


@pytest.mark.parametrize("is_over", [True, False], ids=["over", "queued"])
async def test_whoever_stores_a_job_may_leave_at_any_point(store, state, clock, is_over):
    how = {"outcome": Status.COMPLETED} if is_over else {"spec": {"n": 1}}
    num_cancelled = 0
    for num_rounds in range(1, 40):
        job_id = new_id("resp_")
        created_unix_s = clock.ms / 1000
        submitting = store.submit(
            job_id, "response", "alice", document={}, created_unix_s=created_unix_s, **how
        )
        task = asyncio.create_task(submitting)
        for _ in range(num_rounds):
            await asyncio.sleep(0)
        num_cancelled += task.cancel()
        await asyncio.wait({task})
        # all of it is there, or nothing
        is_there = await state.redis.exists(f"sala:job:{job_id}")
        assert is_there == await state.redis.hexists("sala:shelf:response:alice:bytes", job_id)
        if is_there:
            status = await state.redis.hget(f"sala:job:{job_id}", "status")
            assert status == (b"completed" if is_over else b"queued")
            assert (await state.redis.ttl(f"sala:job:{job_id}") > 0) == is_over
            assert is_over or await state.redis.ttl(f"sala:job:{job_id}:spec") == -1
        else:
            assert not await state.redis.exists(f"sala:job:{job_id}:spec")
    assert num_cancelled > 3


class Crash(Exception):  # noqa: N818 - named for what happens
    """The replica ends here, in the middle of what it does."""


def crash_before(state, monkeypatch, num_commands):
    """Let the state take so many commands, and no more."""
    execute, left = state.redis.execute_command, iter(range(num_commands))

    async def execute_or_crash(*arguments, **named):
        if next(left, None) is None:
            raise Crash
        return await execute(*arguments, **named)

    monkeypatch.setattr(state.redis, "execute_command", execute_or_crash)


async def check_books(redis):
    """What counts is what is there; what is there and does not count goes by itself."""
    keys = [key.decode() async for key in redis.scan_iter("sala:job:*")]
    jobs = {key for key in keys if key.count(":") == 2}
    shelf = "sala:shelf:response:alice"
    counted = await redis.hgetall(f"{shelf}:bytes")
    assert {f"sala:job:{job_id.decode()}" for job_id in counted} == jobs
    assert set(await redis.zrange(f"{shelf}:index", 0, -1)) == set(counted)
    assert int(await redis.get(f"{shelf}:total") or 0) == sum(map(int, counted.values()))
    may_go = await redis.zrange(f"{shelf}:expiry", 0, -1)
    assert {f"sala:job:{job_id.decode()}" for job_id in may_go} == {
        job for job in jobs if Status((await redis.hget(job, "status")).decode()).is_final
    }
    for key in keys:
        is_lost = ":".join(key.split(":")[:3]) not in jobs
        assert not is_lost or await redis.ttl(key) > 0


@pytest.mark.parametrize("what", ["queue", "store", "finish", "delete", "touch", "make room"])
async def test_whatever_a_crash_breaks_off_the_books_are_right(state, clock, monkeypatch, what):
    settings = JobsSettings(response_bytes_per_tenant=1000)
    store = JobStore(state, settings, now_ms=clock)
    over = {"outcome": Status.COMPLETED, "input_items": ["Hello"]}
    num_crashes = 0
    while True:
        if what == "queue":
            doing = submit(store, clock, input_items=["Hello"], events=[{"type": "a"}])
        elif what == "store":
            doing = submit(store, clock, spec=False, **over)
        elif what == "make room":
            await submit(store, clock, spec=False, **(over | {"input_items": ["x" * 500]}))
            doing = submit(store, clock, spec={"x": "x" * 500})
        else:
            job_id = await submit(store, clock, input_items=["Hello"])
            lease = await store.lease("response")
            if what == "finish":
                doing = store.finish(lease, Status.COMPLETED, {"x": "y" * 50})
            else:
                await store.finish(lease, Status.COMPLETED, {})
                job = await store.find("alice", job_id, "response")
                doing = store.delete(job) if what == "delete" else store.touch(job)
        with monkeypatch.context() as patch:
            crash_before(state, patch, num_crashes)
            try:
                await doing
            except Crash:
                num_crashes += 1
            else:
                break
        await check_books(state.redis)
        await state.redis.flushall()
    assert num_crashes
    await check_books(state.redis)


async def test_a_job_is_leased_once_and_finished_once(store, clock):
    job_id = await submit(store, clock, spec={"prompt": "中文"}, events=[{"type": "created"}])
    lease = await store.lease("response")
    assert (lease.job_id, lease.tenant_id, lease.attempt) == (job_id, "alice", 1)
    assert lease.spec == {"prompt": "中文"}
    assert lease.last_sequence_number == 0
    assert await store.lease("response") is None
    await store.append(lease, [{"type": "a"}, {"type": "b"}])
    await store.finish(lease, Status.COMPLETED, {"done": True}, events=[{"type": "end"}])
    job = await store.find("alice", job_id, "response")
    assert (job.status, job.document) == (Status.COMPLETED, {"done": True})
    events = await store.events(job_id, -1)
    assert [each.sequence_number for each in events] == [0, 1, 2, 3]
    assert [json.loads(each.body)["type"] for each in events] == ["created", "a", "b", "end"]
    for late in (
        store.append(lease, [{"type": "late"}]),
        store.finish(lease, Status.FAILED, {"done": False}),
        store.update(lease, document={"late": 1}),
        store.release(lease),
    ):
        with pytest.raises(LeaseLost):
            await late
    assert await store.find("alice", job_id, "response") == job
    assert len(await store.events(job_id, -1)) == 4
    assert await store.lease("response") is None


async def test_a_silent_workers_job_is_taken_over_and_the_old_worker_can_write_nothing(
    store, clock
):
    job_id = await submit(store, clock, events=[])
    first = await store.lease("response")
    await store.append(first, [{"type": "a"}])
    clock.pass_s(9)
    assert await store.heartbeat("response", [first]) == [1]
    clock.pass_s(9)
    assert await store.lease("response") is None
    clock.pass_s(2)
    second = await store.lease("response")
    assert (second.job_id, second.attempt, second.last_sequence_number) == (job_id, 2, 0)
    assert second.age_s == 20
    assert await store.heartbeat("response", [first, second]) == [0, 1]
    with pytest.raises(LeaseLost):
        await store.append(first, [{"type": "b"}])
    with pytest.raises(LeaseLost):
        await store.finish(first, Status.COMPLETED, {"by": "first"})
    await store.finish(second, Status.COMPLETED, {"by": "second"})
    assert (await store.find("alice", job_id, "response")).document == {"by": "second"}


async def test_many_workers_that_race_for_jobs_get_each_once(store, clock):
    ids = [await submit(store, clock, tenant=f"t{index % 3}") for index in range(24)]
    leases = await asyncio.gather(*(store.lease("response") for _ in range(40)))
    assert sorted(lease.job_id for lease in leases if lease) == sorted(ids)


async def test_tenants_take_turns_however_many_jobs_one_has(store, clock):
    flood = [await submit(store, clock, tenant="flood") for _ in range(6)]
    other = [await submit(store, clock, tenant="other") for _ in range(2)]
    order = [(await store.lease("response")).job_id for _ in range(8)]
    assert set(order[:4]) == {*flood[:2], *other}
    assert [each for each in order if each in flood] == flood
    assert (await store.lease("response")) is None


async def test_a_tenant_that_is_full_is_passed_over(store, clock):
    await submit(store, clock, tenant="full")
    theirs = await submit(store, clock, tenant="other")
    assert (await store.lease("response", except_tenants=["full"])).job_id == theirs
    assert await store.lease("response", except_tenants=["full"]) is None
    assert (await store.lease("response")).tenant_id == "full"


async def test_a_released_job_comes_back_when_it_is_due(store, clock):
    await submit(store, clock)
    lease = await store.lease("response")
    await store.release(lease, delay_s=5)
    assert await store.lease("response") is None
    clock.pass_s(6)
    again = await store.lease("response")
    assert again.attempt == 2
    await store.release(again, is_attempt=False)
    assert (await store.lease("response")).attempt == 2


async def test_cancelling_from_outside_voids_the_lease(store, clock):
    job_id = await submit(store, clock, events=[])
    lease = await store.lease("response")
    job = await store.find("alice", job_id, "response")
    assert await store.finish_from_outside(job, Status.CANCELLED, {}, events=[{"type": "c"}])
    assert not await store.finish_from_outside(job, Status.CANCELLED, {})
    assert await store.heartbeat("response", [lease]) == [0]
    with pytest.raises(LeaseLost):
        await store.append(lease, [{"type": "late"}])
    assert len(await store.events(job_id, -1)) == 1


async def test_a_cancelled_job_that_waits_is_never_leased(store, clock):
    job_id = await submit(store, clock)
    job = await store.find("alice", job_id, "response")
    await store.finish_from_outside(job, Status.CANCELLED, {})
    assert await store.lease("response") is None


async def test_asking_to_cancel_reaches_the_worker_with_its_heartbeat(store, clock):
    job_id = await submit(store, clock)
    lease = await store.lease("response")
    job = await store.find("alice", job_id, "response")
    assert await store.ask_cancel(job, 12.5)
    assert await store.ask_cancel(job, 13.5)
    assert await store.heartbeat("response", [lease]) == [2]
    assert (await store.find("alice", job_id, "response")).cancel_asked_unix_s == 12.5
    await store.finish(lease, Status.CANCELLED, {})
    assert not await store.ask_cancel(job, 14.5)


async def test_other_tenants_and_other_lanes_find_nothing(store, clock):
    job_id = await submit(store, clock)
    for tenant, lane in (("bob", "response"), ("alice", "batch")):
        with pytest.raises(NotFound):
            await store.find(tenant, job_id, lane)


async def test_queue_place_is_that_among_the_tenants_own(store, clock):
    ids = [await submit(store, clock) for _ in range(3)]
    await submit(store, clock, tenant="bob")
    places = [(await store.find("alice", each, "response")).progress["place"] for each in ids]
    assert places == [1, 2, 3]


async def test_a_deleted_job_is_gone_with_all_its_keys(store, clock, state):
    job_id = await submit(store, clock, events=[{"type": "a"}], input_items=[1])
    lease = await store.lease("response")
    await store.delete(await store.find("alice", job_id, "response"))
    with pytest.raises(NotFound):
        await store.find("alice", job_id, "response")
    with pytest.raises(LeaseLost):
        await store.append(lease, [{"type": "late"}])
    clock.pass_s(60)
    assert await store.lease("response") is None
    assert [key async for key in state.redis.scan_iter(f"*{job_id}*")] == []


async def test_oldest_finished_jobs_give_way_and_running_ones_do_not(store, clock):
    async def finished():
        job_id = await submit(store, clock, spec={"x": "y" * 500})
        lease = await store.lease("response")
        await store.finish(lease, Status.COMPLETED, {"x": "z" * 500})
        clock.pass_s(1)
        return job_id

    first, second, third = [await finished() for _ in range(3)]
    await submit(store, clock, spec={"x": "y" * 600})
    with pytest.raises(NotFound):
        await store.find("alice", first, "response")
    await store.find("alice", second, "response")
    with pytest.raises(InsufficientQuota):
        await submit(store, clock, spec={"x": "y" * 1900})
    await store.find("alice", third, "response")  # a refusal evicts nothing
    await submit(store, clock, tenant="bob", spec={"x": "y" * 1900})


async def test_finished_jobs_expire_and_events_before_them(state, clock):
    settings = JobsSettings(response_retention_s=100, event_retention_s=10)
    store = JobStore(state, settings, now_ms=clock)
    job_id = await submit(store, clock, events=[], input_items=[1])
    assert await state.redis.pttl(f"sala:job:{job_id}") == -1
    assert await state.redis.pttl(f"sala:job:{job_id}:input") == -1
    lease = await store.lease("response")
    await store.append(lease, [{"type": "a"}])
    await store.finish(lease, Status.COMPLETED, {})
    assert 90_000 < await state.redis.pttl(f"sala:job:{job_id}") <= 100_000
    assert 90_000 < await state.redis.pttl(f"sala:job:{job_id}:input") <= 100_000
    assert 5_000 < await state.redis.pttl(f"sala:job:{job_id}:events") <= 10_000
    assert await state.redis.exists(f"sala:job:{job_id}:spec") == 0


async def test_following_yields_what_is_stored_and_what_comes_until_the_end(store, clock):
    job_id = await submit(store, clock, events=[{"type": "e0"}])
    lease = await store.lease("response")
    await store.append(lease, [{"type": "e1"}])
    job = await store.find("alice", job_id, "response")
    seen = []
    async for each in store.follow(job, 0):
        if hasattr(each, "sequence_number"):
            seen.append(each.sequence_number)
        elif len(seen) == 1:
            await store.append(lease, [{"type": "e2"}])
        else:
            await store.finish(lease, Status.COMPLETED, {}, events=[{"type": "e3"}])
    assert seen == [1, 2, 3]


async def test_a_batchs_line_is_written_and_counted_once_and_only_under_the_lease(
    store, clock, state
):
    lines = LineResults(state)
    job_id = await submit(store, clock)
    clock.pass_s(11)
    await store.lease("response")
    clock.pass_s(11)
    lease = await store.lease("response")
    assert lease.attempt == 2
    await lines.write(lease, 4, b"first", {"completed": 1, "input_tokens": 7})
    await lines.write(lease, 4, b"second", {"failed": 1})
    await lines.write(lease, 2, b"other", {"completed": 1, "input_tokens": 3})
    assert await lines.numbers(job_id) == [2, 4]
    assert await lines.read(job_id, [4, 2]) == [b"first", b"other"]
    job = await store.find("alice", job_id, "response")
    assert job.counts == {"completed": 2, "input_tokens": 10}
    clock.pass_s(11)
    # what moves is no poison, however often it changes hands
    assert (await store.lease("response")).attempt == 2
    with pytest.raises(LeaseLost):
        await lines.write(lease, 5, b"late", {"completed": 1})
    with pytest.raises(LeaseLost):
        await lines.read(job_id, [5])
