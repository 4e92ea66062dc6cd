import asyncio
import time
from contextlib import AsyncExitStack

import pytest

from sala_serve.errors import InsufficientQuota, RateLimited
from sala_serve.state import State
from sala_serve.telemetry import Metrics, Usage
from sala_serve.tenants.limits import Claim, Limiter
from sala_serve.tenants.model import Limits, Principal, Tenant
from sala_serve.tenants.settings import LimitsSettings, TenantsSettings

NOON_UNIX_S = 1_795_608_000  # 2026-11-25 12:00 UTC


class Clock:
    """Unix and monotonic seconds at once; stands still until told."""

    def __init__(self) -> None:
        self.now_s = float(NOON_UNIX_S)

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def metrics():
    return Metrics()


@pytest.fixture
def limiter(state: State, clock: Clock, metrics: Metrics) -> Limiter:
    return make_limiter(state, clock, metrics)


def make_limiter(state, clock, metrics=None, **settings):
    return Limiter(
        state,
        LimitsSettings(**settings),
        tier=TenantsSettings().tier,
        clock=clock,
        unix_clock=clock,
        metrics=metrics,
    )


def principal(**limits):
    return Principal(Tenant("acme", "Acme", "default", Limits(**limits)), key_id="k1")


def claim(input_tokens=0, output_tokens=0, cached=0, is_long=False):
    return Claim(input_tokens, cached, output_tokens, is_long)


def usage(prompt=0, completion=0, cached=0):
    return Usage(prompt, cached, completion)


async def use(limiter, who, claimed, used=None):
    """One request from reservation to settlement; returns its headers."""
    async with limiter.reserve(who, claimed, request_id="r") as reservation:
        if used is not None:
            await reservation.settle(used)
        return reservation.headers


async def used(limiter, who):
    return await limiter.used(who.tenant)


async def test_claim_is_held_then_replaced_by_the_usage(limiter):
    who = principal(input_tokens_per_min=1000, output_tokens_per_min=500, tokens_in_flight=2000)
    async with limiter.reserve(who, claim(400, 300), request_id="r") as reservation:
        held = await used(limiter, who)
        assert (held.input, held.output, held.flight, held.day) == (400, 300, 700, 700)
        await reservation.settle(usage(400, 20))
        await reservation.settle(usage(900, 900))
    after = await used(limiter, who)
    assert (after.input, after.output, after.flight, after.day) == (400, 20, 0, 420)


async def test_what_has_refilled_during_a_request_is_not_charged_again(state, clock):
    limiter = make_limiter(state, clock, lease_s=600)
    who = principal(input_tokens_per_min=600)
    async with limiter.reserve(who, claim(600), request_id="r") as reservation:
        clock.now_s += 60
        await reservation.settle(usage(500))
    assert (await used(limiter, who)).input == 0
    async with limiter.reserve(who, claim(600), request_id="r") as reservation:
        clock.now_s += 60
        await reservation.settle(usage(700))
    assert (await used(limiter, who)).input == 100


async def test_failure_gives_tokens_back_and_keeps_the_request_counted(limiter):
    who = principal(requests_per_min=5, input_tokens_per_min=1000, tokens_per_day=5000)
    with pytest.raises(RuntimeError):
        async with limiter.reserve(who, claim(900, 50, is_long=True), request_id="r"):
            raise RuntimeError
    after = await used(limiter, who)
    assert (after.requests, after.input, after.flight, after.long, after.day) == (1, 0, 0, 0, 0)


async def test_cached_tokens_count_at_their_rate(limiter):
    who = principal(input_tokens_per_min=1000, cached_token_rate=0.1)
    async with limiter.reserve(who, claim(2000, cached=1900), request_id="r") as reservation:
        assert (await used(limiter, who)).input == 100 + 190
        await reservation.settle(usage(2000, cached=1000))
    # the prediction was wrong, so the tenant owes more than its limit and waits for it
    assert (await used(limiter, who)).input == 1000 + 100
    with pytest.raises(RateLimited) as refused:
        await use(limiter, who, claim(1))
    assert refused.value.headers["Retry-After-Ms"] == str(6060)


@pytest.mark.parametrize(
    ("limits", "first", "second", "wait_ms"),
    [
        ({"requests_per_min": 3}, claim(), claim(), 20_000),
        ({"input_tokens_per_min": 600}, claim(200), claim(5), 500),
        ({"output_tokens_per_min": 60_000}, claim(0, 20_000), claim(0, 7), 7),
        ({"requests_per_min": 3, "input_tokens_per_min": 600}, claim(200), claim(30), 20_000),
    ],
)
async def test_request_passes_after_retry_after_and_not_a_millisecond_before(
    limiter, clock, limits, first, second, wait_ms
):
    who = principal(**limits)
    for _ in range(3):
        await use(limiter, who, first, usage(first.input_tokens, first.output_tokens))
    with pytest.raises(RateLimited) as refused:
        await use(limiter, who, second)
    headers = refused.value.headers
    assert int(headers["Retry-After-Ms"]) == wait_ms
    assert int(headers["Retry-After"]) == -(-wait_ms // 1000)
    clock.now_s += (wait_ms - 1) / 1000
    with pytest.raises(RateLimited) as refused:
        await use(limiter, who, second)
    assert refused.value.headers["Retry-After-Ms"] == "1"
    clock.now_s += 1 / 1000
    await use(limiter, who, second)


async def test_seconds_of_retry_after_are_enough(limiter, clock):
    who = principal(input_tokens_per_min=7)
    await use(limiter, who, claim(7), usage(7))
    for tokens in (1, 3, 7):
        with pytest.raises(RateLimited) as refused:
            await use(limiter, who, claim(tokens))
        clock.now_s += int(refused.value.headers["Retry-After"])
        await use(limiter, who, claim(tokens), usage(tokens))


async def test_headers_are_true(limiter, clock):
    who = principal(
        requests_per_min=60,
        input_tokens_per_min=600_000,
        output_tokens_per_min=6000,
        tokens_per_day=10_000_000,
    )
    headers = await use(limiter, who, claim(300_000, 600), usage(300_000, 600))
    assert headers == {
        "x-ratelimit-limit-requests": "60",
        "x-ratelimit-remaining-requests": "59",
        "x-ratelimit-reset-requests": "1s",
        "x-ratelimit-limit-input-tokens": "600000",
        "x-ratelimit-remaining-input-tokens": "300000",
        "x-ratelimit-reset-input-tokens": "30s",
        "x-ratelimit-limit-output-tokens": "6000",
        "x-ratelimit-remaining-output-tokens": "5400",
        "x-ratelimit-reset-output-tokens": "6s",
        "x-ratelimit-limit-tokens": "600000",
        "x-ratelimit-remaining-tokens": "300000",
        "x-ratelimit-reset-tokens": "30s",
        "x-ratelimit-limit-day-tokens": "10000000",
        "x-ratelimit-remaining-day-tokens": "9699400",
        "x-ratelimit-reset-day-tokens": "12h0m0s",
    }
    # all that is said to remain can be had, and no more
    with pytest.raises(RateLimited):
        await use(limiter, who, claim(300_001))
    headers = await use(limiter, who, claim(300_000), usage(300_000))
    assert headers["x-ratelimit-remaining-input-tokens"] == "0"
    # and after the reset all is there again
    clock.now_s += 60
    headers = await use(limiter, who, claim(600_000))
    assert headers["x-ratelimit-remaining-input-tokens"] == "0"


async def test_a_minutes_limit_refills_evenly_and_not_above_itself(limiter, clock):
    who = principal(input_tokens_per_min=60_000)
    await use(limiter, who, claim(60_000), usage(60_000))
    clock.now_s += 6
    await use(limiter, who, claim(6000), usage(6000))
    clock.now_s += 3600
    await use(limiter, who, claim(60_000), usage(60_000))
    with pytest.raises(RateLimited):
        await use(limiter, who, claim(1))


async def test_claim_that_can_never_pass_is_not_worth_a_retry(limiter, metrics):
    who = principal(input_tokens_per_min=1000, tokens_in_flight=5000)
    for too_much in (claim(1001), claim(6000, cached=5900)):
        with pytest.raises(RateLimited) as refused:
            await use(limiter, who, too_much)
        assert refused.value.headers == {"X-Should-Retry": "false"}
    assert refused.value.type == "tokens"
    # how long an answer gets is not known before: it may not shut a request out
    headers = await use(limiter, who, claim(900, 10**6))
    assert headers["x-ratelimit-remaining-input-tokens"] == "100"
    refusals = "sala_gateway_limit_refusals_total"
    assert metrics.registry.get_sample_value(refusals, {"limit": "input_tokens_per_min"}) == 1
    assert metrics.registry.get_sample_value(refusals, {"limit": "tokens_in_flight"}) == 1


async def test_long_wait_asks_clients_not_to_retry(limiter):
    who = principal(input_tokens_per_min=100)
    async with limiter.reserve(who, claim(1), request_id="r") as reservation:
        await reservation.settle(usage(1000))
    with pytest.raises(RateLimited) as refused:
        await use(limiter, who, claim(1))
    assert refused.value.headers["X-Should-Retry"] == "false"
    assert "Retry-After" not in refused.value.headers


async def test_days_budget_begins_anew_at_midnight(limiter, clock):
    who = principal(tokens_per_day=1000)
    await use(limiter, who, claim(700, 200), usage(700, 200))
    with pytest.raises(InsufficientQuota) as refused:
        await use(limiter, who, claim(101))
    assert refused.value.headers["x-ratelimit-reset-day-tokens"] == "12h0m0s"
    clock.now_s += 12 * 3600 - 0.001
    with pytest.raises(InsufficientQuota):
        await use(limiter, who, claim(101))
    # what is reserved on one day and used on the next is the next one's
    async with limiter.reserve(who, claim(100), request_id="r") as reservation:
        clock.now_s += 0.001
        await reservation.settle(usage(40, 0))
    assert (await used(limiter, who)).day == 40
    assert await limiter.usage_by_day("acme", [NOON_UNIX_S // 86400 + d for d in (0, 1, 2)]) == [
        {"requests": 1, "prompt_tokens": 700, "cached_tokens": 0, "completion_tokens": 200},
        {"requests": 1, "prompt_tokens": 40, "cached_tokens": 0, "completion_tokens": 0},
        {},
    ]


async def test_refund_after_midnight_takes_nothing_from_the_new_day(limiter, clock):
    who = principal(tokens_per_day=1000)
    async with limiter.reserve(who, claim(900), request_id="r"):
        clock.now_s += 12 * 3600
        await use(limiter, who, claim(300), usage(300))
    assert (await used(limiter, who)).day == 300


@pytest.mark.parametrize(
    ("limits", "held", "refused_claim", "small"),
    [
        ({"tokens_in_flight": 1000}, claim(600, 100), claim(301), claim(300)),
        ({"long_prefills": 1}, claim(10, is_long=True), claim(5, is_long=True), claim(5)),
    ],
)
async def test_what_is_held_at_the_same_time_is_bounded(
    limiter, limits, held, refused_claim, small
):
    who = principal(**limits)
    async with limiter.reserve(who, held, request_id="r"):
        with pytest.raises(RateLimited) as refused:
            await use(limiter, who, refused_claim)
        assert refused.value.headers == {"Retry-After": "5", "Retry-After-Ms": "5000"}
        await use(limiter, who, small)
    await use(limiter, who, refused_claim)


async def test_many_at_once_on_two_replicas_never_pass_the_limit(state, clock):
    replicas = [make_limiter(state, clock) for _ in range(2)]
    who = principal(input_tokens_per_min=1000, tokens_in_flight=900, requests_per_min=1000)
    async with AsyncExitStack() as held:

        async def attempt(index: int) -> int:
            tokens = 7 + index % 13
            try:
                await held.enter_async_context(
                    replicas[index % 2].reserve(who, claim(tokens), request_id="r")
                )
            except RateLimited:
                return 0
            return tokens

        granted = sum(await asyncio.gather(*(attempt(index) for index in range(200))))
        # no smaller one would have fitted either
        assert 900 - 7 < granted <= 900
        assert (await used(replicas[0], who)).flight == granted
    after = await used(replicas[1], who)
    assert (after.flight, after.input) == (0, 0)


async def test_replica_that_was_killed_keeps_nothing(state, clock, metrics):
    who = principal(tokens_in_flight=1000, input_tokens_per_min=1000, long_prefills=1)
    killed, other = make_limiter(state, clock, lease_s=60), make_limiter(state, clock, metrics)
    left_open = killed.reserve(who, claim(900, 50, is_long=True), request_id="r")
    reservation = await left_open.__aenter__()
    clock.now_s += 59.999
    with pytest.raises(RateLimited):
        await use(other, who, claim(10, is_long=True))
    clock.now_s += 0.001
    await use(other, who, claim(1000, is_long=True))
    name = "sala_gateway_limit_expired_reservations_total"
    assert metrics.registry.get_sample_value(name) == 1
    # it was only paused: what it used is charged all the same, once
    await reservation.settle(usage(900, 10))
    await left_open.__aexit__(None, None, None)
    after = await used(other, who)
    assert (after.input, after.flight, after.long) == (900, 0, 0)


async def test_running_replica_keeps_what_it_holds(state, clock, metrics):
    who = principal(tokens_in_flight=1000, tokens_per_day=5000)
    limiter = make_limiter(state, clock, metrics, lease_s=60)
    other = make_limiter(state, clock, metrics)
    async with limiter.reserve(who, claim(900, 50), request_id="r"):
        for _ in range(20):
            clock.now_s += 20
            await limiter.tick()
            with pytest.raises(RateLimited):
                await use(other, who, claim(100))
        held = await used(other, who)
        assert (held.flight, held.day) == (950, 950)
    # it was never given back and taken again, which would let others in between
    name = "sala_gateway_limit_expired_reservations_total"
    assert metrics.registry.get_sample_value(name) == 0


@pytest.mark.parametrize("is_settling", [True, False], ids=["settling", "reserving"])
async def test_cancelled_at_any_point_nothing_leaks(state, clock, is_settling):
    who = principal(tokens_in_flight=1000, input_tokens_per_min=1000)
    limiter = make_limiter(state, clock)

    async def request() -> None:
        async with limiter.reserve(who, claim(100), request_id="r") as reservation:
            if is_settling:
                await reservation.settle(usage(30))

    await request()
    start = (await used(limiter, who)).input
    num_cancelled = 0
    for num_rounds in range(30):
        task = asyncio.create_task(request())
        for _ in range(num_rounds):
            await asyncio.sleep(0)
        num_cancelled += task.cancel()
        await asyncio.wait({task})
    # embedded, each step is over before anybody can cancel it
    assert num_cancelled > (0 if state.is_embedded else 3)
    await limiter.tick()
    after = await used(limiter, who)
    assert after.flight == 0
    assert (after.input - start) % 30 == 0
    assert after.input <= start + 30 * 30


async def test_tenant_without_limits_is_counted_in_sums(limiter):
    who = principal()
    for _ in range(3):
        assert await use(limiter, who, claim(100, 10), usage(100, 5, cached=64)) == {}
    await use(limiter, who, claim(100, 10))
    day = NOON_UNIX_S // 86400
    assert await limiter.usage_by_day("acme", [day]) == [{}]
    await limiter.close()
    assert await limiter.usage_by_day("acme", [day]) == [
        {"requests": 3, "prompt_tokens": 300, "cached_tokens": 192, "completion_tokens": 15}
    ]


async def test_tenants_do_not_share_limits(limiter):
    one, other = (
        principal(requests_per_min=1),
        Principal(Tenant("other", "Other", "default", Limits(requests_per_min=1)), key_id=None),
    )
    await use(limiter, one, claim())
    await use(limiter, other, claim())
    with pytest.raises(RateLimited):
        await use(limiter, one, claim())


async def test_lowered_limit_holds_at_once(limiter):
    await use(limiter, principal(input_tokens_per_min=1000), claim(500), usage(500))
    with pytest.raises(RateLimited):
        await use(limiter, principal(input_tokens_per_min=400), claim(1))


async def test_stores_own_clock_is_used_when_none_is_given(state):
    limiter = Limiter(state, LimitsSettings(), tier=TenantsSettings().tier, clock=time.monotonic)
    who = principal(requests_per_min=1)
    await use(limiter, who, claim())
    with pytest.raises(RateLimited) as refused:
        await use(limiter, who, claim())
    assert 55 <= int(refused.value.headers["Retry-After"]) <= 60
