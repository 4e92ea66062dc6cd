"""Limits while Redis is stopped, frozen or slow, and after it has come back."""

import asyncio
import time
from contextlib import AsyncExitStack

import pytest
from pydantic import SecretStr

from sala_serve.errors import RateLimited, StateUnavailable
from sala_serve.state import State, StateSettings
from sala_serve.telemetry import Metrics, Usage
from sala_serve.tenants.limits import Claim, Limiter, share_of
from sala_serve.tenants.model import Limits, Principal, Tenant
from sala_serve.tenants.settings import LimitsSettings, TenantsSettings, TierSection

NOON_UNIX_S = 1_795_608_000


class Replica:
    """State, limiter and metrics of one gateway."""

    def __init__(self, url: str, on_state_loss: str, local_share: float) -> None:
        self.metrics = Metrics()
        settings = StateSettings(url=SecretStr(url), command_timeout_s=0.25)
        self.state = State.create(settings, clock=time.monotonic, metrics=self.metrics)
        tiers = {"default": TierSection(on_state_loss=on_state_loss)}
        self.limiter = Limiter(
            self.state,
            LimitsSettings(local_share=local_share),
            tier=TenantsSettings(tiers=tiers).tier,
            clock=time.monotonic,
            unix_clock=lambda: NOON_UNIX_S,
            metrics=self.metrics,
        )

    def reserve(self, who, *claimed, **kinds):
        return self.limiter.reserve(who, claim(*claimed, **kinds), request_id="r")

    async def used(self, who):
        return await self.limiter.used(who.tenant)

    def metric(self, name, **labels):
        self.metrics.render()
        return self.metrics.registry.get_sample_value(f"sala_gateway_{name}", labels)

    async def close(self) -> None:
        await self.limiter.close()
        await self.state.close()


@pytest.fixture
async def start_replica(redis_server):
    async with AsyncExitStack() as replicas:

        def start(on_state_loss: str = "local_share", local_share: float = 0.5) -> Replica:
            replica = Replica(redis_server.url, on_state_loss, local_share)
            replicas.push_async_callback(replica.close)
            return replica

        yield start
        redis_server.reset()


@pytest.fixture(params=["stopped", "frozen"])
def outage(request, redis_server):
    """The two ways in which Redis goes away, as functions that begin and end one."""
    if request.param == "stopped":
        return redis_server.stop, redis_server.start
    return redis_server.freeze, redis_server.thaw


def principal(**limits):
    return Principal(Tenant("acme", "Acme", "default", Limits(**limits)), key_id="k1")


def claim(input_tokens=0, output_tokens=0, is_long=False):
    return Claim(input_tokens, 0, output_tokens, is_long)


async def test_tier_that_refuses_does_so_until_redis_is_back(start_replica, outage):
    replica, who = start_replica("refuse"), principal(requests_per_min=10)
    begin, end = outage
    begin()
    for _ in range(3):
        with pytest.raises(StateUnavailable) as refused:
            async with replica.reserve(who, 10):
                pytest.fail("nothing may be admitted")
        assert int(refused.value.headers["Retry-After"]) > 0
    assert replica.metric("limit_refusals_total", limit="state") == 3
    assert replica.metric("state_up") == 0
    end()
    await replica.state.check()
    async with replica.reserve(who, 10) as reservation:
        assert reservation.headers["x-ratelimit-limit-requests"] == "10"
    assert replica.metric("state_up") == 1


async def test_local_shares_of_all_replicas_keep_the_limit(start_replica, outage):
    replicas = [start_replica(local_share=0.5) for _ in range(2)]
    who = principal(requests_per_min=10, tokens_in_flight=1000)
    begin, end = outage
    begin()
    granted = 0
    async with AsyncExitStack() as held:
        for replica in replicas:
            for _ in range(10):
                try:
                    reservation = await held.enter_async_context(replica.reserve(who, 90))
                except RateLimited:
                    continue
                granted += 1
                assert reservation.headers["x-ratelimit-limit-requests"] == "5"
        assert granted == 10
        assert replicas[0].metric("limit_local_reservations_total") == 5
        end()
        # back again: what both hold on their own is known to both before anything is admitted
        for replica in replicas:
            await replica.state.check()
            await replica.limiter.tick()
        assert (await replicas[0].used(who)).flight == 900
        with pytest.raises(RateLimited):
            await held.enter_async_context(replicas[1].reserve(who, 10))
    assert (await replicas[0].used(who)).flight == 0


async def test_what_was_used_without_redis_is_charged_when_it_is_back(start_replica, outage):
    replica, who = start_replica(), principal(input_tokens_per_min=1000, tokens_per_day=10_000)
    begin, end = outage
    begin()
    async with replica.reserve(who, 300, 50) as reservation:
        await reservation.settle(Usage(300, 0, 20))
    async with replica.reserve(who, 100, 50):
        pass
    assert replica.metric("limit_unconfirmed_steps") > 0
    end()
    await replica.state.check()
    await replica.limiter.tick()
    used = await replica.used(who)
    assert (used.input, used.day, used.flight) == (300, 320, 0)
    assert replica.metric("limit_unconfirmed_steps") == 0
    assert (await replica.limiter.usage_by_day("acme", [NOON_UNIX_S // 86400]))[0] == {
        "requests": 1,
        "prompt_tokens": 300,
        "cached_tokens": 0,
        "completion_tokens": 20,
    }


async def test_request_that_outlives_an_outage_is_charged_once(start_replica, outage):
    replica, who = start_replica(), principal(input_tokens_per_min=1000, tokens_in_flight=1000)
    begin, end = outage
    async with replica.reserve(who, 600, 100) as reservation:
        begin()
        # settling does not wait for Redis and never fails; here it is sent, and times out
        await reservation.settle(Usage(600, 0, 30))
    assert replica.metric("limit_unconfirmed_steps") == 1
    end()
    await replica.state.check()
    await replica.limiter.tick()
    used = await replica.used(who)
    assert (used.input, used.day, used.flight) == (600, 630, 0)


async def test_request_that_runs_on_after_redis_lost_everything_is_still_held(
    start_replica, redis_server
):
    replica, who = start_replica(), principal(tokens_in_flight=1000, long_prefills=1)
    async with replica.reserve(who, 600, 100, is_long=True):
        redis_server.stop()
        await replica.state.check()
        redis_server.start()
        await replica.state.check()
        with pytest.raises(RateLimited):
            async with replica.reserve(who, 100, is_long=True):
                pytest.fail("a long one runs")
        used = await replica.used(who)
        assert (used.flight, used.long) == (700, 1)
    assert (await replica.used(who)).flight == 0


async def test_reservation_that_redis_made_after_its_sender_gave_up_is_given_back(
    start_replica, redis_server
):
    replica, who = start_replica("refuse"), principal(tokens_in_flight=1000)
    async with replica.reserve(who, 1):  # connected
        pass
    redis_server.freeze()
    with pytest.raises(StateUnavailable):
        async with replica.reserve(who, 700):
            pytest.fail("nothing may be admitted")
    redis_server.thaw()
    await replica.state.check()
    await replica.limiter.tick()
    assert (await replica.used(who)).flight == 0


async def test_claim_above_the_local_share_waits_for_redis(start_replica, redis_server):
    replica, who = start_replica(), principal(input_tokens_per_min=1000)
    redis_server.stop()
    async with replica.reserve(who, 500):
        pass
    with pytest.raises(StateUnavailable, match="larger than"):
        async with replica.reserve(who, 501):
            pytest.fail("that is more than the share")


async def test_slow_redis_is_waited_for(start_replica, redis_server):
    replica, who = start_replica("refuse"), principal(requests_per_min=10)
    async with replica.reserve(who, 1):
        pass
    redis_server.client.execute_command("CLIENT", "PAUSE", "100")
    async with replica.reserve(who, 1) as reservation:
        assert reservation.headers["x-ratelimit-remaining-requests"] == "8"
    assert replica.metric("state_losses_total") == 0


async def test_redis_that_comes_and_goes_under_load_leaves_nothing_behind(
    start_replica, redis_server
):
    replica, who = start_replica(), principal(tokens_in_flight=10_000, tokens_per_day=10**9)
    num_settled = 0

    async def request(index: int) -> None:
        nonlocal num_settled
        await asyncio.sleep(index * 0.004)
        try:
            async with replica.reserve(who, 10, 10) as reservation:
                await asyncio.sleep(0.02)
                if index % 3:
                    await reservation.settle(Usage(10, 0, 5))
                    num_settled += 1
        except StateUnavailable:
            pass

    running = asyncio.create_task(replica.limiter.run())
    watching = asyncio.create_task(replica.state.run())
    async with asyncio.TaskGroup() as requests:
        for index in range(200):
            requests.create_task(request(index))
        await asyncio.sleep(0.1)
        redis_server.freeze()
        await asyncio.sleep(0.35)
        redis_server.thaw()
    running.cancel()
    watching.cancel()
    await replica.state.check()
    await replica.limiter.tick()
    used = await replica.used(who)
    assert num_settled > 100
    assert (used.flight, used.day) == (0, num_settled * 15)
    assert replica.metric("limit_reservations") == 0
    assert replica.metric("limit_unconfirmed_steps") == 0


def test_share_of_limits_is_never_nothing():
    limits = Limits(requests_per_min=1, tokens_in_flight=1001, long_prefills=0)
    assert share_of(limits, 0.25) == Limits(
        requests_per_min=1, tokens_in_flight=250, long_prefills=0
    )
