"""A request that comes again while its answer is being computed gets that answer."""

import asyncio
import json

import httpx
import pytest

from sala_serve.engine.fake import Behaviour
from sala_serve.tenants.model import Limits, Scopes

PATH = "/v1/chat/completions"
REQUEST = {"model": "sala", "messages": [{"role": "user", "content": "Hi"}]}
KEY = {"Idempotency-Key": "order-17"}
RETRY = {"X-Stainless-Retry-Count": "1"}
SLOW = Behaviour(ttft_s=0.5)


async def leave(stack, eventually, **options):
    """Ask, and go away while the engine computes the answer."""
    asking = ask(stack, **options)
    await until_computed(stack, eventually)
    asking.cancel()
    await asyncio.wait([asking])
    assert asking.cancelled()


def ask(stack, body=REQUEST, **options):
    return asyncio.create_task(stack.http.post(PATH, json=body, **options))


async def until_computed(stack, eventually, num_requests=1):
    await eventually(lambda: stack.engine.journal.num_running == num_requests)


@pytest.mark.parametrize("headers", [KEY, RETRY])
async def test_repeated_request_is_computed_once_and_counted_once(start_stack, eventually, headers):
    async with start_stack(Behaviour(ttft_s=0.5)) as stack:
        first = ask(stack, headers=headers)
        await until_computed(stack, eventually)
        answers = await asyncio.gather(first, *(ask(stack, headers=headers) for _ in range(3)))
        assert {answer.status_code for answer in answers} == {200}
        assert len({answer.content for answer in answers}) == 1
        assert len({answer.headers["X-Request-Id"] for answer in answers}) == 4
        assert len(stack.engine.journal.bodies) == 1
        tokens = await stack.metric("sala_gateway_completion_tokens_total", endpoint=PATH)
        assert tokens == 3
        assert len(stack.gateway.answers) == 0


async def test_same_body_at_the_same_time_is_two_requests_unless_it_says_otherwise(
    start_stack, eventually
):
    async with start_stack(Behaviour(ttft_s=0.5)) as stack:
        await asyncio.gather(ask(stack), ask(stack))
        assert len(stack.engine.journal.bodies) == 2
        assert len(stack.gateway.answers) == 0


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({}, {"headers": KEY}),
        ({"headers": RETRY}, {"headers": RETRY, "body": {**REQUEST, "seed": 1}}),
        ({"headers": KEY}, {"headers": {"Idempotency-Key": "order-18"}}),
    ],
    ids=["key", "body", "other key"],
)
async def test_other_requests_are_computed_apart(start_stack, eventually, first, second):
    async with start_stack(Behaviour(ttft_s=0.3)) as stack:
        await asyncio.gather(ask(stack, **first), ask(stack, **second))
        assert len(stack.engine.journal.bodies) == 2


async def test_key_with_another_body_is_a_conflict_while_the_first_runs(start_stack, eventually):
    async with start_stack(Behaviour(ttft_s=0.5)) as stack:
        first = ask(stack, headers=KEY)
        await until_computed(stack, eventually)
        response = await ask(stack, {**REQUEST, "seed": 1}, headers=KEY)
        assert response.status_code == 409
        assert response.json()["error"]["code"] == "idempotency_conflict"
        assert (await first).status_code == 200
        assert (await ask(stack, {**REQUEST, "seed": 1}, headers=KEY)).status_code == 200


async def test_streams_are_computed_each(start_stack):
    async with start_stack(Behaviour(ttft_s=0.3)) as stack:
        body = {**REQUEST, "stream": True}
        await asyncio.gather(ask(stack, body, headers=KEY), ask(stack, body, headers=KEY))
        assert len(stack.engine.journal.bodies) == 2


@pytest.mark.parametrize("leaves_first", [True, False])
async def test_one_of_two_clients_leaves_and_the_other_gets_the_answer(
    start_stack, eventually, leaves_first
):
    async with start_stack(Behaviour(ttft_s=1.0)) as stack:
        stays_s, leaves_s = 10, 0.4
        first = ask(stack, headers=KEY, timeout=leaves_s if leaves_first else stays_s)
        await until_computed(stack, eventually)
        second = ask(stack, headers=KEY, timeout=stays_s if leaves_first else leaves_s)
        gone, stayed = (first, second) if leaves_first else (second, first)
        with pytest.raises(httpx.ReadTimeout):
            await gone
        assert (await stayed).json()["usage"]["completion_tokens"] == 3
        assert stack.engine.journal.num_aborted == 0
        assert len(stack.engine.journal.bodies) == 1


async def test_client_that_left_at_its_own_timeout_finds_its_answer(start_stack, eventually):
    async with start_stack(Behaviour(ttft_s=1.5)) as stack:
        # in its last second of patience
        await leave(stack, eventually, headers={"X-Stainless-Read-Timeout": "1"})
        response = await ask(stack)
        assert response.status_code == 200
        assert len(stack.engine.journal.bodies) == 1
        assert len(stack.gateway.answers) == 0


async def test_client_that_left_with_a_key_finds_its_answer_even_when_that_is_ready(
    start_stack, eventually
):
    async with start_stack(Behaviour(ttft_s=0.4)) as stack:
        await leave(stack, eventually, headers=KEY)
        await until_computed(stack, eventually, 0)
        assert (await ask(stack, headers=KEY)).status_code == 200
        assert len(stack.engine.journal.bodies) == 1
        assert stack.engine.journal.num_aborted == 0


async def test_openais_client_that_times_out_does_not_prefill_twice(start_stack):
    async with start_stack(Behaviour(ttft_s=1.5)) as stack:
        client = stack.client.with_options(timeout=1.1, max_retries=3)
        answer = await client.chat.completions.create(**REQUEST)
        assert answer.usage.completion_tokens == 3
        assert len(stack.engine.journal.bodies) == 1


async def test_client_that_left_and_does_not_come_back_stops_the_engine(start_stack, eventually):
    async with start_stack(Behaviour(ttft_s=60), retry_grace_s=1) as stack:
        await leave(stack, eventually, headers=KEY)
        assert stack.engine.journal.num_aborted == 0
        await eventually(lambda: stack.engine.journal.num_aborted == 1)
        assert len(stack.gateway.answers) == 0
        assert len(stack.gateway.running) == 0


async def test_client_that_left_for_no_stated_reason_stops_the_engine_at_once(
    start_stack, eventually
):
    async with start_stack(Behaviour(ttft_s=60), retry_grace_s=600) as stack:
        await leave(stack, eventually, headers={"X-Stainless-Read-Timeout": "600"})
        await eventually(lambda: stack.engine.journal.num_aborted == 1)
        assert len(stack.gateway.answers) == 0


async def test_retry_keeps_its_own_deadline(start_stack, eventually):
    async with start_stack(Behaviour(ttft_s=1.8)) as stack:
        first = ask(stack, headers=KEY)
        await until_computed(stack, eventually)
        response = await ask(stack, headers={**KEY, "X-Request-Timeout-S": "1"})
        assert response.status_code == 504
        assert response.json()["error"]["code"] == "total_timeout"
        assert (await first).status_code == 200


async def test_error_reaches_all_who_wait(start_stack, eventually):
    async with start_stack(Behaviour(ttft_s=60), first_token_s=1.5) as stack:
        first = ask(stack, headers=KEY)
        await until_computed(stack, eventually)
        answers = await asyncio.gather(first, ask(stack, headers=KEY))
        assert {answer.json()["error"]["code"] for answer in answers} == {"first_token_timeout"}
        # an error is not an answer: the next one is computed
        stack.engine.behaviour.ttft_s = 0
        assert (await ask(stack, headers=KEY)).status_code == 200


async def key_of(stack, tenant_id, **scopes):
    _, token = await stack.gateway.keys.store.create_key(
        tenant_id, name="k", scopes=Scopes(**scopes)
    )
    return {"Authorization": f"Bearer {token}"}


async def test_answers_stay_inside_a_tenant_and_inside_a_keys_scopes(start_stack, eventually):
    async with start_stack(Behaviour(ttft_s=0.7), require_keys=True) as stack:
        store = stack.gateway.keys.store
        for tenant_id in ("one", "two"):
            await store.create_tenant(
                name=tenant_id, tier="default", limits=Limits(), tenant_id=tenant_id
            )
        same = [await key_of(stack, "one"), await key_of(stack, "one")]
        other = await key_of(stack, "two")
        narrow = await key_of(stack, "one", models=frozenset({"another"}))
        first = ask(stack, headers={**KEY, **same[0]})
        await until_computed(stack, eventually)
        answers = await asyncio.gather(
            first, *(ask(stack, headers={**KEY, **each}) for each in (same[1], other, narrow))
        )
        assert [answer.status_code for answer in answers] == [200, 200, 200, 403]
        assert len(stack.engine.journal.bodies) == 2


async def test_operator_sees_how_far_a_whole_answer_is(start_stack, eventually):
    async with start_stack(Behaviour(ttft_s=0.8)) as stack:
        asked = ask(stack)
        (request,) = await _running(stack, eventually)
        record = request.record
        await eventually(lambda: getattr(record.note, "total_tokens", None) == 7)
        assert record.phase == "prefill"
        assert (record.num_prompt_tokens, record.tier) == (7, "default")
        assert record.engine_id in stack.gateway.pool.engines
        await asked
        assert record.phases_s["prefill"] > 0.3


async def _running(stack, eventually):
    await eventually(lambda: stack.gateway.running.snapshot())
    return stack.gateway.running.snapshot()


@pytest.mark.parametrize("key", ["", "x" * 256])
async def test_key_of_a_wrong_length_is_refused(stack, key):
    response = await stack.http.post(
        PATH, content=json.dumps(REQUEST), headers={"Idempotency-Key": key}
    )
    assert response.status_code == 400
    assert stack.engine.journal.bodies == []
