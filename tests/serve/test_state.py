import asyncio
import time

import pytest
from pydantic import SecretStr, ValidationError
from redis.exceptions import RedisError

from sala_serve.errors import StateUnavailable
from sala_serve.state import State, StateSettings
from sala_serve.telemetry import Metrics


@pytest.fixture
async def watched(redis_server):
    """State on a real Redis with its watch running, and its metrics."""
    metrics = Metrics()
    settings = StateSettings(
        url=SecretStr(redis_server.url), command_timeout_s=0.3, watch_interval_s=0.02
    )
    state = State.create(settings, clock=time.monotonic, metrics=metrics)
    watching = asyncio.create_task(state.run())
    yield state, metrics.registry
    watching.cancel()
    await state.close()


async def test_commands_and_scripts_answer_alike(state):
    script = state.redis.register_script(
        "redis.call('HINCRBYFLOAT', KEYS[1], 'x', ARGV[1]) "
        "redis.call('ZADD', KEYS[2], 5, 'm') redis.call('PEXPIRE', KEYS[2], 60000) "
        "local t = redis.call('TIME') "
        "return {redis.call('HGET', KEYS[1], 'x'), redis.call('ZSCORE', KEYS[2], 'm'), "
        "tonumber(t[1]) > 1e9, false, redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', 5)}"
    )
    with state.guarded():
        answer = await script(keys=[b"sala:h", b"sala:z"], args=["0.25"])
    assert answer == [b"0.25", b"5", 1, None, [b"m"]]
    assert await state.redis.hgetall(b"sala:h") == {b"x": b"0.25"}


async def test_stop_is_noticed_by_a_command_and_the_restart_by_the_watch(
    watched, redis_server, eventually
):
    state, registry = watched
    with state.guarded():
        await state.redis.set(b"sala:x", b"1")
    redis_server.stop()
    with pytest.raises(StateUnavailable), state.guarded():
        await state.redis.get(b"sala:x")
    assert not state.is_available
    assert registry.get_sample_value("sala_gateway_state_up") == 0
    redis_server.start()
    await eventually(lambda: state.is_available)
    assert registry.get_sample_value("sala_gateway_state_up") == 1
    assert registry.get_sample_value("sala_gateway_state_losses_total") == 1
    with state.guarded():
        assert await state.redis.get(b"sala:x") is None


async def test_frozen_redis_is_away_after_the_timeout_and_then_costs_no_wait(
    watched, redis_server, eventually
):
    state, _ = watched
    with state.guarded():
        await state.redis.ping()
    redis_server.freeze()
    await eventually(lambda: not state.is_available)
    with pytest.raises(StateUnavailable), state.guarded():
        pytest.fail("no command is tried while the state is away")
    redis_server.thaw()
    await eventually(lambda: state.is_available)
    with state.guarded():
        assert await state.redis.ping()


@pytest.mark.parametrize(
    ("cause", "cure"),
    [
        (["CONFIG", "SET", "maxmemory", "1"], ["CONFIG", "SET", "maxmemory", "0"]),
        (["REPLICAOF", "127.0.0.1", "1"], ["REPLICAOF", "NO", "ONE"]),
    ],
    ids=["full", "replica"],
)
async def test_redis_that_takes_no_writes_is_away(watched, redis_server, eventually, cause, cure):
    state, _ = watched
    redis_server.client.execute_command(*cause)
    try:
        await eventually(lambda: not state.is_available)
        assert redis_server.client.ping()
    finally:
        redis_server.client.execute_command(*cure)
    await eventually(lambda: state.is_available)


async def test_more_commands_at_once_than_connections_wait_their_turn(state):
    async def count() -> None:
        with state.guarded():
            await state.redis.incr(b"sala:x")

    await asyncio.gather(*(count() for _ in range(500)))
    assert await state.redis.get(b"sala:x") == b"500"


async def test_a_cancelled_task_ends_whatever_its_command_is_doing(state):
    async def ask_for_ever() -> None:
        while True:
            await state.redis.get(b"sala:x")

    for num_steps in range(60):
        task = asyncio.create_task(ask_for_ever())
        for _ in range(num_steps):
            await asyncio.sleep(0)
        task.cancel()
        async with asyncio.timeout(5):
            await asyncio.wait({task})
        with pytest.raises(asyncio.CancelledError):
            task.result()


async def test_wrong_command_is_a_bug_and_not_an_outage(state):
    await state.redis.set(b"sala:x", b"text")
    with pytest.raises(RedisError), state.guarded():
        await state.redis.hget(b"sala:x", "field")
    assert state.is_available


async def test_password_is_used_and_never_shown(redis_server, caplog):
    redis_server.client.config_set("requirepass", "hunter2-secret")
    url = redis_server.url.replace("redis://", "redis://:{}@")
    right, wrong = (
        State.create(StateSettings(url=SecretStr(url.format(word))), clock=time.monotonic)
        for word in ("hunter2-secret", "hunter3-secret")
    )
    try:
        await right.check()
        await wrong.check()
        assert right.is_available
        assert not wrong.is_available
    finally:
        await right.redis.config_set("requirepass", "")
        await right.close()
        await wrong.close()
    assert "the shared state is away: AuthenticationError" in caplog.text
    assert "secret" not in caplog.text + repr(StateSettings(url=SecretStr(url.format("secret"))))


async def test_store_that_may_drop_keys_is_warned_of(redis_server, caplog):
    redis_server.client.config_set("maxmemory-policy", "allkeys-lru")
    state = State.create(StateSettings(url=SecretStr(redis_server.url)), clock=time.monotonic)
    try:
        await state.check()
        await state.close()
    finally:
        redis_server.client.config_set("maxmemory-policy", "noeviction")
    assert "set noeviction" in caplog.text


@pytest.mark.parametrize("url", ["localhost:6379", "http://redis", ""])
def test_url_of_another_kind_is_refused(url):
    with pytest.raises(ValidationError, match="redis://"):
        StateSettings(url=SecretStr(url))
