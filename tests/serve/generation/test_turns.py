"""Turns at the engines: another one if the first had not begun, one error if it had, and giving way."""

import asyncio
import json
import re
from contextlib import suppress

import httpx
import pytest

from sala_serve.engine.fake import Behaviour
from sala_serve.engine.fake_core import FakeCore
from sala_serve.engine.fake_server import FakeServer
from sala_serve.generation.life import LOOK_INTERVAL_S

PATH = "/v1/chat/completions"
REQUEST = {"model": "sala", "messages": [{"role": "user", "content": "Hi"}]}


ONE_AT_A_TIME = {"long_prompt_tokens": 50, "max_long_prefills": 1}


def error_of(response):
    return response.json()["error"]


@pytest.fixture
async def two_engines(start_stack, eventually):
    """A gateway in front of two engines that it looks at rarely, so that it finds out by itself."""
    async with FakeServer() as one, FakeServer() as two:
        urls = [one.url, two.url]
        async with start_stack(engine_urls=urls, engine_probe_interval_s=30) as stack:
            await eventually(lambda: len(stack.gateway.pool.ready()) == 2)
            yield stack, [one, two]


def bodies_of(server):
    return server.engine.journal.bodies


async def until_served_by(stack, servers):
    """Ask once; return who served it, the other one last."""
    assert (await stack.http.post(PATH, json=REQUEST)).status_code == 200
    return sorted(servers, key=lambda each: -len(bodies_of(each)))


@pytest.mark.parametrize("is_stream", [True, False])
async def test_request_goes_to_another_engine_if_one_is_not_reached(two_engines, is_stream):
    stack, servers = two_engines
    one, _ = await until_served_by(stack, servers)
    one.kill()
    for seed in range(4):
        body = {**REQUEST, "stream": is_stream, "seed": seed}
        response = await stack.http.post(PATH, json=body)
        assert response.status_code == 200
        assert "word2" in response.text
    assert sum(map(len, map(bodies_of, servers))) == 5


async def test_no_engine_left_is_an_error_in_the_end(two_engines):
    stack, servers = two_engines
    for server in servers:
        server.kill()
    response = await stack.http.post(PATH, json=REQUEST)
    assert response.status_code == 503
    assert error_of(response)["code"] == "engine_unavailable"


@pytest.mark.parametrize("is_stream", [True, False])
async def test_request_that_waits_keeps_its_place_while_no_engine_is_there(
    start_stack, eventually, is_stream
):
    # an engine that does not say what it works on, and that nobody asks in the moment in which it goes
    behaviour = Behaviour(num_prompt_tokens=100, ttft_s=60, has_progress=False)
    settings = {**ONE_AT_A_TIME, "engine_probe_interval_s": 1.0}
    async with (
        FakeServer(behaviour) as server,
        start_stack(engine_urls=[server.url], **settings) as stack,
    ):
        body = {**REQUEST, "stream": is_stream}
        asked = []
        for number in range(4):
            one = {**body, "seed": number}
            asked.append(asyncio.create_task(stack.http.post(PATH, json=one, timeout=30)))
            await stack.admitted(number + 1)
        await eventually(lambda: server.engine.journal.num_running == 1)
        server.kill()
        assert "engine_lost" in (await asked[0]).text
        behaviour.ttft_s = 0
        await eventually(lambda: not stack.gateway.pool.ready())
        assert stack.gateway.scheduler.snapshot().num_queued == 3
        refused = await stack.http.post(PATH, json=REQUEST)
        assert error_of(refused)["code"] == "engine_unavailable"
        await server.start()
        for each in asked[1:]:
            assert "word2" in (await each).text
        seeds = [each["seed"] for each in server.engine.journal.bodies]
        assert seeds == [1, 2, 3]


@pytest.mark.parametrize("is_stream", [True, False])
async def test_work_that_may_have_begun_is_not_sent_again(two_engines, eventually, is_stream):
    stack, servers = two_engines
    for server in servers:
        server.behaviour.ttft_s = 60
    body = {**REQUEST, "stream": is_stream}
    asked = asyncio.create_task(stack.http.post(PATH, json=body))
    await eventually(lambda: any(map(bodies_of, servers)))
    for server in servers:
        if bodies_of(server):
            server.kill()
    response = await asked
    assert response.status_code == 502
    assert error_of(response)["code"] == "engine_lost"
    assert sum(map(len, map(bodies_of, servers))) == 1


@pytest.mark.parametrize("is_stream", [True, False])
async def test_request_that_only_waits_in_a_dying_engine_goes_to_another(
    two_engines, eventually, monkeypatch, is_stream
):
    stack, servers = two_engines
    progress = FakeCore.progress
    # an engine that takes more than it can compute at once, as for want of memory
    monkeypatch.setattr(FakeCore, "progress", lambda core: {**progress(core), "max_num_seqs": 99})
    for server in servers:
        server.behaviour.max_num_seqs, server.behaviour.ttft_s = 1, 60

    async def ask_directly(server):
        with suppress(httpx.HTTPError):
            await stack.http.post(f"{server.url}{PATH}", json=REQUEST, timeout=60)

    async with asyncio.TaskGroup() as group:
        foreign = [group.create_task(ask_directly(server)) for server in servers]
        await eventually(lambda: all(len(each.engine.core.jobs) == 1 for each in servers))
        body = {**REQUEST, "stream": is_stream, "seed": 1}
        asked = group.create_task(stack.http.post(PATH, json=body, timeout=60))

        def held_by():
            return [each for each in servers if len(each.engine.core.jobs) == 2]

        await eventually(held_by)
        (dying,) = held_by()
        (other,) = [each for each in servers if each is not dying]
        engine = stack.gateway.pool.engines[dying.url.removeprefix("http://")]
        await eventually(lambda: len(engine.progress) == 2)
        await asyncio.sleep(2 * LOOK_INTERVAL_S)  # until the request has been looked at
        dying.kill()
        await eventually(lambda: len(other.engine.core.jobs) == 2)
        for each in foreign:
            each.cancel()
        other.behaviour.ttft_s = 0
        response = await asked
    assert response.status_code == 200
    assert "word2" in response.text


@pytest.mark.parametrize("is_stream", [True, False])
async def test_stuck_engine_is_one_error(start_stack, eventually, is_stream):
    behaviour = Behaviour(itl_s=0.1, num_tokens=10_000)
    async with start_stack(behaviour, engine_stuck_after_s=0.6) as stack:
        body = {**REQUEST, "stream": is_stream}
        asked = asyncio.create_task(stack.http.post(PATH, json=body))
        await eventually(lambda: stack.engine.core.num_decoded_tokens > 3)
        stack.engine.core.freeze()
        response = await asked
        if is_stream:
            assert response.status_code == 200
            last = response.text.strip().split("\n\n")[-1].removeprefix("data: ")
            assert json.loads(last)["error"]["code"] == "engine_stuck"
        else:
            assert response.status_code == 502
            assert error_of(response)["code"] == "engine_stuck"
        refused = await stack.http.post(PATH, json={**REQUEST, "seed": 2})
        assert error_of(refused)["code"] == "engine_unavailable"
        stack.engine.core.thaw()


GIVES_WAY = {
    "long_prompt_tokens": 100,
    "give_way_tokens": 500,
    "lead_tokens": 500,
    "piece_tokens": 500,
    "state_interval_tokens": 512,
    "engine_block_tokens": 512,
}


@pytest.mark.parametrize("is_kept", [True, False])
async def test_long_prefill_gives_way_and_still_ends_whole(
    start_stack, eventually, is_kept, create_key, charged
):
    behaviour = Behaviour(
        num_prompt_tokens=None,
        num_cached_tokens=None if is_kept else 0,
        prefill_tokens_per_s=3000,
        max_model_len=8192,
    )
    async with start_stack(behaviour, require_keys=True, scheduling=GIVES_WAY) as stack:
        limits = {"tokens_per_day": 100_000, "cached_token_rate": 0.0}
        tenant, one = await create_key(stack, "one", limits=limits)
        _, two = await create_key(stack, "two")

        def ask(headers, seed):
            words = " ".join(f"{seed}-{index}" for index in range(2999))
            body = {"model": "sala", "stream": True, "seed": seed}
            body["messages"] = [{"role": "user", "content": words}]
            return asyncio.create_task(
                stack.http.post(PATH, json=body, headers=headers, timeout=60)
            )

        first = ask(one, 1)
        await eventually(lambda: len(stack.engine.core.jobs) == 1)
        second = ask(two, 2)
        answers = await asyncio.gather(first, second)
        seeds = [body["seed"] for body in stack.engine.journal.bodies]
        assert seeds[:3] == [1, 2, 1]
        # where nothing is kept, giving way again would never come to an end
        assert is_kept or len(seeds) <= 5
        for answer in answers:
            assert answer.status_code == 200
            assert re.findall(r"word\d", answer.text) == ["word0", "word1", "word2"]
            assert answer.text.endswith("data: [DONE]\n\n")
        # its own earlier turns are no gift of the cache
        assert await charged(stack, tenant) == 3000 + 3


async def test_dying_engine_does_not_take_the_queue_along(start_stack, eventually):
    # its core is dead and its server answers each request with that, for longer than the queue is deep
    behaviour = Behaviour(num_prompt_tokens=100, ttft_s=60, has_progress=False)
    async with (
        FakeServer(behaviour) as server,
        start_stack(engine_urls=[server.url], **ONE_AT_A_TIME) as stack,
    ):
        server.engine.core.on_death = lambda: None
        asked = []
        for number in range(4):
            body = {**REQUEST, "seed": number}
            asked.append(asyncio.create_task(stack.http.post(PATH, json=body, timeout=30)))
            await stack.admitted(number + 1)
        await eventually(lambda: server.engine.journal.num_running == 1)
        server.engine.core.die()
        assert "engine_lost" in (await asked[0]).text
        behaviour.ttft_s = 0
        await asyncio.sleep(0.2)
        assert stack.gateway.scheduler.snapshot().num_queued == 3
        server.kill()
        await server.start()
        for each in asked[1:]:
            assert "word2" in (await each).text
