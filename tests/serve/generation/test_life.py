"""From the call to the settled end: what the engine is sent, what the tenant is charged, who is asked again."""

import asyncio
import json

import httpx
import pytest

from sala_serve.engine.fake import Behaviour, Ending

PATH = "/v1/chat/completions"
REQUEST = {"model": "sala", "messages": [{"role": "user", "content": "Hi"}]}
LIMITS = {
    "requests_per_min": 10,
    "input_tokens_per_min": 1000,
    "output_tokens_per_min": 500,
    "tokens_in_flight": 5000,
    "tokens_per_day": 100_000,
    "cached_token_rate": 0.5,
}
ONE_AT_A_TIME = {"long_prompt_tokens": 50, "max_long_prefills": 1}


def error_of(response):
    return response.json()["error"]


# what the engine gets


async def test_engine_gets_a_salt_of_the_tenants_own(start_stack, create_key):
    async with start_stack(require_keys=True) as stack:
        # long enough not to be in a salt by chance
        names = ("first-of-two", "second-of-two")
        for tenant_id in names:
            _, headers = await create_key(stack, tenant_id)
            for _ in range(2):
                response = await stack.http.post(PATH, json=REQUEST, headers=headers)
                assert response.status_code == 200, response.text
        salts = [body["cache_salt"] for body in stack.engine.journal.bodies]
        assert salts[0] == salts[1] != salts[2] == salts[3]
        assert all(len(salt) >= 22 for salt in salts)
        assert not any(name in salt for salt in salts for name in names)


async def test_engine_serves_better_tiers_and_shorter_prompts_first(start_stack, create_key):
    tiers = {"default": {}, "gold": {"priority": -1}}
    async with start_stack(require_keys=True, tiers=tiers) as stack:
        priorities = []
        for tier, num_tokens in (("gold", 100), ("gold", 3000), ("default", 100)):
            stack.engine.behaviour.num_prompt_tokens = num_tokens
            _, headers = await create_key(stack, f"{tier}{num_tokens}", tier)
            assert (await stack.http.post(PATH, json=REQUEST, headers=headers)).status_code == 200
            priorities.append(stack.engine.journal.bodies[-1].get("priority", 0))
        assert priorities == sorted(priorities)
        assert len(set(priorities)) == 3


async def test_engine_knows_each_request_by_an_id_of_its_own(stack):
    for _ in range(2):
        await stack.http.post(PATH, json=REQUEST, headers={"X-Request-Id": "mine"})
    first, second = [headers["x-request-id"] for headers in stack.engine.journal.headers]
    assert first != second
    assert first.startswith("mine.")


async def test_service_tier_is_ours_and_does_not_reach_the_engine(start_stack):
    tiers = {"default": {}, "gold": {"priority": -1}}
    async with start_stack(tiers=tiers) as stack:
        for tier, status in (("auto", 200), ("default", 200), ("silver", 400), (5, 400)):
            response = await stack.http.post(PATH, json={**REQUEST, "service_tier": tier})
            assert response.status_code == status, tier
        assert error_of(response)["param"] == "service_tier"
        assert not any("service_tier" in body for body in stack.engine.journal.bodies)


# what is refused before anything is spent


@pytest.mark.parametrize(
    ("scopes", "body", "param"),
    [
        ({"models": frozenset({"other"})}, {}, "model"),
        ({"endpoints": frozenset({"/v1/completions"})}, {}, None),
        ({"max_context_tokens": 50}, {"max_tokens": 44}, None),
        ({"tiers": frozenset({"default"})}, {"service_tier": "gold"}, "service_tier"),
    ],
    ids=["model", "endpoint", "length", "tier"],
)
async def test_key_does_not_reach_beyond_its_scopes(
    start_stack, scopes, body, param, create_key, used
):
    tiers = {"default": {}, "gold": {}}
    async with start_stack(require_keys=True, tiers=tiers) as stack:
        tenant, headers = await create_key(stack, limits=LIMITS, **scopes)
        response = await stack.http.post(PATH, json={**REQUEST, **body}, headers=headers)
        assert response.status_code == 403
        assert (error_of(response)["code"], error_of(response)["param"]) == (
            "permission_denied",
            param,
        )
        assert stack.engine.journal.bodies == []
        assert await used(stack, tenant) == (0, 0)


async def test_key_reaches_what_its_scopes_name(start_stack, create_key):
    async with start_stack(require_keys=True) as stack:
        _, headers = await create_key(
            stack,
            models=frozenset({"sala"}),
            endpoints=frozenset({PATH, "/v1/models"}),
            max_context_tokens=50,
        )
        body = {**REQUEST, "max_tokens": 43}
        assert (await stack.http.post(PATH, json=body, headers=headers)).status_code == 200
        for path in ("/v1/models", "/v1/models/sala"):
            assert (await stack.http.get(path, headers=headers)).status_code == 200
        response = await stack.http.post("/v1/completions", json={}, headers=headers)
        assert response.status_code == 403


@pytest.mark.parametrize(
    ("num_tokens", "body", "param"),
    [
        (4096, {}, "messages"),
        (9000, {"max_tokens": 5}, "messages"),
        (4000, {"max_tokens": 97}, "max_tokens"),
        (4000, {"max_completion_tokens": 97}, "max_tokens"),
    ],
)
async def test_what_does_not_fit_is_refused_before_the_engine_sees_it(
    start_stack, num_tokens, body, param
):
    async with start_stack(Behaviour(num_prompt_tokens=num_tokens)) as stack:
        response = await stack.http.post(PATH, json={**REQUEST, **body, "stream": True})
        assert response.status_code == 400
        assert error_of(response)["code"] == "context_length_exceeded"
        assert error_of(response)["param"] == param
        assert "4096" in error_of(response)["message"]
        assert stack.engine.journal.bodies == []


async def test_what_just_fits_is_served(start_stack):
    async with start_stack(Behaviour(num_prompt_tokens=4000)) as stack:
        response = await stack.http.post(PATH, json={**REQUEST, "max_tokens": 96})
        assert response.status_code == 200


# what is charged


async def test_limits_are_told_and_refuse_with_a_time(start_stack, create_key):
    async with start_stack(require_keys=True) as stack:
        _, headers = await create_key(stack, limits={"requests_per_min": 2})
        for left in (1, 0):
            response = await stack.http.post(
                PATH, json={**REQUEST, "stream": left == 0}, headers=headers
            )
            assert response.status_code == 200
            assert response.headers["x-ratelimit-limit-requests"] == "2"
            assert response.headers["x-ratelimit-remaining-requests"] == str(left)
        response = await stack.http.post(PATH, json=REQUEST, headers=headers)
        assert response.status_code == 429
        assert error_of(response)["code"] == "rate_limit_exceeded"
        assert error_of(response)["type"] == "requests"
        assert 0 < int(response.headers["Retry-After"]) <= 30
        assert len(stack.engine.journal.bodies) == 2


@pytest.mark.parametrize("is_stream", [True, False])
async def test_finished_answer_is_charged_as_the_engine_says(
    start_stack, is_stream, create_key, used
):
    async with start_stack(require_keys=True) as stack:
        tenant, headers = await create_key(stack, limits=LIMITS)
        body = {**REQUEST, "stream": is_stream}
        assert (await stack.http.post(PATH, json=body, headers=headers)).status_code == 200
        # 7 tokens, 4 of them cached at a half; 3 generated
        assert await used(stack, tenant) == (5 + 3, 0)


async def test_running_request_holds_what_it_may_use(
    start_stack, eventually, create_key, used, charged
):
    async with start_stack(Behaviour(ttft_s=60), require_keys=True) as stack:
        tenant, headers = await create_key(stack, limits=LIMITS)
        body = {**REQUEST, "max_tokens": 100}
        asked = asyncio.create_task(stack.http.post(PATH, json=body, headers=headers))
        await eventually(lambda: stack.engine.journal.num_running == 1)
        assert await used(stack, tenant) == (107, 107)
        asked.cancel()
        await charged(stack, tenant)


async def test_what_should_be_cached_is_not_held_at_its_full_price(start_stack, create_key):
    behaviour = Behaviour(num_prompt_tokens=None, num_cached_tokens=None, max_model_len=8192)
    scheduling = {"state_interval_tokens": 512, "engine_block_tokens": 512}
    settings = {"require_keys": True, "scheduling": scheduling}
    async with start_stack(behaviour, **settings) as stack:
        limits = {"input_tokens_per_min": 3000, "cached_token_rate": 0.1}
        _, headers = await create_key(stack, limits=limits)
        long = [{"role": "user", "content": " ".join(map(str, range(2100)))}]
        for messages, status in ((long, 200), (long, 200), ([*long, *long], 429)):
            body = {"model": "sala", "messages": messages}
            response = await stack.http.post(PATH, json=body, headers=headers)
            assert response.status_code == status, response.text
        assert len(stack.engine.journal.bodies) == 2


@pytest.mark.parametrize("is_stream", [True, False])
async def test_client_that_leaves_the_queue_pays_nothing(
    start_stack, eventually, is_stream, create_key, charged
):
    behaviour = Behaviour(ttft_s=60, num_prompt_tokens=100, num_cached_tokens=0)
    settings = {**ONE_AT_A_TIME, "require_keys": True}
    async with start_stack(behaviour, **settings) as stack:
        _, busy = await create_key(stack, "busy")
        tenant, headers = await create_key(stack, limits=LIMITS)
        asked = asyncio.create_task(stack.http.post(PATH, json=REQUEST, headers=busy))
        await stack.admitted(1)
        body = {**REQUEST, "stream": is_stream}
        with pytest.raises(httpx.ReadTimeout):
            await stack.http.post(PATH, json=body, headers=headers, timeout=0.4)
        await eventually(lambda: len(stack.gateway.running) == 1)
        assert await charged(stack, tenant) == 0
        assert stack.gateway.scheduler.snapshot().num_queued == 0
        assert len(stack.engine.journal.bodies) == 1
        asked.cancel()


async def test_client_that_leaves_a_stream_pays_for_what_came(
    start_stack, eventually, create_key, charged
):
    async with start_stack(Behaviour(itl_s=0.05, num_tokens=400), require_keys=True) as stack:
        tenant, headers = await create_key(stack, limits=LIMITS)
        body = {**REQUEST, "stream": True}
        async with stack.http.stream("POST", PATH, json=body, headers=headers) as response:
            text = ""
            async for piece in response.aiter_text():
                text += piece
                if "word4 " in text:
                    break
        await eventually(lambda: len(stack.gateway.running) == 0)
        # 7 tokens of prompt, or 5 if the cached ones were seen in time
        assert 5 + 5 <= await charged(stack, tenant) < 7 + 30


@pytest.mark.parametrize(
    ("behaviour", "settings"),
    [
        (Behaviour(error=(500, {"message": "x", "code": 500})), {}),
        (Behaviour(error=(400, {"message": "x", "code": 400})), {}),
    ],
    ids=["failed", "refused"],
)
async def test_what_the_engine_refuses_is_free(start_stack, behaviour, settings, create_key, used):
    async with start_stack(behaviour, require_keys=True, **settings) as stack:
        tenant, headers = await create_key(stack, limits=LIMITS)
        response = await stack.http.post(PATH, json=REQUEST, headers=headers)
        assert response.status_code in (400, 500)
        assert await used(stack, tenant) == (0, 0)


@pytest.mark.parametrize("is_stream", [True, False])
@pytest.mark.parametrize("ending", [Ending.CONNECTION_LOST, Ending.ERROR_EVENT])
async def test_answer_that_the_engine_breaks_off_is_free(
    start_stack, create_key, used, ending, is_stream
):
    # a whole answer has no events; it is cut in the middle
    async with start_stack(Behaviour(ending=ending, num_tokens=9), require_keys=True) as stack:
        tenant, headers = await create_key(stack, limits=LIMITS)
        body = {**REQUEST, "stream": is_stream}
        response = await stack.http.post(PATH, json=body, headers=headers)
        assert "engine_lost" in response.text
        assert await used(stack, tenant) == (0, 0)


async def test_deadline_is_paid_since_a_client_can_shorten_it(start_stack, create_key, used):
    behaviour = Behaviour(itl_s=0.05, num_tokens=10_000)
    async with start_stack(behaviour, require_keys=True, total_s=0.5) as stack:
        tenant, headers = await create_key(stack, limits=LIMITS)
        body = {**REQUEST, "stream": True}
        response = await stack.http.post(PATH, json=body, headers=headers)
        assert "total_timeout" in response.text
        assert await used(stack, tenant) >= (5 + 1, 0)


# what a stream is told


async def test_stream_tells_its_place_then_its_prefill(start_stack):
    behaviour = Behaviour(
        num_prompt_tokens=100, num_cached_tokens=0, prefill_tokens_per_s=200, num_tokens=2
    )
    settings = {**ONE_AT_A_TIME, "hold_status_s": 0, "progress_interval_s": 0.05}
    async with start_stack(behaviour, **settings) as stack, stack.busy(2):
        response = await stack.http.post(
            PATH, json={**REQUEST, "stream": True}, headers={"X-Sala-Progress": "events"}
        )
        told = [
            json.loads(event.removeprefix("event: sala.progress\ndata: "))
            for event in response.text.split("\n\n")
            if event.startswith("event: ")
        ]
        places = [each["place"] for each in told if each["phase"] == "queued"]
        assert places == sorted(places, reverse=True)
        assert places[0] == 2
        assert set(places) <= {1, 2}
        phases = [each["phase"] for each in told if each["phase"] != "counting"]
        assert phases == ["queued"] * len(places) + ["prefill"] * (len(phases) - len(places))
        assert {each["total_tokens"] for each in told if each["phase"] == "prefill"} == {100}
        assert response.text.endswith("data: [DONE]\n\n")
