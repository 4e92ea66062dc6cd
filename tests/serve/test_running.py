import asyncio

import pytest

from sala_serve.errors import ClientDisconnected, Conflict, EngineLost, Overloaded, ShuttingDown
from sala_serve.running import RunningRequest, RunningRequests
from sala_serve.telemetry import RequestRecord


async def silent_client():
    await asyncio.Event().wait()


async def gone_client():
    return {"type": "http.disconnect"}


async def test_what_is_shown_is_cut_before_it_begins_or_while_it_runs_and_never_afterwards():
    running = RunningRequests(max_requests=1)
    record = RequestRecord("job-1", "/v1/responses", started_at_s=0.0)

    async def run(request):
        async with request:
            has_begun.set()
            await asyncio.Event().wait()

    has_begun = asyncio.Event()
    with running.show(record) as request:
        assert running.snapshot() == [request]
        assert len(running) == 0  # neither admitted nor drained
        assert running.cancel("job-1")
        with pytest.raises(Conflict):
            await run(request)
    assert running.snapshot() == []
    has_begun.clear()
    with running.show(record) as request:
        task = asyncio.create_task(run(request))
        await has_begun.wait()
        assert running.cancel("job-1")
        with pytest.raises(Conflict):
            await task
    with running.show(record) as request:
        async with request:
            pass
        assert running.cancel("job-1")  # too late to change anything
    assert not running.cancel("job-1")


async def test_result_and_error_of_the_work_come_through():
    async def work():
        return 5

    async def broken():
        raise EngineLost("gone") from OSError("why")

    async with RunningRequest() as request:
        assert await request.while_client_stays(work(), silent_client) == 5
    with pytest.raises(EngineLost) as caught:
        async with RunningRequest() as request:
            await request.while_client_stays(broken(), silent_client)
    assert isinstance(caught.value.__cause__, OSError)


async def test_timeout_of_the_work_is_its_own():
    async def work():
        raise TimeoutError

    with pytest.raises(TimeoutError):
        async with RunningRequest() as request:
            await request.while_client_stays(work(), silent_client)


async def test_disconnect_cancels_the_work():
    was_cancelled = False

    async def work():
        nonlocal was_cancelled
        try:
            await asyncio.sleep(10)
        finally:
            was_cancelled = True

    with pytest.raises(ClientDisconnected):
        async with RunningRequest() as request:
            await request.while_client_stays(work(), gone_client)
    assert was_cancelled


async def test_drain_waits_for_the_running_and_refuses_the_new():
    requests = RunningRequests(2)
    async with requests.admit():
        draining = asyncio.create_task(requests.drain(timeout_s=5))
        await asyncio.sleep(0)
        with pytest.raises(ShuttingDown):
            async with requests.admit():
                pass
        assert not draining.done()
    assert await draining == 0


async def test_drain_cuts_what_outlasts_it():
    requests = RunningRequests(2)

    async def serve():
        async with requests.admit():
            await asyncio.sleep(10)

    serving = asyncio.create_task(serve())
    await asyncio.sleep(0)
    assert await requests.drain(timeout_s=0.01) == 1
    with pytest.raises(ShuttingDown):
        await serving
    assert len(requests) == 0


async def test_no_more_than_the_maximum_is_admitted():
    requests = RunningRequests(1)
    async with requests.admit():
        with pytest.raises(Overloaded):
            async with requests.admit():
                pass
    async with requests.admit():
        assert len(requests) == 1


async def test_second_cut_changes_nothing():
    async def cut_twice():
        async with RunningRequest() as request:
            request.cut(ShuttingDown("first"))
            request.cut(EngineLost("second"))
            await asyncio.sleep(10)

    with pytest.raises(ShuttingDown):
        await cut_twice()
