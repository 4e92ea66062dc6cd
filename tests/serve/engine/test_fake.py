"""The stand-in itself: what other tests build on."""

import asyncio

import httpx
import pytest
from openai import AsyncOpenAI

from sala_serve.engine.fake import Behaviour, Fault
from sala_serve.engine.fake_server import FakeServer

WORDS = " ".join(f"w{i}" for i in range(100))
COUNTED = {"num_prompt_tokens": None, "num_cached_tokens": None}


def ask(prompt, **options):
    return {"model": "sala", "prompt": prompt, "max_tokens": 2, **options}


@pytest.fixture
async def server():
    async with FakeServer(Behaviour(**COUNTED)) as server:
        yield server


@pytest.fixture
async def http():
    async with httpx.AsyncClient(timeout=5) as http:
        yield http


async def usage(http, server, **options):
    answer = await http.post(f"{server.url}/v1/completions", json=ask(**options))
    return answer.raise_for_status().json()["usage"]


async def test_tokens_are_words_and_tokenize_agrees(http, server):
    messages = [{"role": "user", "content": [{"type": "text", "text": "three words here"}]}]
    tokenized = await http.post(f"{server.url}/tokenize", json={"messages": messages})
    assert (tokenized.json()["count"], len(tokenized.json()["tokens"])) == (4, 4)
    chat = {"model": "sala", "messages": messages}
    answer = await http.post(f"{server.url}/v1/chat/completions", json=chat)
    assert answer.json()["usage"]["prompt_tokens"] == 4


async def test_prefix_is_cached_in_whole_blocks_under_the_same_salt_only(http, server):
    async def cached(prompt, salt):
        found = await usage(http, server, prompt=prompt, cache_salt=salt)
        return found["prompt_tokens_details"]["cached_tokens"]

    assert await cached(WORDS, "a") == 0
    assert await cached(f"{WORDS} more", "a") == 96
    assert await cached(WORDS, "b") == 0
    assert await cached(f"other {WORDS}", "a") == 0


async def test_prefill_takes_its_time_and_shows_how_far_it_is(http, server, eventually):
    server.behaviour.prefill_tokens_per_s = 200
    headers = {"X-Request-Id": "r1"}
    asking = asyncio.create_task(
        http.post(f"{server.url}/v1/completions", json=ask(WORDS), headers=headers)
    )
    seen = []

    async def look():
        document = (await http.get(f"{server.url}/sala/progress")).json()
        if "r1" in document["requests"]:
            seen.append(document["requests"]["r1"]["num_computed_tokens"])
            assert document["kv"]["used_tokens"] >= seen[-1]

    while not asking.done():
        await look()
        await asyncio.sleep(0.02)
    assert len(set(seen)) > 3
    assert seen == sorted(seen)
    assert server.engine.core.num_prefilled_tokens == 100


async def test_requests_beyond_the_limit_wait(http, server, eventually):
    def phases():
        return [job.phase for job in server.engine.core.jobs]

    server.behaviour.max_num_seqs = 1
    server.behaviour.ttft_s = 600
    first = asyncio.create_task(usage(http, server, prompt="one two"))
    await eventually(lambda: phases() == ["prefilling"])
    second = asyncio.create_task(usage(http, server, prompt="one two"))
    await eventually(lambda: len(phases()) == 2)
    for _ in range(10):  # it would have begun by then
        await http.get(f"{server.url}/health")
    assert phases() == ["prefilling", "waiting"]
    server.behaviour.ttft_s = 0
    first.cancel()
    assert (await second)["prompt_tokens"] == 2


async def test_frozen_core_answers_health_and_nothing_moves(http, server):
    server.engine.core.freeze()
    asking = asyncio.create_task(usage(http, server, prompt="one two"))
    assert (await http.get(f"{server.url}/health")).status_code == 200
    steps = server.engine.core.step
    await asyncio.wait({asking}, timeout=0.1)
    assert not asking.done()
    assert server.engine.core.step == steps
    server.engine.core.thaw()
    assert (await asking)["prompt_tokens"] == 2


async def test_deaf_engine_answers_nothing(http, server):
    server.engine.is_deaf = True
    with pytest.raises(httpx.ReadTimeout):
        await http.get(f"{server.url}/health", timeout=0.1)
    server.engine.is_deaf = False


@pytest.mark.parametrize("phase", ["waiting", "prefilling", "decoding"])
async def test_killed_engine_resets_connections_and_can_come_back(http, server, phase):
    server.behaviour.fault = (phase, Fault.KILLED)
    with pytest.raises(httpx.TransportError):
        await usage(http, server, prompt=WORDS)
    with pytest.raises(httpx.ConnectError):
        await http.get(f"{server.url}/health")
    server.behaviour.fault = None
    await server.start()
    assert (await usage(http, server, prompt=WORDS))["prompt_tokens"] == 100


async def test_engine_out_of_memory_fails_all_requests_then_is_gone(http, server, eventually):
    server.behaviour.ttft_s = 30
    other = asyncio.create_task(http.post(f"{server.url}/v1/completions", json=ask("one two")))
    await eventually(lambda: [job.phase for job in server.engine.core.jobs] == ["prefilling"])
    server.behaviour.fault = ("prefilling", Fault.OUT_OF_MEMORY)
    answer = await http.post(f"{server.url}/v1/completions", json=ask(WORDS))
    assert answer.status_code == 500
    assert "EngineCore" in answer.json()["error"]["message"]
    assert (await other).status_code == 500
    await eventually(lambda: server.num_connections == 0)
    with pytest.raises(httpx.ConnectError):
        await http.get(f"{server.url}/health")


async def test_several_answers_and_tool_calls_have_openais_form(server):
    server.behaviour.calls_tools = True
    tool = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}}
    messages = [{"role": "user", "content": "Hello"}]
    async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        answer = await client.chat.completions.create(
            model="sala", messages=messages, n=2, tools=[tool]
        )
        assert [choice.index for choice in answer.choices] == [0, 1]
        assert answer.choices[1].message.tool_calls[0].function.name == "look_up"
        stream = await client.chat.completions.create(
            model="sala", messages=messages, tools=[tool], stream=True
        )
        last = [chunk async for chunk in stream][-1].choices[0]
    assert last.finish_reason == "tool_calls"
    assert last.delta.tool_calls[0].function.name == "look_up"


async def test_engine_without_the_plugin_shows_its_use_in_metrics_only(http, server):
    server.behaviour.has_progress = False
    assert (await http.get(f"{server.url}/sala/progress")).status_code == 404
    metrics = (await http.get(f"{server.url}/metrics")).text
    assert 'vllm:kv_cache_usage_perc{engine="0"} 0.0' in metrics
