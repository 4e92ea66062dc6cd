import asyncio

import pytest

from sala_serve.errors import ClientDisconnected, EngineLost, ShuttingDown
from sala_serve.running import RunningRequest, RunningRequests


async def silent_client():
    await asyncio.Event().wait()


async def gone_client():
    return {"type": "http.disconnect"}


async def test_result_and_error_of_the_work_come_through():
    async def work():
        return 5

    async def broken():
        raise EngineLost("gone") from OSError("why")

    assert await RunningRequest().run(work(), silent_client) == 5
    with pytest.raises(EngineLost) as caught:
        await RunningRequest().run(broken(), silent_client)
    assert isinstance(caught.value.__cause__, OSError)


async def test_timeout_of_the_work_is_its_own():
    async def work():
        raise TimeoutError

    with pytest.raises(TimeoutError):
        await RunningRequest().run(work(), silent_client)


async def test_disconnect_cancels_the_work():
    was_cancelled = False

    async def work():
        nonlocal was_cancelled
        try:
            await asyncio.sleep(10)
        finally:
            was_cancelled = True

    with pytest.raises(ClientDisconnected):
        await RunningRequest().run(work(), gone_client)
    assert was_cancelled


async def test_drain_waits_for_the_running_and_refuses_the_new():
    requests = RunningRequests()
    with requests.admit():
        draining = asyncio.create_task(requests.drain(timeout_s=5))
        await asyncio.sleep(0)
        with pytest.raises(ShuttingDown), requests.admit():
            pass
        assert not draining.done()
    assert await draining == 0


async def test_drain_cuts_what_outlasts_it():
    requests = RunningRequests()

    async def serve():
        with requests.admit() as request:
            await request.run(asyncio.sleep(10), silent_client)

    serving = asyncio.create_task(serve())
    await asyncio.sleep(0)
    assert await requests.drain(timeout_s=0.01) == 1
    with pytest.raises(ShuttingDown):
        await serving
    assert len(requests) == 0
