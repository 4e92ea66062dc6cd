"""Two gateway processes over one real Redis: whatever happens to one of them, the job ends, and ends once."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sys
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest
from openai import AsyncOpenAI

from sala_serve.engine.fake import Behaviour
from sala_serve.engine.fake_server import FakeServer

QUICK = {"LEASE_S": "1", "HEARTBEAT_S": "0.1", "POLL_S": "0.1", "BACKOFF_S": "0.05"}
WORDS = "".join(f"word{index} " for index in range(40))
SLOW_PREFILL = {
    "prefill_tokens_per_s": 100_000,
    "num_prompt_tokens": 900_000,
    "num_cached_tokens": 0,
    "max_model_len": 2_000_000,
    "kv_capacity_tokens": 4_000_000,
}


@dataclass
class Replica:
    """A gateway in a process of its own."""

    process: asyncio.subprocess.Process
    client: AsyncOpenAI

    async def end(self, signal_number: int) -> None:
        self.process.send_signal(signal_number)
        async with asyncio.timeout(30):
            await self.process.wait()


async def launch(engine_url, redis_url):
    env = {name: value for name, value in os.environ.items() if not name.startswith("SALA_")}
    env |= {f"SALA_SERVE_JOBS__{name}": value for name, value in QUICK.items()}
    env |= {
        "SALA_SERVE_STATE__URL": redis_url,
        "SALA_SERVE_STATE__COMMAND_TIMEOUT_S": "20",
        "SALA_SERVE_TENANTS__SECRET": "a" * 32,
        "SALA_SERVE_DRAIN_TIMEOUT_S": "20",
    }
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "sala_serve", "gateway", "--engine-url", engine_url, "--port", "0"),
        env=env,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )


@asynccontextmanager
async def replica(process):
    """Wait until a launched gateway listens; it is gone after the block."""
    reading = None
    seen = ""
    try:
        async with asyncio.timeout(60):
            while not (found := re.search(r"listening on (http://\S+?),", seen)):
                seen = (await process.stdout.readline()).decode()
                assert seen, "it ended"
        reading = asyncio.create_task(process.stdout.read())  # a full pipe would stop it
        async with AsyncOpenAI(
            base_url=f"{found[1]}/v1", api_key="any", max_retries=0, timeout=20
        ) as client:
            yield Replica(process, client)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
        if reading is not None:
            await reading


@asynccontextmanager
async def pair(behaviour, redis_server):
    """An engine and two gateways, the second of which stands still, or it might be the quicker one."""
    async with FakeServer(behaviour) as engine:
        both = [await launch(engine.url, redis_server.url) for _ in range(2)]
        async with replica(both[1]) as second, replica(both[0]) as first:
            second.process.send_signal(signal.SIGSTOP)
            yield engine, first, second


@asynccontextmanager
async def started(behaviour, redis_server):
    """An engine, two gateways, and a background response that the first one runs."""
    async with pair(behaviour, redis_server) as (engine, first, second):
        response = await first.client.responses.create(model="sala", input="Go", background=True)
        async with asyncio.timeout(20):
            while not engine.engine.journal.num_running:  # noqa: ASYNC110 - it tells nobody
                await asyncio.sleep(0.01)
        second.process.send_signal(signal.SIGCONT)
        yield engine, first, second, response.id


async def until(client, response_id, condition):
    async with asyncio.timeout(40):
        while True:
            response = await client.responses.retrieve(response_id)
            if condition(response):
                return response
            await asyncio.sleep(0.05)


async def ended(client, response_id):
    return await until(
        client, response_id, lambda each: each.status not in ("queued", "in_progress")
    )


async def events(client, response_id, after=None):
    extra = {} if after is None else {"starting_after": after}
    stream = await client.responses.retrieve(response_id, stream=True, **extra)
    return [event async for event in stream]


def check_the_story(found, num_attempts):
    """The events of all attempts read as one stream, whose last attempt is the answer."""
    assert [event.sequence_number for event in found] == list(range(len(found)))
    kinds = [event.type.removeprefix("response.") for event in found]
    assert kinds.count("completed") == 1
    assert kinds[-1] == "completed"
    added = [event.output_index for event in found if event.type.endswith("output_item.added")]
    closed = [event.output_index for event in found if event.type.endswith("output_item.done")]
    assert added == closed == list(range(len(added)))
    (item,) = found[-1].response.output
    last = added[-1]
    said = "".join(
        event.delta
        for event in found
        if event.type == "response.output_text.delta" and event.output_index == last
    )
    assert said == item.content[0].text == WORDS
    assert found[-1].response.model_extra["sala"] == {"attempt": num_attempts}


@pytest.mark.parametrize("phase", ["prefill", "streaming"])
async def test_a_job_of_a_killed_gateway_is_taken_over_and_ends_once(redis_server, phase):
    behaviour = Behaviour(num_tokens=40, itl_s=0.05)
    if phase == "prefill":
        behaviour = Behaviour(num_tokens=40, **SLOW_PREFILL)
    async with started(behaviour, redis_server) as (engine, first, second, response_id):
        if phase == "streaming":
            await told(redis_server, response_id, num_events=8)
        await first.end(signal.SIGKILL)
        behaviour.itl_s, behaviour.prefill_tokens_per_s = 0, None
        response = await ended(second.client, response_id)
        assert (response.status, response.output_text) == ("completed", WORDS)
        found = await events(second.client, response_id)
        check_the_story(found, num_attempts=2)
        assert await events(second.client, response_id, after=4) == found[5:]
        assert len(engine.engine.journal.bodies) == 2
        await settled(engine)
        # nothing of it is left to be run again
        assert await leftovers(redis_server) == {}


async def test_a_frozen_gateway_that_wakes_up_changes_nothing(redis_server):
    behaviour = Behaviour(num_tokens=40, itl_s=0.05)
    async with started(behaviour, redis_server) as (engine, first, second, response_id):
        await told(redis_server, response_id, num_events=8)
        first.process.send_signal(signal.SIGSTOP)
        response = await ended(second.client, response_id)
        found = await events(second.client, response_id)
        check_the_story(found, num_attempts=2)
        first.process.send_signal(signal.SIGCONT)
        # it takes part again: its own view is the same, and it runs the next job
        assert await ended(first.client, response_id) == response
        second.process.send_signal(signal.SIGSTOP)
        behaviour.itl_s = 0
        again = await first.client.responses.create(model="sala", input="Go", background=True)
        assert (await ended(first.client, again.id)).output_text == WORDS
        second.process.send_signal(signal.SIGCONT)
        assert await events(second.client, response_id) == found
        assert len(engine.engine.journal.bodies) == 3
        await settled(engine)


async def test_a_gateway_told_to_stop_finishes_its_job(redis_server):
    behaviour = Behaviour(num_tokens=40, itl_s=0.03)
    async with started(behaviour, redis_server) as (engine, first, second, response_id):
        await told(redis_server, response_id, num_events=8)
        await first.end(signal.SIGTERM)
        assert first.process.returncode == 0
        response = await second.client.responses.retrieve(response_id)
        assert (response.status, response.output_text) == ("completed", WORDS)
        check_the_story(await events(second.client, response_id), num_attempts=1)
        assert len(engine.engine.journal.bodies) == 1


async def test_a_gateway_in_a_hurry_hands_its_job_to_another(redis_server):
    behaviour = Behaviour(num_tokens=40, **SLOW_PREFILL)
    async with started(behaviour, redis_server) as (engine, first, second, response_id):
        await until(
            second.client,
            response_id,
            lambda each: each.model_extra["sala"].get("phase") == "prefill",
        )
        first.process.send_signal(signal.SIGTERM)
        await asyncio.sleep(0.2)
        await first.end(signal.SIGTERM)
        behaviour.prefill_tokens_per_s = None
        response = await ended(second.client, response_id)
        assert response.output_text == WORDS
        # a start that the gateway's own stop ended is not counted
        check_the_story(await events(second.client, response_id), num_attempts=1)
        assert len(engine.engine.journal.bodies) == 2
        await settled(engine)


async def test_a_batch_of_a_killed_gateway_is_taken_over_and_has_each_line_once(redis_server):
    ids = [f"r{index}" for index in range(40)]
    body = {"model": "sala", "messages": [{"role": "user", "content": "Go"}]}
    request = {"method": "POST", "url": "/v1/chat/completions", "body": body}
    lines = [json.dumps({"custom_id": each, **request}) for each in ids]
    async with pair(Behaviour(num_tokens=3, itl_s=0.05), redis_server) as (engine, first, second):
        content = "\n".join(lines).encode()
        file = await first.client.files.create(file=("in", content), purpose="batch")
        batch = await first.client.batches.create(
            input_file_id=file.id, endpoint=request["url"], completion_window="24h"
        )
        key = f"sala:job:{batch.id}:lines"
        await grown(redis_server, "hlen", key, least=10)
        await first.end(signal.SIGKILL)
        with redis_server.client as client:
            written_before = client.hgetall(key)
        assert 10 <= len(written_before) < 40
        second.process.send_signal(signal.SIGCONT)
        engine.engine.behaviour.itl_s = 0
        async with asyncio.timeout(40):
            while batch.status != "completed":
                await asyncio.sleep(0.05)
                batch = await second.client.batches.retrieve(batch.id)
        assert (batch.request_counts.completed, batch.request_counts.failed) == (40, 0)
        assert batch.usage.output_tokens == 40 * 3
        output = await second.client.files.content(batch.output_file_id)
        found = output.content.splitlines()
        assert [json.loads(each)["custom_id"] for each in found] == ids
        # what was done before is not done again, but for the lines that had not come to their end
        assert {each[1:].rstrip() for each in written_before.values()} <= set(found)
        assert len(engine.engine.journal.bodies) <= 40 + 8
        assert len((await second.client.files.list()).data) == 2
        await settled(engine)
        assert await leftovers(redis_server) == {}
        with redis_server.client as client:
            assert client.exists(key) == 0


async def told(redis_server, response_id, num_events):
    """Wait until so many events are stored."""
    await grown(redis_server, "xlen", f"sala:job:{response_id}:events", least=num_events)


async def grown(redis_server, length, key, least):
    with redis_server.client as client:
        async with asyncio.timeout(30):
            while (  # noqa: ASYNC110 - it happens in another process
                await asyncio.to_thread(getattr(client, length), key) < least
            ):
                await asyncio.sleep(0.01)


async def settled(engine):
    async with asyncio.timeout(10):
        while engine.engine.journal.num_running:  # noqa: ASYNC110 - it tells nobody
            await asyncio.sleep(0.01)
    assert engine.engine.core.jobs == []


async def leftovers(redis_server):
    """Queues, leases and delayed jobs that are not empty."""
    with redis_server.client as client:
        keys = [key.decode() for key in client.keys("sala:jobs:*")]
        queues = [key for key in keys if key.endswith((":leases", ":delayed")) or ":ready:" in key]
        return {key: client.type(key) for key in queues}
