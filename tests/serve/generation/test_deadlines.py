"""Each phase has a deadline; what a client sees at its end, and what is left behind."""

import asyncio
import json

import pytest

from sala_serve.engine.fake import Behaviour

PATH = "/v1/chat/completions"
REQUEST = {"model": "sala", "messages": [{"role": "user", "content": "Hi"}]}
ONE_AT_A_TIME = {"long_prompt_tokens": 50, "max_long_prefills": 1}
LONG = {"num_prompt_tokens": 100, "num_cached_tokens": 0}


def last_event(response):
    assert response.headers["content-type"].startswith("text/event-stream")
    return json.loads(response.text.strip().split("\n\n")[-1].removeprefix("data: "))


@pytest.mark.parametrize("is_stream", [True, False])
async def test_no_turn_in_time_is_504_that_tells_the_place(start_stack, eventually, is_stream):
    behaviour = Behaviour(ttft_s=60, **LONG)
    async with start_stack(behaviour, queue_s=0.3, **ONE_AT_A_TIME) as stack, stack.busy(1):
        response = await stack.http.post(PATH, json={**REQUEST, "stream": is_stream})
        assert response.status_code == 504
        assert response.json()["error"]["code"] == "queue_timeout"
        assert response.headers["X-Sala-Queue-Place"] == "1"
        assert int(response.headers["X-Sala-Expected-Wait-S"]) >= 1
        assert len(stack.engine.journal.bodies) == 1
        assert stack.gateway.scheduler.snapshot().num_queued == 0


async def test_no_turn_in_time_after_the_status_is_one_error_event(start_stack):
    behaviour = Behaviour(ttft_s=60, **LONG)
    settings = {**ONE_AT_A_TIME, "queue_s": 0.5, "hold_status_s": 0, "progress_interval_s": 0.1}
    async with start_stack(behaviour, **settings) as stack, stack.busy(1):
        response = await stack.http.post(PATH, json={**REQUEST, "stream": True})
        assert response.status_code == 200
        assert last_event(response)["error"]["code"] == "queue_timeout"
        assert "[DONE]" not in response.text
        notes = [line for line in response.text.split("\n") if line.startswith(": queued")]
        assert notes
        assert all(" place=1 ahead_tokens=100 " in note for note in notes)


@pytest.mark.parametrize("is_stream", [True, False])
async def test_no_first_token_in_time_stops_the_engine(start_stack, eventually, is_stream):
    async with start_stack(Behaviour(ttft_s=60), first_token_s=0.2) as stack:
        response = await stack.http.post(PATH, json={**REQUEST, "stream": is_stream})
        assert response.status_code == 504
        assert response.json()["error"]["code"] == "first_token_timeout"
        assert response.headers["X-Should-Retry"] == "false"
        await eventually(lambda: stack.engine.journal.num_aborted == 1)


async def test_first_tokens_deadline_is_over_with_the_first_token(start_stack):
    behaviour = Behaviour(num_tokens=8, itl_s=0.1)
    async with start_stack(behaviour, first_token_s=0.4) as stack:
        response = await stack.http.post(PATH, json={**REQUEST, "stream": True})
        assert response.text.endswith("data: [DONE]\n\n")


async def test_no_next_token_in_time_ends_the_stream_with_an_error(start_stack, eventually):
    async with start_stack(Behaviour(itl_s=60), between_tokens_s=0.2) as stack:
        response = await stack.http.post(PATH, json={**REQUEST, "stream": True})
        assert response.status_code == 200
        assert "word0" in response.text
        assert last_event(response)["error"]["code"] == "engine_timeout"
        await eventually(lambda: stack.engine.journal.num_aborted == 1)


async def test_slow_reader_is_not_taken_for_a_slow_engine(start_stack):
    behaviour = Behaviour(num_tokens=100, num_padding_chars=100_000)
    async with start_stack(behaviour, between_tokens_s=0.3) as stack:
        async with stack.http.stream("POST", PATH, json={**REQUEST, "stream": True}) as response:
            pieces = response.aiter_bytes()
            text = await anext(pieces)
            await asyncio.sleep(1.0)
            async for piece in pieces:
                text += piece
        assert text.endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize("is_stream", [True, False])
async def test_no_end_in_time_stops_the_engine(start_stack, eventually, is_stream):
    behaviour = Behaviour(num_tokens=10_000, itl_s=0.05)
    async with start_stack(behaviour, total_s=0.4) as stack:
        response = await stack.http.post(PATH, json={**REQUEST, "stream": is_stream})
        error = last_event(response) if is_stream else response.json()
        assert error["error"]["code"] == "total_timeout"
        assert is_stream or response.headers["X-Should-Retry"] == "false"
        await eventually(lambda: stack.engine.journal.num_aborted == 1)


@pytest.mark.parametrize(
    ("behaviour", "code"),
    [
        (Behaviour(ttft_s=60), "first_token_timeout"),
        (Behaviour(num_tokens=10_000, itl_s=0.05), "total_timeout"),
    ],
)
async def test_client_shortens_every_deadline(start_stack, behaviour, code):
    async with start_stack(behaviour) as stack:
        response = await stack.http.post(PATH, json=REQUEST, headers={"X-Request-Timeout-S": "1"})
        assert response.status_code == 504
        assert response.json()["error"]["code"] in {code, "total_timeout"}


async def test_client_cannot_lengthen_a_deadline(start_stack):
    async with start_stack(Behaviour(ttft_s=60), first_token_s=0.2) as stack:
        response = await stack.http.post(PATH, json=REQUEST, headers={"X-Request-Timeout-S": "99"})
        assert response.json()["error"]["code"] == "first_token_timeout"


@pytest.mark.parametrize("text", ["0", "0.9", "-1", "soon", "inf", "nan", ""])
async def test_timeout_that_is_no_number_is_refused(stack, text):
    response = await stack.http.post(PATH, json=REQUEST, headers={"X-Request-Timeout-S": text})
    assert response.status_code == 400
    assert stack.engine.journal.bodies == []


async def test_full_queue_tells_place_and_wait(start_stack):
    behaviour = Behaviour(ttft_s=60, **LONG)
    settings = {**ONE_AT_A_TIME, "max_queued_requests": 1}
    async with start_stack(behaviour, **settings) as stack, stack.busy(2):
        response = await stack.http.post(PATH, json={**REQUEST, "stream": True})
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "queue_full"
        assert response.headers["X-Sala-Queue-Place"] == "2"
        assert int(response.headers["X-Sala-Expected-Wait-S"]) >= 1
        assert "Retry-After" in response.headers or response.headers["X-Should-Retry"] == "false"
