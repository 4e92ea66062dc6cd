"""Responses of one and of two replicas, with engines that play a script, on both stores."""

import asyncio
import json
import time
from contextlib import asynccontextmanager

import pytest
from openai._types import omit
from openai.lib.streaming.responses._responses import ResponseStreamState
from openai.types.responses import ResponseStreamEvent
from pydantic import SecretStr, TypeAdapter

from sala_serve.errors import (
    ContextLengthExceeded,
    EngineLost,
    EngineUnavailable,
    InvalidRequest,
    ModelNotFound,
    NotFound,
    RateLimited,
)
from sala_serve.jobs.model import Event, Status
from sala_serve.jobs.response_request import parse_response_request
from sala_serve.jobs.responses import response_view
from sala_serve.jobs.running import Progress
from sala_serve.jobs.service import Jobs
from sala_serve.jobs.settings import JobsSettings
from sala_serve.state import State, StateSettings

QUICK = {"heartbeat_s": 0.02, "poll_s": 0.02, "lease_s": 0.5, "backoff_s": 0.01, "max_attempts": 3}
EVENTS = TypeAdapter(ResponseStreamEvent)


@pytest.fixture
def jobs(state, engines):
    return Jobs(JobsSettings(**QUICK), state=state, engines=engines)


@asynccontextmanager
async def at_work(*replicas):
    async with asyncio.TaskGroup() as group:
        running = [group.create_task(each.run()) for each in replicas]
        try:
            yield running
        finally:
            for task in running:
                task.cancel()


async def prepare(jobs, principal, **fields):
    request = parse_response_request({"model": "sala", "input": "Hi", **fields})
    return await jobs.responses.prepare(
        principal, request, request_id="r1", trace_headers={}, record=None
    )


async def start(jobs, principal, **fields):
    prepared = await prepare(jobs, principal, background=True, **fields)
    return (await jobs.responses.start(prepared)).job_id


async def until(jobs, principal, response_id, condition):
    async with asyncio.timeout(20):
        while not condition(  # noqa: ASYNC110 - another replica may do it
            job := await jobs.responses.get(principal, response_id)
        ):
            await asyncio.sleep(0.01)
    return job


async def ended(jobs, principal, response_id):
    return await until(jobs, principal, response_id, lambda job: job.status.is_final)


async def stream(jobs, principal, response_id, after=-1):
    """All events above ``after``, checked against OpenAI's types."""
    job = await jobs.responses.resumable(principal, response_id)
    found = [each async for each in jobs.responses.follow(job, after) if isinstance(each, Event)]
    assert [each.sequence_number for each in found] == list(
        range(after + 1, after + 1 + len(found))
    )
    documents = [
        {**json.loads(each.body), "sequence_number": each.sequence_number} for each in found
    ]
    for each in documents:
        EVENTS.validate_python(each)
    return documents


def kinds(events):
    return [each["type"].removeprefix("response.") for each in events]


def accumulated(events):
    """What OpenAI's client makes of a whole stream."""
    state = ResponseStreamState(input_tools=omit, text_format=omit)
    for each in events:
        state.handle_event(EVENTS.validate_python(each))
    return state._completed_response


async def test_a_foreground_response_is_stored_and_continued(jobs, engines, alice):
    prepared = await prepare(jobs, alice, instructions="Be brief.")
    events = [each async for each in jobs.responses.run(prepared)]
    first = events[-1]["response"]
    stored = await jobs.responses.get(alice, first["id"])
    assert response_view(stored) == first
    again = await prepare(jobs, alice, input="And?", previous_response_id=first["id"])
    assert again.engine_request.document["messages"] == [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello world"},
        {"role": "user", "content": "And?"},
    ]


async def test_a_foreground_response_that_is_not_to_be_stored_is_not(jobs, alice, state):
    prepared = await prepare(jobs, alice, store=False)
    last = [each async for each in jobs.responses.run(prepared)][-1]
    with pytest.raises(NotFound):
        await jobs.responses.get(alice, last["response"]["id"])
    assert await state.redis.keys("sala:job:*") == []


async def test_a_background_response_runs_and_its_stream_can_be_read_from_anywhere(
    jobs, engines, alice
):
    gate = asyncio.Event()
    engines.pieces.insert(2, gate)
    async with at_work(jobs):
        response_id = await start(jobs, alice, input="Tell me", metadata={"a": "b"})
        job = await until(
            jobs, alice, response_id, lambda job: job.progress.get("done_tokens") == 5
        )
        view = response_view(job)
        assert view["status"] == "in_progress"
        assert view["sala"] == {
            "attempt": 1,
            "phase": "prefill",
            "done_tokens": 5,
            "total_tokens": 9,
        }
        gate.set()
        events = await stream(jobs, alice, response_id)
        assert kinds(events)[:4] == ["created", "queued", "in_progress", "output_item.added"]
        assert kinds(events)[-1] == "completed"
        assert accumulated(events).output_text == "Hello world"
        for after in range(len(events)):
            assert await stream(jobs, alice, response_id, after) == events[after + 1 :]
        job = await ended(jobs, alice, response_id)
        assert response_view(job) == events[-1]["response"]
        assert job.document["metadata"] == {"a": "b"}
    assert len(engines.requests) == 1


async def test_what_cannot_run_is_refused_before_it_is_stored(jobs, alice, state):
    with pytest.raises(ModelNotFound):
        await start(jobs, alice, model="other")
    assert await state.redis.keys("sala:job:*") == []


async def test_an_error_of_the_caller_fails_the_response_at_once(jobs, engines, alice):
    engines.pieces = [ContextLengthExceeded("Too long.", param="messages")]
    async with at_work(jobs):
        response_id = await start(jobs, alice)
        events = await stream(jobs, alice, response_id)
    assert kinds(events) == ["created", "queued", "in_progress", "failed"]
    job = await ended(jobs, alice, response_id)
    assert job.status is Status.FAILED
    assert job.document["error"]["type"] == "context_length_exceeded"
    assert len(engines.requests) == 1


async def test_a_lost_engine_is_tried_again_and_the_stream_says_so(jobs, engines, alice, chunks):
    engines.pieces = [*chunks("He")[:2], EngineLost("Gone.")]
    engines.later = [chunks("Hello ", "world")]
    async with at_work(jobs):
        response_id = await start(jobs, alice)
        events = await stream(jobs, alice, response_id)
    assert kinds(events)[3:9] == [
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_item.done",
        "in_progress",
        "output_item.added",
    ]
    assert events[6]["item"]["status"] == "incomplete"
    assert events[7]["response"]["sala"] == {"attempt": 2}
    assert accumulated(events).output_text == "Hello world"
    job = await ended(jobs, alice, response_id)
    assert len(job.document["output"]) == 1
    assert job.attempt == 2


async def test_a_job_that_fails_each_time_is_given_up_and_written_to_the_dead_letter(
    jobs, engines, alice, state
):
    engines.pieces = [EngineLost("Gone.")]
    async with at_work(jobs):
        response_id = await start(jobs, alice)
        job = await ended(jobs, alice, response_id)
    assert job.status is Status.FAILED
    assert job.document["error"]["type"] == "engine_lost"
    assert len(engines.requests) == QUICK["max_attempts"]
    ((_, dead),) = await state.redis.xrange("sala:jobs:response:dead")
    assert dead == {
        b"job": response_id.encode(),
        b"tenant": b"alice",
        b"because": b"engine_lost",
    }


async def test_waiting_for_a_limit_is_not_an_attempt(jobs, engines, alice, chunks):
    refusal = RateLimited("Too fast.", headers={"Retry-After": "0.01"})
    engines.pieces = [refusal]
    engines.later = [[refusal]] * 5 + [chunks("Done")]
    async with at_work(jobs):
        job = await ended(jobs, alice, await start(jobs, alice))
    assert job.status is Status.COMPLETED
    assert job.attempt == 1
    assert len(engines.requests) == 7


async def test_a_job_starts_soon_after_an_engine_is_there_again(jobs, engines, alice, chunks):
    away = EngineUnavailable("Not yet.")  # says that a client should come back after 5 s
    engines.pieces = [away]
    engines.later = [[away]] * 5 + [chunks("Done")]
    async with at_work(jobs):
        job = await ended(jobs, alice, await start(jobs, alice))
    assert job.status is Status.COMPLETED
    assert job.attempt == 1


async def test_what_is_computed_for_a_cancelled_job_is_charged_and_a_cut_off_attempt_is_not(
    jobs, engines, alice, state, eventually
):
    other = Jobs(JobsSettings(**QUICK), state=state, engines=engines)
    engines.pieces.insert(3, asyncio.Event())
    async with at_work(jobs):
        await start(jobs, alice)
        await eventually(lambda: engines.num_running)
    assert not engines.requests[0].is_charged_when_cut()  # its replica stopped
    async with at_work(other):
        response_id = await start(jobs, alice)
        await eventually(lambda: engines.num_running == 2)
        await jobs.responses.cancel(alice, response_id)
        await eventually(lambda: engines.num_running == 1)
        cancelled = [each for each in engines.requests if each.is_charged_when_cut()]
        assert len(cancelled) == 1


async def test_an_outage_that_is_shorter_than_the_lease_costs_no_prefill(
    engines, alice, redis_server, eventually
):
    settings = StateSettings(url=SecretStr(redis_server.url), command_timeout_s=0.2)
    state = State.create(settings, clock=time.monotonic)
    jobs = Jobs(JobsSettings(**{**QUICK, "lease_s": 60}), state=state, engines=engines)
    prefilled = asyncio.Event()
    engines.pieces.insert(0, prefilled)
    async with at_work(jobs):
        response_id = await start(jobs, alice)
        await eventually(lambda: engines.num_running)
        redis_server.freeze()
        await eventually(lambda: not state.is_available)
        await asyncio.sleep(1.1)  # progress is stored once a second
        redis_server.thaw()
        await state.check()
        prefilled.set()
        job = await ended(jobs, alice, response_id)
    assert (job.status, job.attempt, len(engines.requests)) == (Status.COMPLETED, 1, 1)
    await state.close()


async def test_cancelling_stops_the_engine_whichever_replica_is_asked(
    jobs, engines, alice, state, eventually
):
    other = Jobs(JobsSettings(**QUICK), state=state, engines=engines)
    engines.pieces.insert(3, asyncio.Event())
    async with at_work(jobs):
        response_id = await start(jobs, alice)
        await eventually(lambda: engines.num_running)
        job = await other.responses.cancel(alice, response_id)
        assert job.status is Status.CANCELLED
        await eventually(lambda: engines.num_stopped)
        events = await stream(jobs, alice, response_id)
        assert events[-1]["response"]["status"] == "cancelled"
        again = await other.responses.cancel(alice, response_id)
        assert again.status is Status.CANCELLED
    assert len(engines.requests) == 1


async def test_a_finished_response_stays_as_it_is_when_cancelled(jobs, alice):
    async with at_work(jobs):
        response_id = await start(jobs, alice)
        await ended(jobs, alice, response_id)
        assert (await jobs.responses.cancel(alice, response_id)).status is Status.COMPLETED


async def test_deleting_stops_the_engine_and_ends_the_stream(jobs, engines, alice, eventually):
    engines.pieces.insert(3, asyncio.Event())
    async with at_work(jobs):
        response_id = await start(jobs, alice)
        await eventually(lambda: engines.num_running)
        await jobs.responses.delete(alice, response_id)
        await eventually(lambda: engines.num_stopped)
        with pytest.raises(NotFound):
            await jobs.responses.get(alice, response_id)


async def test_a_stopped_replica_hands_its_job_back_and_another_finishes_it(
    jobs, engines, alice, state, chunks, eventually
):
    other = Jobs(JobsSettings(**QUICK), state=state, engines=engines)
    engines.pieces = [*chunks("He")[:2], asyncio.Event()]
    engines.later = [chunks("Hello")]
    async with at_work(jobs) as (running,):
        response_id = await start(jobs, alice)
        await eventually(lambda: engines.num_running)
        running.cancel()
        await asyncio.wait({running})
        job = await jobs.responses.get(alice, response_id)
        assert (job.status, job.attempt) == (Status.QUEUED, 0)
    async with at_work(other):
        events = await stream(jobs, alice, response_id)
    assert accumulated(events).output_text == "Hello"


async def test_a_drained_replica_finishes_what_it_has_and_takes_no_more(jobs, engines, alice):
    gate = asyncio.Event()
    engines.pieces.insert(2, gate)
    async with at_work(jobs):
        running = await start(jobs, alice)
        await until(jobs, alice, running, lambda job: job.progress.get("phase") == "prefill")
        draining = asyncio.ensure_future(jobs.drain())
        await asyncio.sleep(0)
        waiting = await start(jobs, alice)
        gate.set()
        await draining
        assert (await jobs.responses.get(alice, running)).status is Status.COMPLETED
        assert (await jobs.responses.get(alice, waiting)).status is Status.QUEUED


async def test_a_drained_replica_hands_back_at_once_what_no_engine_works_on(
    jobs, engines, alice, state, chunks
):
    queued = [Progress("queued", place=3), asyncio.Event()]
    engines.pieces, engines.later = queued, [chunks("Done")]
    engines.waits_as = "queued"
    async with at_work(jobs):
        response_id = await start(jobs, alice)
        await until(jobs, alice, response_id, lambda job: job.progress.get("place") == 3)
        draining = asyncio.ensure_future(jobs.drain())
        if state.is_embedded:  # nobody else could take it
            await asyncio.sleep(0.05)
            assert not draining.done()
            queued[1].set()
        await draining
        job = await jobs.responses.get(alice, response_id)
    assert job.status is (Status.COMPLETED if state.is_embedded else Status.QUEUED)
    assert job.attempt == state.is_embedded


async def test_a_drain_can_be_cut_short(jobs, engines, alice):
    engines.pieces = [asyncio.Event()]
    async with at_work(jobs):
        response_id = await start(jobs, alice)
        await until(jobs, alice, response_id, lambda job: job.progress.get("phase") == "prefill")
        draining = asyncio.ensure_future(jobs.drain())
        await asyncio.sleep(0)
        jobs.cut()
        await draining
    assert (await jobs.responses.get(alice, response_id)).status is Status.QUEUED


async def test_no_tenant_takes_more_than_half_of_the_places(state, engines, alice, bob, eventually):
    jobs = Jobs(JobsSettings(**QUICK, max_running_responses=4), state=state, engines=engines)
    engines.pieces.insert(1, asyncio.Event())
    async with at_work(jobs):
        for _ in range(5):
            await start(jobs, alice)
        await eventually(lambda: engines.num_running == 2)
        await start(jobs, bob)
        await eventually(lambda: engines.num_running == 3)
    tenants = [each.principal.tenant.tenant_id for each in engines.requests]
    assert tenants == ["alice", "alice", "bob"]
    assert engines.requests[0].principal == alice


@pytest.mark.parametrize("status", ["failed", "queued"])
async def test_only_a_finished_response_can_be_continued(jobs, engines, alice, status):
    response_id = await start(jobs, alice)
    if status == "failed":
        engines.pieces = [ContextLengthExceeded("Too long.")]
        async with at_work(jobs):
            await ended(jobs, alice, response_id)
    with pytest.raises(InvalidRequest, match=status):
        await prepare(jobs, alice, previous_response_id=response_id)


async def test_other_tenants_reach_nothing(jobs, alice, bob):
    response_id = await start(jobs, alice)
    for reach in (
        jobs.responses.get,
        jobs.responses.cancel,
        jobs.responses.delete,
        jobs.responses.input_items,
        jobs.responses.resumable,
    ):
        with pytest.raises(NotFound):
            await reach(bob, response_id)
    with pytest.raises(InvalidRequest) as caught:
        await prepare(jobs, bob, previous_response_id=response_id)
    assert caught.value.param == "previous_response_id"
    assert (await jobs.responses.get(alice, response_id)).status is Status.QUEUED


async def test_tokens_are_counted_with_all_that_comes_before(jobs, alice):
    prepared = await prepare(jobs, alice, input="one two")
    last = [each async for each in jobs.responses.run(prepared)][-1]
    body = {"model": "sala", "input": "three", "previous_response_id": last["response"]["id"]}
    request = parse_response_request(body)
    assert await jobs.responses.count_input_tokens(alice, request) == 5
