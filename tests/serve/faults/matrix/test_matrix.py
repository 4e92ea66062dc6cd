"""Each fault befalls a gateway with work in every phase: what clients see, what is billed, what the engine does.

``matrix.toml`` says what is to be seen, in the words of ``conftest.py``; docs/faults.md shows it.
"""

from __future__ import annotations

import asyncio
import re
import signal
import tomllib
from dataclasses import asdict
from inspect import signature
from pathlib import Path

import pytest

MATRIX = tomllib.loads((Path(__file__).parent / "matrix.toml").read_text(encoding="utf-8"))
REPOSITORY = Path(__file__).parents[4]
PHASES = ("queued", "prefilling", "streaming", "background")


async def engine_killed(start_world):
    async with start_world() as (world, stack):
        await world.begin(stack.http)
        world.engine.kill()
        await world.answered("prefilling", "streaming")
        world.release()
        await world.restart_engine()
        await world.answered()
        return await world.seen()


async def engine_restarted(start_world):
    # between two looks, so that nobody has seen it away
    async with start_world(engine_probe_interval_s=0.5) as (world, stack):
        await world.begin(stack.http)
        world.release()
        await world.restart_engine()
        await world.answered()
        return await world.seen()


async def engine_frozen(start_world):
    async with start_world(engine_stuck_after_s=0.8) as (world, stack):
        await world.begin(stack.http)
        world.engine.engine.core.freeze()
        await world.answered("prefilling", "streaming")
        await world.stopped(*world["prefilling"], *world["streaming"])
        world.release()
        await world.restart_engine()
        await world.answered()
        return await world.seen()


async def engine_out_of_memory(start_world):
    async with start_world() as (world, stack):
        await world.begin(stack.http)
        world.engine.engine.core.die()
        await world.answered("prefilling", "streaming")
        world.release()
        await world.restart_engine()
        await world.answered()
        return await world.seen()


async def redis_down(start_world, durable_redis, eventually):
    state = {"url": durable_redis.url, "watch_interval_s": 0.1}
    async with start_world(state=state) as (world, stack):
        await world.begin(stack.http)
        durable_redis.stop()
        await world.answered("background")
        await world.stopped(world.follower)
        world.release()
        await world.answered()
        await back(durable_redis, stack.gateway.state, eventually)
        await world.follow_on(stack.http)
        return await world.seen()


async def redis_restarted(start_world, durable_redis, eventually):
    state = {"url": durable_redis.url, "watch_interval_s": 0.1}
    async with start_world(state=state) as (world, stack):
        await world.begin(stack.http)
        durable_redis.stop()
        await world.answered("background")
        await world.stopped(world.follower)
        await back(durable_redis, stack.gateway.state, eventually)
        world.release()
        await world.answered()
        await world.follow_on(stack.http)
        return await world.seen()


async def redis_slow(start_world, durable_redis, slow_way):
    async with (
        slow_way(durable_redis.port) as way,
        start_world(state={"url": way.url}, num_tokens=20) as (world, stack),
    ):
        await world.begin(stack.http)
        way.delay_s = 0.02
        world.release()
        await world.answered()
        way.delay_s = 0.0
        return await world.seen()


async def back(redis, state, eventually):
    """Start Redis again, and wait until the gateway has seen it."""
    await asyncio.to_thread(redis.start)
    await eventually(lambda: state.is_available)


async def client_gone(start_world):
    async with start_world() as (world, stack):
        await world.begin(stack.http)
        for phase in ("queued", "prefilling", "streaming"):
            for client in world[phase]:
                await client.leave()
            await world.stopped(*world[phase])
        await world.follower.leave()
        world.release()
        await world.answered()
        return await world.seen()


async def slow_reader(start_world, eventually):
    server = {"hold_status_s": 0, "send_timeout_s": 0.5}
    much = {"num_padding_chars": 20_000, "prefill_tokens_per_s": None, "itl_s": 0.02}
    async with start_world(behaviour=much, server=server, send_buffer_bytes=65536) as (
        world,
        stack,
    ):
        await world.begin(
            stack.http, "streaming", "background", ask=lambda each: each.ask_and_stall(stack.url)
        )
        await eventually(lambda: not stack.gateway.running.snapshot())
        await world.stopped(*world["streaming"])
        for client in (*world["streaming"], world.follower):
            client.goes_on.set()
        await world.answered("streaming", "background")
        await world.follow_on(stack.http)
        return await world.seen()


async def gateway_told_to_stop(start_process, start_stack):
    async with start_process() as (world, process, http):
        await world.begin(http)
        process.send_signal(signal.SIGTERM)
        await world.answered("queued", "background")
        world.release()
        await world.answered()
        assert await process.wait() == 0
        async with world.another_replica(start_stack) as stack:
            await world.follow_on(stack.http)
            return await world.seen()


async def gateway_killed(start_process, start_stack):
    async with start_process() as (world, process, http):
        await world.begin(http)
        process.send_signal(signal.SIGKILL)
        await world.answered()
        await world.stopped(*world.clients.values())
        world.release()
        async with world.another_replica(start_stack) as stack:
            await world.follow_on(stack.http)
            return await world.seen()


async def proxy_idle_timeout(start_world, nginx):
    async with (
        start_world(server={"hold_status_s": 0, "progress_interval_s": 0.5}) as (world, stack),
        nginx(stack.url) as http,
    ):

        def ask(client):
            return client.ask_until_answered(http) if client.kind == "whole" else client.ask(http)

        await world.begin(http, ask=ask)
        world.engine.behaviour.itl_s = 2.5
        await asyncio.sleep(2.6)
        world.release()
        await world.answered()
        return await world.seen()


PLAYS = {
    play.__name__: play
    for play in (
        *(engine_killed, engine_restarted, engine_frozen, engine_out_of_memory),
        *(redis_down, redis_restarted, redis_slow),
        *(gateway_told_to_stop, gateway_killed, client_gone, slow_reader, proxy_idle_timeout),
    )
}


@pytest.fixture(scope="module")
def played():
    """What was seen of the faults that have been played, or why one could not be."""
    return {}


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("fault", MATRIX)
async def test_cell(request, played, fault, phase):
    if fault not in played:
        play = PLAYS[fault]
        parts = {name: request.getfixturevalue(name) for name in signature(play).parameters}
        try:
            played[fault] = await play(**parts)
        except Exception as error:
            played[fault] = error
            raise
    if isinstance(played[fault], Exception):
        pytest.fail(f"could not be played: {played[fault]!r}")
    seen = {} if phase not in played[fault] else asdict(played[fault][phase])
    assert seen == {name: text for name, text in MATRIX[fault][phase].items() if name != "none"}


def test_every_cell_is_in_the_table():
    assert list(MATRIX) == list(PLAYS)
    for fault, rows in MATRIX.items():
        assert tuple(rows) == ("name", "how", *PHASES), fault
        for phase in PHASES:
            assert set(rows[phase]) in ({"none"}, {"client", "billed", "engine"}), (fault, phase)


def test_page_shows_the_table():
    page = (REPOSITORY / "docs/faults.md").read_text(encoding="utf-8")
    lines = [
        "| fault | phase | the client sees | billed | the engine |",
        "| --- | --- | --- | --- | --- |",
    ]
    for rows in MATRIX.values():
        for phase in PHASES:
            name = f"**{rows['name']}**" if phase == PHASES[0] else ""
            cell = rows[phase]
            texts = (
                [f"(no such case: {cell['none']})", "", ""]
                if "none" in cell
                else [cell["client"], cell["billed"], cell["engine"]]
            )
            lines.append("| " + " | ".join([name, phase, *texts]) + " |")
    table = "\n".join(re.sub(" +", " ", line) for line in lines)
    assert table in page, f"docs/faults.md should have this table:\n{table}"
    for rows in MATRIX.values():
        assert f"- **{rows['name']}**: {rows['how']}" in page
