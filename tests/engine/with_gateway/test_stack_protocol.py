"""What the gateway relies on in the real engine, and what it passes through; through the gateway."""

from __future__ import annotations

import asyncio
import json
import re
from typing import TYPE_CHECKING, Any

import httpx
import openai
import pytest

if TYPE_CHECKING:
    from openai import AsyncOpenAI

Stack = Any  # fixture in conftest.py; its class is not importable from here

MODEL = "demo"
PATH = "/v1/chat/completions"
PROMPT_TOKENS = 8_000
"""Four steps of the engine."""

pytestmark = [pytest.mark.engine, pytest.mark.slow]

LOOK_UP = {
    "type": "function",
    "function": {
        "name": "look_up",
        "strict": True,  # else vLLM takes any JSON for arguments
        "parameters": {
            "type": "object",
            "properties": {"digit": {"type": "integer", "enum": [3, 7]}},
            "required": ["digit"],
            "additionalProperties": False,
        },
    },
}
COLOUR = {
    "type": "object",
    "properties": {"is_warm": {"type": "boolean"}, "colour": {"enum": ["red", "green"]}},
    "required": ["is_warm", "colour"],
    "additionalProperties": False,
}


def chat(content: str, **options: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": content}], **options}


async def test_prefill_is_followed_from_the_engine_to_the_stream(stack: Stack) -> None:
    body = chat(
        stack.long_text(PROMPT_TOKENS, start=3_000),
        stream=True,
        stream_options={"include_usage": True},
        max_tokens=40,
        ignore_eos=True,
    )
    told: list[dict[str, int]] = []
    usage: dict[str, int] = {}

    async def read() -> None:
        async with (
            httpx.AsyncClient(base_url=stack.url, timeout=120) as http,
            http.stream("POST", PATH, json=body, headers={"X-Request-Id": "followed"}) as answer,
        ):
            async for line in answer.aiter_lines():
                if line.startswith(": prefill "):
                    told.append({k: int(v) for k, v in re.findall(r"(\w+)=(\d+)", line)})
                elif line.startswith("data: {"):
                    usage.update(json.loads(line.removeprefix("data: ")).get("usage") or {})

    seen: list[dict[str, Any]] = []
    reading = asyncio.create_task(read())
    while not reading.done():
        looks = (await stack.progress())["requests"]
        seen += [look for name, look in looks.items() if name.startswith("followed.")]
        await asyncio.sleep(0.05)
    await reading
    await stack.until_free()

    num_prompt_tokens = usage["prompt_tokens"]
    assert {look["num_prompt_tokens"] for look in seen} == {num_prompt_tokens}
    computed = [look["num_computed_tokens"] for look in seen]
    assert computed == sorted(computed)
    # each step is told, the last ones apart: they are short
    assert len({n for n in computed if 0 < n < num_prompt_tokens}) >= 3
    assert [look["phase"] for look in seen] == sorted(
        (look["phase"] for look in seen), key=["prefilling", "decoding"].index
    )
    assert seen[-1]["phase"] == "decoding"
    assert 0 < seen[-1]["num_output_tokens"] <= 40

    # the gateway's own count of tokens is the engine's
    assert {each["total_tokens"] for each in told} == {num_prompt_tokens}
    done = [each.get("done_tokens", 0) for each in told]
    assert done == sorted(done)
    assert any(0 < n < num_prompt_tokens for n in done)


async def test_trace_and_request_id_reach_the_engine(stack: Stack, client: AsyncOpenAI) -> None:
    trace_id = "0af7651916cd43dd8448eb211c80319c"
    headers = {
        "traceparent": f"00-{trace_id}-b7ad6b7169203331-01",
        "X-Request-Id": "traced-request",
    }
    await client.chat.completions.create(**chat("Hello", max_tokens=2), extra_headers=headers)
    async with asyncio.timeout(60):
        while not (  # noqa: ASYNC110 - another process
            found := [each for each in stack.spans if bytes.fromhex(trace_id) in each]
        ):
            await asyncio.sleep(0.05)
    assert b"chatcmpl-traced-request." in b"".join(found)


async def test_no_tenant_finds_what_another_has_asked(stack: Stack) -> None:
    body = chat(stack.long_text(1_500, start=12_000), max_tokens=1)
    async with stack.tenant() as (finder, _), stack.tenant() as (other, _):

        async def cached(client: AsyncOpenAI) -> int | None:
            usage = (await client.chat.completions.create(**body)).usage
            assert usage is not None
            assert usage.prompt_tokens_details is not None
            return usage.prompt_tokens_details.cached_tokens

        assert await cached(finder) == 0
        assert (await cached(finder) or 0) >= 1024
        assert await cached(other) == 0
    async with stack.engine() as engine:  # and it is the salt that keeps them apart
        answer = await engine.post(PATH, json=body)
        assert answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


async def test_structured_output_follows_its_schema(client: AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(
        **chat("Hello", max_tokens=96),
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "colour", "schema": COLOUR, "strict": True},
        },
    )
    document = json.loads(answer.choices[0].message.content or "")
    assert set(document) == {"is_warm", "colour"}
    assert isinstance(document["is_warm"], bool)
    assert document["colour"] in {"red", "green"}


@pytest.mark.parametrize(
    "tool_choice", ["required", {"type": "function", "function": {"name": "look_up"}}]
)
async def test_tool_is_called_with_valid_arguments(client: AsyncOpenAI, tool_choice: Any) -> None:
    options = chat(
        "Hello",
        max_tokens=96,
        tools=[LOOK_UP],
        tool_choice=tool_choice,
        parallel_tool_calls=False,
        temperature=0,
    )
    answer = await client.chat.completions.create(**options)
    (call,) = answer.choices[0].message.tool_calls or []
    assert call.type == "function"
    assert call.function.name == "look_up"
    assert json.loads(call.function.arguments)["digit"] in {3, 7}

    name, arguments = "", ""
    async for chunk in await client.chat.completions.create(**options, stream=True):
        for part in chunk.choices[0].delta.tool_calls or []:
            assert part.function is not None
            name += part.function.name or ""
            arguments += part.function.arguments or ""
    assert name == "look_up"
    assert json.loads(arguments)["digit"] in {3, 7}


async def test_logprobs_come_with_each_token(client: AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(
        **chat("Hello", max_tokens=3, logprobs=True, top_logprobs=2, temperature=0)
    )
    assert answer.choices[0].logprobs is not None
    tokens = answer.choices[0].logprobs.content or []
    assert len(tokens) == 3
    assert "".join(token.token for token in tokens) == answer.choices[0].message.content
    for token in tokens:
        best, second = token.top_logprobs
        assert token.logprob == best.logprob > second.logprob


async def test_several_answers_with_one_seed_come_again(client: AsyncOpenAI) -> None:
    async def ask(seed: int) -> list[str | None]:
        answer = await client.chat.completions.create(
            **chat("Tell me", n=3, max_tokens=8, temperature=2.0, seed=seed)
        )
        assert [choice.index for choice in answer.choices] == [0, 1, 2]
        assert answer.usage is not None
        assert answer.usage.completion_tokens > 8
        return [choice.message.content for choice in answer.choices]

    first = await ask(7)
    assert len(set(first)) > 1
    assert await ask(7) == first
    assert await ask(8) != first


async def test_answer_ends_before_a_stop_string(client: AsyncOpenAI) -> None:
    options = chat("Hello", max_tokens=24, temperature=0, extra_body={"ignore_eos": True})
    whole = (await client.chat.completions.create(**options)).choices[0].message.content or ""
    stop = whole[5:8]
    answer = await client.chat.completions.create(**options, stop=[stop])
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].message.content == whole[: whole.index(stop)]


async def test_engines_refusal_of_a_field_reaches_the_client(client: AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError):
        await client.chat.completions.create(**chat("Hello", top_logprobs=2, logprobs=False))
