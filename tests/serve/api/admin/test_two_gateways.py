"""Two whole gateways on one Redis, each in front of an engine, and the admin port of one of them."""

import asyncio
import time
from contextlib import AsyncExitStack

import httpx
import openai
import pytest

from sala_serve.api.admin import build_admin_app
from sala_serve.engine.fake import Behaviour

REQUEST = {"model": "sala", "messages": [{"role": "user", "content": "Say something."}]}


@pytest.fixture
async def start_pair(start_stack, redis_server, token, headers):
    async with AsyncExitStack() as started:

        async def start(behaviour=None):
            shared = {
                "url": redis_server.url,
                "command_timeout_s": 20,
                "token": token,
                "secret": "a secret of all the replicas",
            }
            stacks = [
                await started.enter_async_context(start_stack(behaviour, **shared))
                for _ in range(2)
            ]
            transport = httpx.ASGITransport(build_admin_app(stacks[0].gateway))
            admin = await started.enter_async_context(
                httpx.AsyncClient(
                    transport=transport, base_url="http://admin/admin/v1/", headers=headers
                )
            )
            return admin, stacks

        yield start


async def make_key(admin, **limits):
    """Make a tenant and a key of it; return its id and its text."""
    await admin.post("tenants", json={"id": "acme", "name": "Acme", "limits": limits})
    made = (await admin.post("tenants/acme/keys", json={"name": "k"})).json()
    return made["id"], made["key"]


async def held_tokens(admin):
    usage = (await admin.get("tenants/acme/usage")).json()
    return usage["limits"]["tokens_in_flight"]["used"]


def asking(stack, key):
    return stack.client.with_options(api_key=key)


async def test_requests_of_a_key_count_together_on_all_gateways(start_pair):
    admin, stacks = await start_pair()
    _, key = await make_key(admin, requests_per_min=4)
    left = []
    for index in range(4):
        create = asking(stacks[index % 2], key).chat.completions.with_raw_response.create
        answer = await create(**REQUEST)
        assert answer.headers["x-ratelimit-limit-requests"] == "4"
        left.append(answer.headers["x-ratelimit-remaining-requests"])
    assert left == ["3", "2", "1", "0"]
    for stack in stacks:
        with pytest.raises(openai.RateLimitError) as refused:
            await asking(stack, key).chat.completions.create(**REQUEST)
        assert refused.value.code == "rate_limit_exceeded"
        assert 1 <= int(refused.value.response.headers["Retry-After"]) <= 15
    for stack in stacks:
        with pytest.raises(openai.AuthenticationError):
            await asking(stack, "any").chat.completions.create(**REQUEST)
        assert len(stack.engine.journal.bodies) == 2
    usage = (await admin.get("tenants/acme/usage?days=1")).json()
    (today,) = usage["days"]
    del today["date"]
    assert today == {
        "requests": 4,
        "prompt_tokens": 28,
        "cached_tokens": 16,
        "completion_tokens": 12,
    }
    assert usage["limits"]["tokens_in_flight"]["used"] == 0


async def test_revoked_key_gets_no_request_in_on_any_gateway_after_two_seconds(start_pair):
    admin, stacks = await start_pair()
    key_id, key = await make_key(admin)
    for stack in stacks:
        await asking(stack, key).models.list()
    assert (await admin.post(f"keys/{key_id}/revoke")).status_code == 200
    revoked_at_s = time.monotonic()

    async def last_accepted_s(stack):
        """When the last request was sent that got in, in seconds after the revocation."""
        last_s = 0.0
        async with asyncio.timeout(30):
            while True:
                sent_s = time.monotonic() - revoked_at_s
                try:
                    await asking(stack, key).models.list()
                except openai.AuthenticationError:
                    return last_s
                last_s = sent_s
                await asyncio.sleep(0.02)

    assert max(await asyncio.gather(*map(last_accepted_s, stacks))) < 2


async def test_operator_sees_a_running_request_and_cuts_it(start_pair, eventually):
    admin, stacks = await start_pair(Behaviour(ttft_s=60))
    _, key = await make_key(admin, tokens_in_flight=100_000)
    client = asking(stacks[0], key)
    headers = {"X-Request-Id": "long-1"}
    asked = asyncio.create_task(client.chat.completions.create(**REQUEST, extra_headers=headers))
    await eventually(lambda: stacks[0].engine.journal.bodies)
    (shown,) = (await admin.get("requests")).json()["data"]
    assert (shown["request_id"], shown["tenant_id"]) == ("long-1", "acme")
    assert shown["endpoint"] == "/v1/chat/completions"
    assert shown["phase"] == "prefill"
    assert (await held_tokens(admin)) > 0
    assert (await admin.get("scheduler")).json()["engines"][0]["num_running"] == 1

    assert (await admin.post("requests/long-1/cancel")).json()["cancelled"] is True
    with pytest.raises(openai.ConflictError, match="cancelled by the operator"):
        await asked
    await eventually(lambda: not stacks[0].engine.core.jobs)
    # the client has its answer before the books are closed
    async with asyncio.timeout(20):
        while (await held_tokens(admin)) > 0:  # noqa: ASYNC110 - in another process
            await asyncio.sleep(0.02)
    assert (await admin.get("requests")).json()["data"] == []
