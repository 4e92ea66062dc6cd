"""Files and batches on the real engine: each line is an answer of its own, and what they cost is added up."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

    from openai import AsyncOpenAI
    from openai.types import Batch

Stack = Any  # fixture in conftest.py; its class is not importable from here

MODEL = "demo"
CHAT = "/v1/chat/completions"
PROMPT_TOKENS = 8_000
"""Four steps of the engine."""

pytestmark = [pytest.mark.engine, pytest.mark.slow]


def line(custom_id: str, content: Any, **options: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": content}]
    body = {"model": MODEL, "messages": messages, "temperature": 0, **options}
    return {"custom_id": custom_id, "method": "POST", "url": CHAT, "body": body}


async def create(client: AsyncOpenAI, lines: list[dict[str, Any]]) -> Batch:
    text = "\n".join(map(json.dumps, lines))
    file = await client.files.create(file=("lines.jsonl", text.encode()), purpose="batch")
    return await client.batches.create(
        input_file_id=file.id, endpoint=CHAT, completion_window="24h"
    )


async def until(client: AsyncOpenAI, batch_id: str, holds: Callable[[Batch], object]) -> Batch:
    async with asyncio.timeout(120):
        while not holds(found := await client.batches.retrieve(batch_id)):  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    return found


async def results(client: AsyncOpenAI, file_id: str | None) -> dict[str, dict[str, Any]]:
    """Return the lines of a file of results by their ``custom_id``."""
    assert file_id is not None
    content = await client.files.content(file_id)
    return {each["custom_id"]: each for each in map(json.loads, content.text.splitlines())}


async def test_batch_has_each_lines_answer_and_adds_up_what_they_cost(stack: Stack) -> None:
    lines = [line(f"short-{index}", f"Count to {index}.", max_tokens=index) for index in (2, 3, 4)]
    lines.append(
        line("schema", "A colour?", max_tokens=40, response_format={"type": "json_object"})
    )
    lines.insert(1, line("wrong", "Hello", temperature=9))
    async with stack.tenant() as (client, tenant_id):
        batch = await create(client, lines)
        batch = await until(client, batch.id, lambda each: each.completed_at or each.failed_at)
        assert (batch.status, batch.errors) == ("completed", None)
        assert batch.request_counts is not None
        counts = batch.request_counts
        assert (counts.total, counts.completed, counts.failed) == (5, 4, 1)

        good = await results(client, batch.output_file_id)
        assert set(good) == {"short-2", "short-3", "short-4", "schema"}
        answers = {name: each["response"]["body"] for name, each in good.items()}
        for asked in (each for each in lines if each["custom_id"] in answers):
            alone = await client.chat.completions.create(**asked["body"])
            answer = answers[asked["custom_id"]]
            assert answer["choices"][0]["message"]["content"] == alone.choices[0].message.content
            assert alone.usage is not None
            assert answer["usage"]["prompt_tokens"] == alone.usage.prompt_tokens
            assert answer["usage"]["completion_tokens"] == alone.usage.completion_tokens

        (wrong,) = (await results(client, batch.error_file_id)).values()
        assert (wrong["custom_id"], wrong["response"]["status_code"]) == ("wrong", 400)
        assert "temperature" in wrong["response"]["body"]["error"]["message"]

        assert batch.usage is not None
        used = [each["usage"] for each in answers.values()]
        assert batch.usage.input_tokens == sum(each["prompt_tokens"] for each in used)
        assert batch.usage.output_tokens == sum(each["completion_tokens"] for each in used)
        assert batch.usage.total_tokens == sum(each["total_tokens"] for each in used)
        assert await stack.settled(tenant_id) > 0


async def test_cancelled_batch_frees_the_engine_and_keeps_what_is_done(stack: Stack) -> None:
    ever = {"max_tokens": 4_000, "ignore_eos": True}
    lines = [
        line("done", "Hello", max_tokens=2),
        line("cut", f"A batch to be cancelled. {stack.long_text(PROMPT_TOKENS)}", **ever),
    ]
    async with stack.tenant() as (client, tenant_id):
        batch = await create(client, lines)

        def is_half_done(each: Batch) -> bool:
            return each.request_counts is not None and each.request_counts.completed == 1

        await until(client, batch.id, is_half_done)
        await stack.until(lambda now: now["kv"]["used_tokens"] > 1_000)
        assert (await client.batches.cancel(batch.id)).status == "cancelling"
        batch = await until(client, batch.id, lambda each: each.cancelled_at)
        assert batch.status == "cancelled"
        await stack.until_free()
        assert list(await results(client, batch.output_file_id)) == ["done"]
        await stack.settled(tenant_id)
