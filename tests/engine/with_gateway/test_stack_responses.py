"""The Responses API on the real engine: stored, in the background, followed, resumed, cancelled, counted."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import openai
import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

    from openai import AsyncOpenAI
    from openai.types.responses import Response

Stack = Any  # fixture in conftest.py; its class is not importable from here

MODEL = "demo"
PROMPT_TOKENS = 8_000
"""Four steps of the engine."""

pytestmark = [pytest.mark.engine, pytest.mark.slow]


async def until(
    client: AsyncOpenAI, response_id: str, holds: Callable[[Response], object]
) -> Response:
    async with asyncio.timeout(120):
        while not holds(found := await client.responses.retrieve(response_id)):  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    return found


def standing(response: Response) -> dict[str, Any]:
    """Where a response that is not over stands."""
    return (response.model_extra or {}).get("sala") or {}


async def test_response_is_stored_and_goes_on(client: AsyncOpenAI) -> None:
    first = await client.responses.create(
        model=MODEL, input="Hello", max_output_tokens=8, temperature=0
    )
    assert first.status in {"completed", "incomplete"}
    stored = await client.responses.retrieve(first.id)
    assert (stored.status, stored.output_text) == (first.status, first.output_text)
    assert stored.usage == first.usage
    assert first.usage is not None
    second = await client.responses.create(
        model=MODEL, input="And then?", previous_response_id=first.id, max_output_tokens=4
    )
    assert second.usage is not None
    assert second.usage.input_tokens > first.usage.input_tokens + first.usage.output_tokens
    await client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        await client.responses.retrieve(first.id)


async def test_input_tokens_are_those_of_the_usage(stack: Stack, client: AsyncOpenAI) -> None:
    text = stack.long_text(700, start=5_000)
    counted = await client.responses.input_tokens.count(
        model=MODEL, input=text, instructions="Be brief."
    )
    response = await client.responses.create(
        model=MODEL, input=text, instructions="Be brief.", max_output_tokens=1
    )
    assert response.usage is not None
    chat = await client.chat.completions.create(
        model=MODEL,
        messages=[
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": text},
        ],
        max_tokens=1,
    )
    assert chat.usage is not None
    assert counted.input_tokens == response.usage.input_tokens == chat.usage.prompt_tokens


async def test_background_response_is_followed_left_and_taken_up_again(
    stack: Stack, client: AsyncOpenAI
) -> None:
    stream = await client.responses.create(
        model=MODEL,
        input=f"In the background. {stack.long_text(PROMPT_TOKENS)}",
        background=True,
        stream=True,
        max_output_tokens=24,
        temperature=0,
    )
    created = await anext(stream)
    assert created.type == "response.created"
    seen = [created.sequence_number]
    await stream.close()  # the client goes away, the work goes on

    reading = await until(
        client,
        created.response.id,
        lambda found: 0 < (standing(found).get("done_tokens") or 0) < PROMPT_TOKENS,
    )
    assert reading.status == "in_progress"
    assert standing(reading)["phase"] == "prefill"
    assert standing(reading)["total_tokens"] > PROMPT_TOKENS

    text = ""
    async for event in await client.responses.retrieve(
        created.response.id, stream=True, starting_after=seen[-1]
    ):
        seen.append(event.sequence_number)
        if event.type == "response.output_text.delta":
            text += event.delta
    assert seen == list(range(len(seen)))
    done = await client.responses.retrieve(created.response.id)
    assert done.status in {"completed", "incomplete"}
    assert done.output_text == text
    assert done.usage is not None
    assert done.usage.input_tokens == standing(reading)["total_tokens"]
    assert done.usage.output_tokens > 0


async def test_cancelled_background_response_frees_the_engine(
    stack: Stack, client: AsyncOpenAI
) -> None:
    response = await client.responses.create(
        model=MODEL,
        input=f"To be cancelled. {stack.long_text(PROMPT_TOKENS)}",
        background=True,
        max_output_tokens=4_000,
    )
    assert response.status == "queued"
    await stack.until(lambda now: now["kv"]["used_tokens"] > 0)
    assert (await client.responses.cancel(response.id)).status == "cancelled"
    await stack.until_free()
    assert (await client.responses.retrieve(response.id)).status == "cancelled"
