import asyncio
import json
import re

import httpx
import openai
import pytest

from sala_serve.engine.fake import Behaviour, Ending

MESSAGES = [{"role": "user", "content": "Say something."}]
PATH = "/v1/chat/completions"
REQUEST = {"model": "sala", "messages": MESSAGES}


async def test_chat_returns_the_engines_answer_and_usage(stack):
    answer = await stack.client.chat.completions.create(model="sala", messages=MESSAGES)
    assert answer.choices[0].message.content == "word0 word1 word2 "
    assert answer.usage.prompt_tokens == 7
    assert answer.usage.prompt_tokens_details.cached_tokens == 4
    assert answer.usage.completion_tokens == 3


async def test_chat_passes_other_fields_untouched(stack):
    extra = {"temperature": 0.25, "chat_template_kwargs": {"enable_thinking": False}, "seed": 2**60}
    content = [{"type": "text", "text": "中文 \N{SNOWMAN} \\ \x00"}]
    body = {"model": "sala", "messages": [{"role": "user", "content": content}], **extra}
    response = await stack.http.post(PATH, json=body)
    assert response.status_code == 200
    (seen,) = stack.engine.journal.bodies
    assert len(seen.pop("cache_salt")) == 43
    assert seen == body


async def test_chat_streams_every_token_and_no_usage_unless_asked(stack):
    stream = await stack.client.chat.completions.create(
        model="sala", messages=MESSAGES, stream=True
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].delta.content for chunk in chunks) == "word0 word1 word2 "
    assert all(chunk.usage is None for chunk in chunks)
    assert stack.engine.journal.bodies[0]["stream_options"] == {"include_usage": True}


async def test_chat_streams_usage_when_asked(stack):
    stream = await stack.client.chat.completions.create(
        model="sala", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.total_tokens == 10


async def test_chat_sends_tokens_as_they_come(start_stack):
    async with start_stack(Behaviour(itl_s=0.2)) as stack:
        stream = await stack.client.chat.completions.create(
            model="sala", messages=MESSAGES, stream=True
        )
        loop = asyncio.get_running_loop()
        times_s = [loop.time() async for _ in stream]
    assert times_s[1] - times_s[0] > 0.1


async def test_stream_tells_its_progress_in_comments_that_clients_ignore(start_stack):
    behaviour = Behaviour(
        num_prompt_tokens=300, num_cached_tokens=0, prefill_tokens_per_s=500, num_keep_alives=2
    )
    async with start_stack(behaviour, hold_status_s=0, progress_interval_s=0.1) as stack:
        response = await stack.http.post(PATH, json={**REQUEST, "stream": True})
        events = response.text.split("\n\n")
        notes = [event for event in events if event.startswith(":")]
        assert notes
        assert all(" total_tokens=300" in note for note in notes if " prefill " in note)
        assert not any("keep-alive" in note for note in notes)
        first = next(index for index, event in enumerate(events) if event.startswith("data:"))
        assert first == len(notes), "progress ends with the first token"
        assert events[-2:] == ["data: [DONE]", ""]
        ttft_s = await stack.metric("sala_gateway_time_to_first_token_seconds_sum", endpoint=PATH)
        assert ttft_s > 0.5


async def test_stream_tells_its_progress_in_events_if_asked(start_stack):
    behaviour = Behaviour(num_prompt_tokens=300, num_cached_tokens=0, prefill_tokens_per_s=300)
    async with start_stack(behaviour, hold_status_s=0, progress_interval_s=0.1) as stack:
        response = await stack.http.post(
            PATH, json={**REQUEST, "stream": True}, headers={"X-Sala-Progress": "events"}
        )
        named = re.findall(r"event: sala\.progress\ndata: (.*)\n\n", response.text)
        documents = [json.loads(data) for data in named]
        totals = [each["total_tokens"] for each in documents if each["phase"] == "prefill"]
        assert totals
        assert set(totals) == {300}
        assert not re.search("^:", response.text, re.MULTILINE)


async def test_progress_does_not_disturb_openais_client(start_stack):
    behaviour = Behaviour(num_prompt_tokens=100, num_cached_tokens=0, prefill_tokens_per_s=500)
    async with start_stack(behaviour, hold_status_s=0, progress_interval_s=0.05) as stack:
        stream = await stack.client.chat.completions.create(
            model="sala", messages=MESSAGES, stream=True
        )
        text = "".join([chunk.choices[0].delta.content async for chunk in stream])
    assert text == "word0 word1 word2 "


async def test_early_error_of_a_stream_keeps_its_status(stack):
    error = {"message": "maximum context length is 9", "code": 400, "param": None}
    stack.engine.behaviour.error = (400, error)
    response = await stack.http.post(PATH, json={**REQUEST, "stream": True})
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize("ending", [Ending.CONNECTION_LOST, Ending.SILENT_END, Ending.ERROR_EVENT])
async def test_stream_ends_with_an_error_when_the_engine_breaks_off(
    start_stack, eventually, ending
):
    async with start_stack(Behaviour(ending=ending)) as stack:
        response = await stack.http.post(PATH, json={**REQUEST, "stream": True})
        events = response.text.split("\n\n")
        assert events[-1] == ""
        error = json.loads(events[-2].removeprefix("data: "))["error"]
        assert error["code"] == "engine_lost"
        assert error["type"] == "server_error"
        assert "[DONE]" not in response.text
        await eventually(stack.gateway.pool.ready)
        with pytest.raises(openai.APIError, match="before the answer was complete"):
            async for _ in await stack.client.chat.completions.create(
                model="sala", messages=MESSAGES, stream=True
            ):
                pass
        labels = {"endpoint": PATH, "status": "502"}
        assert await stack.metric("sala_gateway_requests_total", **labels) == 2


async def test_stream_that_breaks_before_its_first_token_is_a_plain_error(start_stack):
    behaviour = Behaviour(num_tokens=0, ending=Ending.CONNECTION_LOST)
    async with start_stack(behaviour) as stack:
        response = await stack.http.post(PATH, json={**REQUEST, "stream": True})
        assert response.status_code == 502
        assert response.json()["error"]["code"] == "engine_lost"


@pytest.mark.parametrize("ending", [Ending.CONNECTION_LOST, Ending.SILENT_END])
async def test_chat_reports_a_torn_answer(start_stack, ending):
    async with start_stack(Behaviour(ending=ending)) as stack:
        response = await stack.http.post(PATH, json=REQUEST)
        assert response.status_code == 502
        assert response.json()["error"]["code"] == "engine_lost"


@pytest.mark.parametrize("is_stream", [True, False])
async def test_hang_up_during_prefill_aborts_in_the_engine(start_stack, eventually, is_stream):
    async with start_stack(Behaviour(ttft_s=60)) as stack:
        with pytest.raises(httpx.ReadTimeout):
            await stack.http.post(PATH, json={**REQUEST, "stream": is_stream}, timeout=0.3)
        await eventually(lambda: stack.engine.journal.num_aborted == 1)
        await eventually(lambda: len(stack.gateway.running) == 0)
        assert stack.engine.journal.num_running == 0
        labels = {"endpoint": PATH, "status": "499"}
        assert await stack.metric("sala_gateway_requests_total", **labels) == 1


async def test_hang_up_in_the_middle_of_a_stream_aborts_in_the_engine(start_stack, eventually):
    async with start_stack(Behaviour(itl_s=0.02, num_tokens=10_000)) as stack:
        stream = await stack.client.chat.completions.create(
            model="sala", messages=MESSAGES, stream=True
        )
        async for _ in stream:
            break
        await stream.close()
        await eventually(lambda: stack.engine.journal.num_aborted == 1)
        await eventually(lambda: len(stack.gateway.running) == 0)


@pytest.mark.parametrize("is_stream", [True, False])
async def test_client_that_reads_nothing_is_cut_off(start_stack, eventually, is_stream):
    behaviour = Behaviour(num_tokens=200, num_padding_chars=100_000)
    async with start_stack(behaviour, send_timeout_s=0.2) as stack:
        host, port = stack.url.removeprefix("http://").split(":")
        body = json.dumps({**REQUEST, "stream": is_stream}).encode()
        head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        _, writer = await asyncio.open_connection(host, int(port), limit=1024)
        writer.write(head.encode() + body)
        await eventually(lambda: len(stack.engine.journal.bodies) == 1)
        await eventually(lambda: len(stack.gateway.running) == 0)
        await eventually(lambda: stack.engine.journal.num_running == 0)
        labels = {"endpoint": PATH, "status": "499"}
        assert await stack.metric("sala_gateway_requests_total", **labels) == 1
        writer.close()
        await writer.wait_closed()


async def test_request_goes_unanswered_for_longer_than_the_read_timeout(start_stack):
    async with start_stack(Behaviour(ttft_s=60), engine_read_timeout_s=0.2) as stack:
        response = await stack.http.post(PATH, json=REQUEST)
        assert response.status_code == 504
        assert response.json()["error"]["code"] == "engine_timeout"


async def test_two_requests_run_at_the_same_time(start_stack):
    async with start_stack(Behaviour(ttft_s=0.3)) as stack:
        loop = asyncio.get_running_loop()
        started_at_s = loop.time()
        bodies = [{**REQUEST, "seed": seed} for seed in range(8)]
        responses = await asyncio.gather(*(stack.http.post(PATH, json=body) for body in bodies))
        assert {response.status_code for response in responses} == {200}
        assert loop.time() - started_at_s < 1.5
