"""`sala-serve up` with the demo checkpoint and real vLLM, asked as a user would ask it."""

from __future__ import annotations

import asyncio
import os
import re
import signal
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import httpx
import openai
import pytest

if TYPE_CHECKING:
    from openai import AsyncOpenAI

Stack = Any  # fixture in conftest.py; its class is not importable from here

MODEL = "demo"
READY_TIMEOUT_S = 240
NUM_RETRIEVAL_TOKENS = 16_384

QUESTION = "What is the passkey for the {}?"
FACT = "The passkey for the {} is {}."
FACTS = {0.1: ("old mill", "90657"), 0.5: ("red bridge", "13874"), 0.9: ("north tower", "48213")}
"""Depth in the document -> key and value of what is said there."""

pytestmark = [pytest.mark.engine, pytest.mark.slow]


def chat(content: str) -> list[Any]:
    return [{"role": "user", "content": content}]


def document(stack: Stack) -> str:
    """``NUM_RETRIEVAL_TOKENS`` tokens, less room for a question, with the facts."""
    paragraphs = stack.long_text(NUM_RETRIEVAL_TOKENS - 150).split("\n\n")
    for place_frac, (key, value) in sorted(FACTS.items(), reverse=True):
        paragraphs.insert(int(place_frac * len(paragraphs)), FACT.format(key, value))
    return "\n\n".join(paragraphs)


def numbers(content: str | None) -> list[str]:
    return re.findall(r"\d+", content or "")


async def test_models_shows_name_and_context(client: AsyncOpenAI) -> None:
    (model,) = (await client.models.list()).data
    assert model.id == MODEL
    assert model.model_dump()["max_model_len"] >= NUM_RETRIEVAL_TOKENS


async def test_chat_answers_with_usage(client: AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(
        model=MODEL, messages=chat("Hello"), max_tokens=8, extra_body={"ignore_eos": True}
    )
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 8
    assert answer.usage.prompt_tokens > 0
    assert answer.usage.prompt_tokens_details is not None


async def test_stream_equals_the_whole_answer(client: AsyncOpenAI) -> None:
    options: dict[str, Any] = {"model": MODEL, "messages": chat("Hello"), "max_tokens": 24}
    whole = await client.chat.completions.create(**options, temperature=0)
    stream = await client.chat.completions.create(**options, temperature=0, stream=True)
    parts = [chunk.choices[0].delta.content or "" async for chunk in stream]
    assert "".join(parts) == whole.choices[0].message.content


@pytest.mark.parametrize("is_stream", [False, True])
async def test_repeated_prompt_comes_from_the_cache(
    stack: Stack, client: AsyncOpenAI, is_stream: bool
) -> None:
    text = f"{is_stream} {stack.long_text(1500)}"
    options: dict[str, Any] = {"model": MODEL, "messages": chat(text), "max_tokens": 1}
    if is_stream:
        options |= {"stream": True, "stream_options": {"include_usage": True}}
    cached = []
    for _ in range(2):
        answer = await client.chat.completions.create(**options)
        if is_stream:
            answer = [chunk async for chunk in answer][-1]
        assert answer.usage is not None
        assert answer.usage.prompt_tokens_details is not None
        cached.append(answer.usage.prompt_tokens_details.cached_tokens)
    assert cached[0] == 0
    assert cached[1] >= 1024


async def test_over_long_prompt_has_its_own_code(client: AsyncOpenAI) -> None:
    (model,) = (await client.models.list()).data
    max_model_len = model.model_dump()["max_model_len"]
    with pytest.raises(openai.BadRequestError) as caught:
        await client.chat.completions.create(
            model=MODEL, messages=chat("long " * 2 * max_model_len)
        )
    assert caught.value.code == "context_length_exceeded"
    assert caught.value.param == "messages"


async def test_unknown_model_is_not_found(client: AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        await client.chat.completions.create(model="other", messages=chat("Hello"))
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


async def test_wrong_field_names_it(client: AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await client.chat.completions.create(
            model=MODEL, messages=chat("Hello"), extra_body={"temperature": "hot"}
        )
    assert (caught.value.code, caught.value.param) == ("invalid_request", "temperature")


@pytest.mark.parametrize("depth_frac", FACTS)
async def test_passkey_is_found_in_16k_tokens(
    stack: Stack, client: AsyncOpenAI, depth_frac: float
) -> None:
    # the document is computed for the first question only
    key, value = FACTS[depth_frac]
    messages = chat(f"{document(stack)}\n\n{QUESTION.format(key)}")
    answer = await client.chat.completions.create(
        model=MODEL, messages=messages, max_tokens=32, temperature=0
    )
    assert answer.usage is not None
    assert NUM_RETRIEVAL_TOKENS - 100 <= answer.usage.prompt_tokens <= NUM_RETRIEVAL_TOKENS
    assert numbers(answer.choices[0].message.content) == [value], answer.choices[0].message.content


async def test_follow_up_on_a_long_document_reads_only_what_is_new(
    stack: Stack, client: AsyncOpenAI
) -> None:
    messages: list[Any] = []
    options: dict[str, Any] = {"model": MODEL, "max_tokens": 32, "temperature": 0}
    for key, value in FACTS.values():
        messages += chat(
            QUESTION.format(key) if messages else f"{document(stack)}\n\n{QUESTION.format(key)}"
        )
        answer = await client.chat.completions.create(messages=messages, **options)
        content = answer.choices[0].message.content
        assert numbers(content) == [value], content
        assert answer.usage is not None
        assert answer.usage.prompt_tokens_details is not None
        if messages[1:]:
            num_cached = answer.usage.prompt_tokens_details.cached_tokens or 0
            assert answer.usage.prompt_tokens - num_cached < 512
        messages.append({"role": "assistant", "content": content})


async def test_engine_killed_in_the_middle_of_a_stream_is_an_error_and_comes_back(
    stack: Stack, client: AsyncOpenAI
) -> None:
    before = stack.engine_pids()
    stream = await client.chat.completions.create(
        model=MODEL,
        messages=chat("Count."),
        stream=True,
        max_tokens=10_000,
        extra_body={"ignore_eos": True},
    )
    await anext(stream)
    # the API server and the engine core; the guard stays to report it
    for pid in before[1:]:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    with pytest.raises(openai.APIError, match="before the answer was complete"):
        _ = [chunk async for chunk in stream]
    with pytest.raises(openai.InternalServerError) as caught:
        await client.chat.completions.create(model=MODEL, messages=chat("Hello"))
    # the dying engine may still take the connection
    assert caught.value.code in {"engine_unavailable", "engine_lost"}
    # the gateway may take a second to notice
    async with asyncio.timeout(READY_TIMEOUT_S), httpx.AsyncClient() as http:
        for status in (503, 200):
            while (await http.get(f"{stack.url}/readyz")).status_code != status:  # noqa: ASYNC110
                await asyncio.sleep(0.1)
    assert set(before).isdisjoint(stack.engine_pids())
    answer = await client.chat.completions.create(model=MODEL, messages=chat("Hello"), max_tokens=4)
    assert answer.choices[0].finish_reason in {"stop", "length"}
