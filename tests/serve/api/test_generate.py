"""Errors and load of a generating request, which chat and completions share."""

import asyncio
import json
import re

import openai
import pytest

from sala_serve.engine.connection import Address
from sala_serve.engine.fake import Behaviour

PATH = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "Hi"}]
REQUEST = {"model": "sala", "messages": MESSAGES}


async def test_unknown_model_is_refused_before_the_engine_sees_the_prompt(stack):
    with pytest.raises(openai.NotFoundError) as caught:
        await stack.client.chat.completions.create(model="other", messages=MESSAGES)
    assert caught.value.code == "model_not_found"
    assert caught.value.param == "model"
    assert stack.engine.journal.bodies == []


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ("{", None, "invalid_request"),
        ("[]", None, "invalid_request"),
        ('{"a": NaN}', None, "invalid_request"),
        ("[" * 100_000, None, "invalid_request"),
        (b"\xff\xfe", None, "invalid_request"),
        (json.dumps({"model": "sala"}), "messages", "invalid_request"),
        (json.dumps({"messages": MESSAGES}), "model", "invalid_request"),
        (json.dumps({**REQUEST, "messages": []}), "messages", "invalid_request"),
        (json.dumps({**REQUEST, "messages": [{}]}), "messages.0.role", "invalid_request"),
        (json.dumps({**REQUEST, "stream": "yes"}), "stream", "invalid_request"),
        (
            json.dumps({**REQUEST, "stream_options": {"include_usage": 1}}),
            "stream_options.include_usage",
            "invalid_request",
        ),
        (json.dumps({**REQUEST, "messages": [5]}), "messages.0", "invalid_request"),
        (json.dumps({**REQUEST, "messages": "Hi"}), "messages", "invalid_request"),
        (json.dumps({**REQUEST, "stream_options": 5}), "stream_options", "invalid_request"),
        ('{"seed": %s}' % ("1" * 5000), None, "invalid_request"),
        (
            '{"model": "sala", "messages": [{"role": "user"}], "seed": 1e999}',
            None,
            "invalid_request",
        ),
        (json.dumps({**REQUEST, "vllm_xargs": {"a": 1}}), "vllm_xargs", "field_not_allowed"),
        (json.dumps({**REQUEST, "priority": -5}), "priority", "field_not_allowed"),
        (json.dumps({**REQUEST, "cache_salt": "x"}), "cache_salt", "field_not_allowed"),
        (
            json.dumps({**REQUEST, "kv_transfer_params": {}}),
            "kv_transfer_params",
            "field_not_allowed",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
async def test_bad_body_is_refused_with_the_fields_path(stack, body, param, code):
    response = await stack.http.post(PATH, content=body)
    assert response.status_code == 400
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", param, code)
    assert stack.engine.journal.bodies == []


async def test_starting_engine_gives_503_with_retry_after(start_stack):
    async with start_stack(Behaviour(health_status=503)) as stack:
        with pytest.raises(openai.InternalServerError) as caught:
            await stack.client.chat.completions.create(model="sala", messages=MESSAGES)
        assert caught.value.status_code == 503
        assert caught.value.code == "engine_unavailable"
        assert int(caught.value.response.headers["Retry-After"]) > 0


async def test_engine_that_vanished_gives_503_even_before_a_probe_notices(start_stack):
    async with start_stack() as stack:
        (engine,) = stack.gateway.pool.engines.values()
        engine.client._address = Address("127.0.0.1", 9, socket=None, ssl_context=None)
        response = await stack.http.post(PATH, json=REQUEST)
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "engine_unavailable"
    assert "Retry-After" in response.headers


async def test_engine_failure_tells_the_client_nothing_of_its_inside(stack):
    stack.engine.behaviour.error = (500, {"message": 'File "/opt/x.py", line 3', "code": 500})
    response = await stack.http.post(PATH, json=REQUEST)
    assert response.status_code == 500
    assert response.json()["error"] == {
        "message": "The engine failed on this request.",
        "type": "server_error",
        "param": None,
        "code": "engine_error",
    }


async def test_bug_in_the_gateway_is_a_shaped_500(stack, monkeypatch, caplog):
    monkeypatch.setattr(stack.gateway.pool, "require_ready", lambda: 1 / 0)
    response = await stack.http.post(PATH, json=REQUEST, headers={"X-Request-Id": "bug1"})
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "internal_error"
    assert response.headers["X-Request-Id"] == "bug1"
    assert "ZeroDivision" not in response.text
    assert "bug1 /v1/chat/completions failed" in caplog.text
    labels = {"endpoint": PATH, "status": "500"}
    assert await stack.metric("sala_gateway_requests_total", **labels) == 1


async def test_slow_upload_times_out(start_stack):
    async with start_stack(upload_timeout_s=0.2) as stack:

        async def body():
            yield b'{"model":'
            await asyncio.sleep(0.6)

        response = await stack.http.post(PATH, content=body())
        assert response.status_code == 408
        assert response.json()["error"]["code"] == "upload_timeout"


async def test_upload_in_drops_does_not_hold_its_place_for_ever(start_stack):
    async with start_stack(upload_timeout_s=0.3) as stack:

        async def body():
            for _ in range(12):
                yield b" "
                await asyncio.sleep(0.05)

        response = await stack.http.post(PATH, content=body())
        assert response.status_code == 408


async def test_compressed_body_is_refused_in_words(stack):
    headers = {"Content-Encoding": "gzip"}
    response = await stack.http.post(PATH, content=b"\x1f\x8b", headers=headers)
    assert response.status_code == 400
    assert "Content-Encoding" in response.json()["error"]["message"]


async def test_requests_above_the_maximum_are_refused_before_their_body_is_read(
    start_stack, eventually
):
    async with start_stack(Behaviour(ttft_s=60), max_running_requests=1) as stack:
        running = asyncio.create_task(stack.http.post(PATH, json=REQUEST))
        await eventually(lambda: stack.engine.journal.num_running == 1)
        with pytest.raises(openai.InternalServerError) as caught:
            await stack.client.chat.completions.create(model="sala", messages=MESSAGES)
        assert caught.value.code == "overloaded"
        assert caught.value.response.headers["Retry-After"] == "5"
        stack.gateway.running.cut_all()
        assert (await running).json()["error"]["code"] == "shutting_down"


async def test_request_that_still_uploads_can_be_cut(start_stack, eventually):
    async with start_stack() as stack:
        is_open = asyncio.Event()

        async def body():
            yield b'{"model":'
            await is_open.wait()

        uploading = asyncio.create_task(stack.http.post(PATH, content=body()))
        await eventually(lambda: len(stack.gateway.running) == 1)
        assert await stack.gateway.running.drain(timeout_s=0.01) == 1
        await eventually(lambda: len(stack.gateway.running) == 0)
        is_open.set()
        response = await uploading
        assert (response.status_code, response.json()["error"]["code"]) == (503, "shutting_down")


async def test_only_known_headers_reach_the_engine(stack):
    headers = {
        "Authorization": "Bearer secret",
        "X-data-parallel-rank": "1",
        "traceparent": "00-1-2-3",
        "X-Request-Id": "abc",
    }
    await stack.http.post(PATH, json=REQUEST, headers=headers)
    (seen,) = stack.engine.journal.headers
    # clients may repeat their ids; the engine's must not collide
    assert re.fullmatch(r"abc\.[0-9a-f]{8}", seen["x-request-id"])
    assert seen["traceparent"] == "00-1-2-3"
    assert "authorization" not in seen
    assert "x-data-parallel-rank" not in seen


async def test_million_token_bodies_do_not_block_the_loop(fake_process, start_stack):
    text = "The quick brown fox, 中文 tokens. " * 150_000
    body = json.dumps({**REQUEST, "messages": [{"role": "user", "content": text}]}).encode()
    loop = asyncio.get_running_loop()
    gaps_s = []

    async def tick():
        while True:
            before_s = loop.time()
            await asyncio.sleep(0.001)
            gaps_s.append(loop.time() - before_s)

    async with start_stack(engine_url=fake_process, max_running_requests=1) as stack:
        # the client shares this loop, so the bound is loose
        ticking = asyncio.create_task(tick())
        response = await stack.http.post(PATH, content=body, timeout=60)
        ticking.cancel()
        assert stack.gateway.uploads.num_buffered_bytes == 0
    assert response.status_code == 200
    assert max(gaps_s) < 0.5


async def test_no_prompt_reaches_the_log(stack, caplog):
    caplog.set_level("DEBUG", logger="sala_serve")
    secret = "a-secret-sentence"
    bodies = [
        {"model": "sala", "messages": [{"role": "user", "content": secret}]},
        {"model": "sala", "messages": [{"content": secret}]},
        {"model": "sala", "messages": secret},
    ]
    for body in bodies:
        await stack.http.post(PATH, json=body)
        await stack.http.post(PATH, json={**body, "stream": True})
    assert "prompt_tokens=7 cached_tokens=4 completion_tokens=3" in caplog.text
    assert secret not in caplog.text


async def test_stated_length_above_the_limit_is_refused(start_stack):
    async with start_stack(max_body_bytes=1000) as stack:
        with pytest.raises(openai.APIStatusError) as caught:
            await stack.client.chat.completions.create(
                model="sala", messages=[{"role": "user", "content": "x" * 2_000_000}]
            )
    assert caught.value.status_code == 413
    assert caught.value.code == "body_too_large"


async def test_unstated_length_is_counted(start_stack):
    async def body():
        for _ in range(20):
            yield b" " * 100

    async with start_stack(max_body_bytes=1000) as stack:
        response = await stack.http.post(PATH, content=body())
        labels = {"endpoint": PATH, "status": "413"}
        assert await stack.metric("sala_gateway_requests_total", **labels) == 1
    assert response.status_code == 413


async def test_body_at_the_limit_is_accepted(start_stack):
    body = b'{"model": "sala", "messages": [{"role": "user"}]}'
    async with start_stack(max_body_bytes=len(body)) as stack:
        assert (await stack.http.post(PATH, content=body)).status_code == 200
        assert (await stack.http.post(PATH, content=body + b" ")).status_code == 413


async def test_client_retries_what_passes_and_nothing_else(start_stack):
    async with start_stack(Behaviour(health_status=503), engine_read_timeout_s=0.2) as stack:
        client = stack.client.with_options(max_retries=1)
        waits_s = []

        async def note_wait(delay_s):
            waits_s.append(delay_s)

        client._sleep_for_retry = lambda **how: note_wait(
            client._calculate_retry_timeout(2, how["options"], how["response"].headers)
        )
        with pytest.raises(openai.InternalServerError):
            await client.chat.completions.create(model="sala", messages=MESSAGES)
        assert waits_s == [5.0]  # Retry-After
        stack.engine.behaviour.health_status, stack.engine.behaviour.ttft_s = 200, 60
        await stack.gateway.monitor.wait_ready()
        with pytest.raises(openai.InternalServerError) as caught:
            await client.chat.completions.create(model="sala", messages=MESSAGES)
        assert caught.value.code == "engine_timeout"
        assert len(stack.engine.journal.bodies) == 1
