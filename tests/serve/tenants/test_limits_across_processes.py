"""Limits kept by several gateway processes on one Redis, one of which is killed."""

import asyncio
import json
import subprocess
import sys
import time

import pytest
from pydantic import SecretStr

from sala_serve.state import State, StateSettings
from sala_serve.tenants.ledger import Ledger
from sala_serve.tenants.model import Limits

NOON_UNIX_S = 1_795_608_000
LIMITS = {"tokens_in_flight": 5000, "input_tokens_per_min": 6000, "requests_per_min": 10_000}
# takes what it can get, says how much, holds it until told to end
PROCESS = """
import asyncio, json, sys, time
from contextlib import AsyncExitStack
from pydantic import SecretStr
from sala_serve.errors import RateLimited
from sala_serve.state import State, StateSettings
from sala_serve.tenants.limits import Claim, Limiter
from sala_serve.tenants.model import Limits, Principal, Tenant
from sala_serve.tenants.settings import LimitsSettings, TenantsSettings

url, limits, now_unix_s = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])

async def main():
    state = State.create(StateSettings(url=SecretStr(url), command_timeout_s=20), clock=time.monotonic)
    limiter = Limiter(state, LimitsSettings(), tier=TenantsSettings().tier, clock=time.monotonic,
                      unix_clock=lambda: now_unix_s)
    who = Principal(Tenant("acme", "Acme", "default", Limits(**limits)), None)
    async with AsyncExitStack() as held:
        async def attempt(index):
            tokens = 11 + index % 17
            claim = Claim(tokens, 0, 0, False)
            try:
                await held.enter_async_context(limiter.reserve(who, claim, request_id="r"))
            except RateLimited:
                return 0
            return tokens
        input()  # all begin together
        granted = sum(await asyncio.gather(*(attempt(index) for index in range(200))))
        print(granted, flush=True)
        input()
    await limiter.close()
    await state.close()

asyncio.run(main())
"""


@pytest.fixture
def processes(redis_server):
    command = [sys.executable, "-c", PROCESS, redis_server.url, json.dumps(LIMITS)]
    started = [
        subprocess.Popen(
            [*command, str(NOON_UNIX_S)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    yield started
    for process in started:
        process.kill()
        process.communicate()


def say(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


async def test_processes_together_never_pass_the_limit_and_a_killed_one_keeps_nothing(
    processes, redis_server
):
    for process in processes:
        say(process)
    granted = [int(await asyncio.to_thread(process.stdout.readline)) for process in processes]
    # 600 requests ask for 11,000 tokens; no smaller claim would have fitted either
    assert LIMITS["tokens_in_flight"] - 11 < sum(granted) <= LIMITS["tokens_in_flight"]

    limits, now_s = Limits(**LIMITS), [NOON_UNIX_S]
    settings = StateSettings(url=SecretStr(redis_server.url))
    state = State.create(settings, clock=time.monotonic)
    ledger = Ledger(state.scripts, lease_s=60, unix_clock=lambda: now_s[0])
    used = await ledger.used("acme", limits)
    assert (used.flight, used.input) == (sum(granted), sum(granted))

    processes[0].kill()
    for process in processes[1:]:
        say(process)
        assert await asyncio.to_thread(process.wait) == 0
    used = await ledger.used("acme", limits)
    assert (used.flight, used.input) == (granted[0], granted[0])
    now_s[0] += 61
    # expired ones are given back a hundred at a time
    for _ in range(3):
        used = await ledger.used("acme", limits)
    assert (used.flight, used.input) == (0, 0)
    await state.close()
