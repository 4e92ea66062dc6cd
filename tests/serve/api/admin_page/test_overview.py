"""What the page is filled with: a real gateway at work."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager

from sala_serve.api.admin_page.overview import GatewayActions
from sala_serve.api.admin_page.view import Bar
from sala_serve.engine.fake import Behaviour
from sala_serve.tenants.model import Limits, Scopes

SLOW = Behaviour(
    max_model_len=100_000,
    num_prompt_tokens=None,
    num_cached_tokens=None,
    prefill_tokens_per_s=2000,
    kv_capacity_tokens=200_000,
)
LIMITS = Limits(tokens_in_flight=50_000, requests_per_min=60)


@asynccontextmanager
async def busy(start_stack, eventually, *, num_long=1, **config):
    """A stack whose tenant "acme" has long prompts under way; its store's text of the key, and the clients."""
    async with start_stack(SLOW, require_keys=True, **config) as stack:
        store = stack.gateway.keys.store
        await store.create_tenant(name="Acme", tier="default", limits=LIMITS, tenant_id="acme")
        key, token = await store.create_key("acme", name="ci", scopes=Scopes())
        body = {"model": "sala", "stream": True, "max_tokens": 5}
        headers = {"Authorization": f"Bearer {token}"}

        async def ask(number):
            url = "/v1/completions"
            ids = {"X-Request-Id": f"long-{number}"}
            # none of it is in the cache by another's doing
            prompt = {"prompt": f"w{number} " * 20_000}
            return await stack.http.post(url, json=body | prompt, headers=headers | ids, timeout=60)

        async with asyncio.TaskGroup() as group:
            asking = [group.create_task(ask(number)) for number in range(num_long)]
            try:
                await eventually(lambda: len(stack.engine.core.jobs) >= 1)
                yield stack, key, asking
            finally:
                stack.gateway.running.cut_all()


async def test_long_prefill_is_seen_with_its_progress_in_tokens(start_stack, eventually):
    async with busy(start_stack, eventually) as (stack, key, _):
        actions = GatewayActions(stack.gateway)

        def progress():
            (record,) = (each.record for each in stack.gateway.running.snapshot())
            return getattr(record.note, "done_tokens", None) or 0

        await eventually(lambda: progress() > 2000)
        view = await actions.overview()
        (row,) = view.running
        assert (row.request_id, row.tenant_id, row.phase) == ("long-0", "acme", "prefill")
        assert row.num_prompt_tokens == 20_000
        assert 2000 < row.done_tokens < 20_000
        assert 0 < row.expected_s < 20
        (engine,) = view.engines
        assert (engine.state, engine.num_prefilling) == ("ready", 1)
        assert 0 < engine.prefill_left_tokens < 20_000
        assert engine.memory.limit == 200_000
        assert engine.memory.used >= 20_000
        (tenant,) = view.tenants
        assert (tenant.tenant_id, tenant.num_running) == ("acme", 1)
        assert Bar("tokens in flight", 20_005, 50_000) in tenant.limits
        assert [(each.key_id, each.state) for each in tenant.keys] == [(key.key_id, "active")]


async def test_what_waits_has_a_place(start_stack, eventually):
    config = {"max_long_prefills": 1, "long_prompt_tokens": 10_000}
    async with busy(start_stack, eventually, num_long=2, **config) as (stack, _, _):
        actions = GatewayActions(stack.gateway)
        async with asyncio.timeout(20):
            while True:
                view = await actions.overview()
                if view.queued and view.queued[0].place is not None:
                    break
                await asyncio.sleep(0.02)
        (waiting,) = view.queued
        assert waiting.place == 1
        assert waiting.num_prompt_tokens == 20_000
        assert view.queued_tokens == 20_000
        queue = {"tier": "default"}
        assert await stack.metric("sala_gateway_queued_tokens", **queue) == 20_000
        assert await stack.metric("sala_gateway_queued_requests", **queue) == 1
        assert view.tenants[0].num_queued == 1


async def test_cancel_ends_the_request_and_frees_the_engine(start_stack, eventually):
    async with busy(start_stack, eventually) as (stack, _, asking):
        actions = GatewayActions(stack.gateway)
        assert await actions.cancel_request("long-0")
        text = (await asking[0]).text
        assert "cancelled by the operator" in text
        await eventually(lambda: not stack.engine.core.jobs)
        assert not await actions.cancel_request("long-0")


async def test_background_response_is_seen_with_its_progress_and_cancelled(start_stack, eventually):
    async with start_stack(SLOW) as stack:
        actions = GatewayActions(stack.gateway)
        body = {"model": "sala", "input": "w " * 20_000, "background": True}
        response_id = (await stack.http.post("/v1/responses", json=body)).json()["id"]

        async def seen():
            async with asyncio.timeout(20):
                while True:
                    view = await actions.overview()
                    if view.requests and view.requests[0].done_tokens:
                        return view
                    await asyncio.sleep(0.02)

        view = await seen()
        (row,) = view.running
        assert (row.endpoint, row.tenant_id, row.phase) == ("/v1/responses", "default", "prefill")
        assert 0 < row.done_tokens < row.num_prompt_tokens
        assert view.jobs == (("response", "in_progress", 1),)
        assert await actions.cancel_request(row.request_id)
        await eventually(lambda: not stack.engine.core.jobs)
        url = f"/v1/responses/{response_id}"
        async with asyncio.timeout(20):
            while True:
                answer = (await stack.http.get(url)).json()
                if answer["status"] == "failed":
                    break
                await asyncio.sleep(0.02)
        assert answer["error"]["message"] == "The request was cancelled by the operator."
        await eventually(lambda: not stack.gateway.running.snapshot())
        assert (await actions.overview()).jobs == ()


async def test_revoked_key_does_not_work_any_more(start_stack, eventually):
    async with busy(start_stack, eventually, key_cache_s=0.01) as (stack, key, _):
        actions = GatewayActions(stack.gateway)
        assert not await actions.revoke_key("nosuchkey")
        assert await actions.revoke_key(key.key_id)
        (tenant,) = (await actions.overview()).tenants
        assert [(each.state, each.can_revoke) for each in tenant.keys] == [("revoked", False)]


async def test_state_that_is_away_leaves_the_rest_of_the_page(
    start_stack, redis_server, eventually
):
    async with start_stack(url=redis_server.url) as stack:
        redis_server.stop()
        try:
            await eventually(lambda: not stack.gateway.state.is_available)
            view = await GatewayActions(stack.gateway).overview()
        finally:
            redis_server.start()
    assert view.tenants is None
    assert [each.state for each in view.engines] == ["ready"]


async def scraped(stack):
    return (await stack.http.get("/metrics")).text


async def test_scrape_shows_the_load(start_stack, eventually):
    async with busy(start_stack, eventually) as (stack, _, _):
        (engine,) = stack.gateway.pool.engines
        labels = {"engine": engine}
        assert 'sala_gateway_queued_requests{tier="default"} 0.0' in await scraped(stack)
        assert await stack.metric("sala_gateway_engine_up", **labels) == 1
        assert await stack.metric("sala_gateway_engine_stuck", **labels) == 0
        in_prefill = {**labels, "phase": "prefilling"}
        assert await stack.metric("sala_gateway_engine_requests", **in_prefill) == 1
        assert 0 < await stack.metric("sala_gateway_engine_prefill_tokens_left", **labels) <= 20_000
        assert await stack.metric("sala_gateway_engine_kv_capacity_tokens", **labels) == 200_000
        assert await stack.metric("sala_gateway_service_gap_bound_tokens") > 0
