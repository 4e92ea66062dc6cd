"""Batches of one and of two replicas, with engines that play a script, on both stores."""

import asyncio
import json
import time
from contextlib import asynccontextmanager

import pytest

from sala_serve.errors import EngineLost, RateLimited
from sala_serve.jobs.batches import BatchRequest, batch_view
from sala_serve.jobs.files import PIECE_BYTES
from sala_serve.jobs.model import Status, new_id
from sala_serve.jobs.service import Jobs
from sala_serve.jobs.settings import JobsSettings
from sala_serve.jobs.store import LeaseLost
from sala_serve.tenants.model import Scopes

QUICK = {"heartbeat_s": 0.02, "poll_s": 0.02, "lease_s": 0.5, "backoff_s": 0.01, "max_attempts": 3}
ANSWER = [{"object": "chat.completion", "usage": {"prompt_tokens": 2, "completion_tokens": 1}}]


class Clock:
    """Unix seconds that a test moves."""

    def __init__(self):
        self.now_s = time.time()

    def __call__(self):
        return self.now_s


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def make_jobs(state, engines, clock):
    def make_jobs(**settings):
        settings = JobsSettings(**{**QUICK, **settings})
        return Jobs(settings, state=state, engines=engines, wall_clock=clock)

    engines.pieces = ANSWER
    return make_jobs


@asynccontextmanager
async def at_work(jobs):
    async with asyncio.TaskGroup() as group:
        running = group.create_task(jobs.run())
        try:
            yield running
        finally:
            running.cancel()


async def create(jobs, principal, num_lines):
    body = {"model": "sala", "messages": []}
    request = {"method": "POST", "url": "/v1/chat/completions", "body": body}
    writer = jobs.files.writer(principal.tenant.tenant_id, new_id("file-"))
    for index in range(num_lines):
        await writer.write(json.dumps({"custom_id": f"r{index}", **request}).encode() + b"\n")
    file = await writer.publish(filename="in", purpose="batch", keep_s=3600)
    asked = BatchRequest(file["id"], "/v1/chat/completions", None, None)
    job = await jobs.batches.create(principal, asked, request_id="r", trace_headers={})
    return job.job_id


async def until(jobs, principal, batch_id, condition):
    async with asyncio.timeout(20):
        while not condition(  # noqa: ASYNC110 - another replica may do it
            job := await jobs.batches.get(principal, batch_id)
        ):
            await asyncio.sleep(0.01)
    return job


async def ended(jobs, principal, batch_id):
    return batch_view(
        await until(jobs, principal, batch_id, lambda job: job.document["status"] in FINAL)
    )


FINAL = ("completed", "failed", "expired", "cancelled")


async def lines_of(jobs, principal, file_id):
    file = await jobs.files.find(principal.tenant.tenant_id, file_id)
    content = b"".join([piece async for piece in jobs.files.pieces(file)])
    return [json.loads(each) for each in content.splitlines()]


async def test_a_batch_whose_time_is_over_says_which_lines_were_not_run(
    make_jobs, engines, alice, clock
):
    jobs = make_jobs(batch_concurrency=1)
    engines.later = [[asyncio.Event()]]
    async with at_work(jobs):
        batch_id = await create(jobs, alice, 4)
        await until(jobs, alice, batch_id, lambda job: job.counts.get("completed"))
        clock.now_s += 24 * 3600
        batch = await ended(jobs, alice, batch_id)
    assert (batch["status"], engines.num_running) == ("expired", 0)
    assert batch["expired_at"] >= batch["expires_at"] == batch["created_at"] + 24 * 3600
    assert batch["request_counts"] == {"total": 4, "completed": 1, "failed": 3}
    (good,) = await lines_of(jobs, alice, batch["output_file_id"])
    assert good["custom_id"] == "r0"
    bad = await lines_of(jobs, alice, batch["error_file_id"])
    assert [each["custom_id"] for each in bad] == ["r1", "r2", "r3"]
    assert {each["error"]["code"] for each in bad} == {"batch_expired"}
    assert {each["response"] for each in bad} == {None}


async def test_a_batch_that_no_replica_ran_in_time_expires(make_jobs, engines, alice, clock):
    jobs = make_jobs()
    batch_id = await create(jobs, alice, 2)
    clock.now_s += 24 * 3600 + 5
    async with at_work(jobs):
        batch = await ended(jobs, alice, batch_id)
    assert (batch["status"], engines.requests) == ("expired", [])
    assert len(await lines_of(jobs, alice, batch["error_file_id"])) == 2


async def test_a_stopping_replica_leaves_the_rest_of_a_batch_to_another(
    make_jobs, engines, alice, eventually
):
    first, second = make_jobs(batch_concurrency=1), make_jobs()
    gate = asyncio.Event()
    engines.later = [[gate, *ANSWER], ANSWER]
    async with at_work(first):
        batch_id = await create(first, alice, 5)
        await until(first, alice, batch_id, lambda job: job.counts.get("completed"))
        await eventually(lambda: engines.num_running)
        draining = asyncio.ensure_future(first.drain())
        await asyncio.sleep(0)
        gate.set()  # the line that an engine works on is seen to its end
        await draining
        job = await first.batches.get(alice, batch_id)
        assert (job.status, job.counts["completed"]) == (Status.QUEUED, 2)
        assert engines.num_stopped == 0
    async with at_work(second):
        batch = await ended(second, alice, batch_id)
    assert batch["request_counts"]["completed"] == 5
    assert len(engines.requests) == 5


async def test_a_replica_that_lost_its_batch_writes_neither_lines_nor_files(
    make_jobs, alice, state, clock
):
    jobs = make_jobs(lease_s=0.02)
    batch_id = await create(jobs, alice, 1)
    old = await jobs.store.lease("batch")
    await asyncio.sleep(0.05)
    new = await jobs.store.lease("batch")
    assert (old.job_id, new.job_id, new.spec) == (batch_id, batch_id, old.spec)
    file_id = new.spec["output_file_id"]
    late, mine = (jobs.files.writer("alice", file_id, lease=each) for each in (old, new))
    await mine.write(b"x" * PIECE_BYTES)
    for refused in (
        late.write(b"y" * PIECE_BYTES),
        late.discard(),
        late.publish(filename="f", purpose="batch_output", keep_s=60),
    ):
        with pytest.raises(LeaseLost):
            await refused
    await mine.write(b"end")
    await mine.publish(filename="f", purpose="batch_output", keep_s=60)
    file = await jobs.files.find("alice", file_id)
    content = b"".join([piece async for piece in jobs.files.pieces(file)])
    assert content == b"x" * PIECE_BYTES + b"end"
    # who takes over in the middle writes the same file anew
    again = jobs.files.writer("alice", file_id, lease=new)
    await again.discard()
    await again.write(b"anew")
    document = await again.publish(filename="f", purpose="batch_output", keep_s=60)
    assert document["bytes"] == 4
    assert [each.file_id for each in await jobs.files.page("alice", after=None, limit=9)][:1] == [
        file_id
    ]


async def test_a_batch_whose_input_goes_fails_with_what_it_has(make_jobs, engines, alice):
    jobs = make_jobs()
    batch_id = await create(jobs, alice, 3)
    file_id = (await jobs.batches.get(alice, batch_id)).document["input_file_id"]
    await jobs.files.delete("alice", file_id)
    async with at_work(jobs):
        batch = await ended(jobs, alice, batch_id)
    assert batch["status"] == "failed"
    assert [each["code"] for each in batch["errors"]["data"]] == ["input_file_gone"]


async def test_limits_are_waited_for_and_lost_engines_tried_again(make_jobs, engines, alice):
    jobs = make_jobs(batch_concurrency=1)
    limit = RateLimited("Slow down.", headers={"Retry-After": "0.01"})
    engines.pieces = [limit]
    engines.later = [[limit]] * 5 + [[EngineLost("Gone.")]] * 2 + [ANSWER] + [[EngineLost("Gone.")]]
    async with at_work(jobs):
        batch = await ended(jobs, alice, await create(jobs, alice, 2))
    assert batch["request_counts"] == {"total": 2, "completed": 1, "failed": 1}
    (bad,) = await lines_of(jobs, alice, batch["error_file_id"])
    assert bad["response"]["status_code"] == 502
    assert len(engines.requests) == 6 + 2 + 1 + 3


async def test_a_line_needs_a_key_that_still_reaches_its_endpoint(make_jobs, engines, alice):
    jobs = make_jobs()
    batch_id = await create(jobs, alice, 1)
    engines.scopes = Scopes(endpoints=frozenset({"/v1/batches", "/v1/completions"}))
    async with at_work(jobs):
        batch = await ended(jobs, alice, batch_id)
    (bad,) = await lines_of(jobs, alice, batch["error_file_id"])
    assert bad["response"]["status_code"] == 403
    assert engines.requests == []


async def test_lines_of_any_length_are_read_whatever_pieces_they_lie_in(make_jobs):
    jobs = make_jobs()
    writer = jobs.files.writer("alice", "file-1")
    lines = [b"a" * (PIECE_BYTES - 1), b"", b"b", b"c" * (2 * PIECE_BYTES), b"  ", b"d\r", b"e" * 9]
    await writer.write(b"\n".join(lines))
    await writer.publish(filename="f", purpose="batch", keep_s=60)
    file = await jobs.files.find("alice", "file-1")
    found = {
        number: raw
        async for group in jobs.files.lines(file, max_line_bytes=PIECE_BYTES)
        for number, raw in group
    }
    expected = {1: lines[0], 3: b"b", 4: b"c" * (PIECE_BYTES + 1), 6: b"d", 7: lines[6]}
    assert found == expected
