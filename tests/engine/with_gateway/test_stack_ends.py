"""Who leaves or is cut, in whatever phase: the real engine is free of it, and its tenant's books are closed."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import openai
import pytest

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from openai import AsyncOpenAI

Stack = Any  # fixture in conftest.py; its class is not importable from here

MODEL = "demo"
PROMPT_TOKENS = 8_000
"""Four steps of the engine, and long for the gateway, which sends it one such prompt at a time."""

pytestmark = [pytest.mark.engine, pytest.mark.slow]


def chat(content: str, **options: Any) -> dict[str, Any]:
    # an answer so long that it does not end by itself while a test looks
    messages = [{"role": "user", "content": content}]
    ever = {"max_tokens": 4_000, "extra_body": {"ignore_eos": True}}
    return {"model": MODEL, "messages": messages, **ever, **options}


async def ask(client: AsyncOpenAI, body: dict[str, Any], headers: dict[str, str]) -> None:
    """Ask, and read to the end."""
    answer = await client.chat.completions.create(**body, extra_headers=headers)
    if body.get("stream"):
        async for _ in answer:
            pass


@asynccontextmanager
async def asking(
    client: AsyncOpenAI, request_id: str, body: dict[str, Any]
) -> AsyncIterator[asyncio.Task[None]]:
    """Ask for the length of the block; then leave."""
    task = asyncio.create_task(ask(client, body, {"X-Request-Id": request_id}))
    try:
        yield task
    finally:
        was_over = task.done()
        task.cancel()
        await asyncio.wait([task])
        assert not was_over, task


def look_at(now: dict[str, Any], request_id: str) -> dict[str, Any]:
    """What the engine tells about a request; nothing if it does not have it."""
    looks = [look for name, look in now["requests"].items() if name.startswith(f"{request_id}.")]
    return looks[0] if looks else {"phase": None, "num_computed_tokens": 0}


async def row_of(stack: Stack, request_id: str) -> dict[str, Any]:
    """What the gateway knows of a request; nothing if it does not run."""
    async with stack.admin() as admin:
        rows = (await admin.get("/requests")).json()["data"]
    found: list[dict[str, Any]] = [row for row in rows if row["request_id"] == request_id]
    return found[0] if found else {"phase": None}


async def until(stack: Stack, request_id: str, holds: Callable[[dict[str, Any]], object]) -> None:
    async with asyncio.timeout(60):
        while not holds(await row_of(stack, request_id)):  # noqa: ASYNC110 - another process
            await asyncio.sleep(0.02)


def is_begun(row: dict[str, Any]) -> bool:
    """Whether the gateway has seen that the engine has computed a part of the prompt."""
    return bool((row.get("progress") or {}).get("done_tokens"))


async def until_decoding(stack: Stack) -> None:
    """Wait until the gateway has seen that the engine writes an answer."""
    async with asyncio.timeout(60), stack.admin() as admin:
        while True:
            engines = (await admin.get("/scheduler")).json()["engines"]
            if sum(engine["num_decoding"] for engine in engines):
                return
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("is_stream", [False, True])
async def test_client_that_leaves_queue_or_prefill_frees_the_engine(
    stack: Stack, is_stream: bool
) -> None:
    first, second = f"first-{is_stream}".lower(), f"second-{is_stream}".lower()
    bodies = {
        name: chat(f"{name} {stack.long_text(PROMPT_TOKENS)}", stream=is_stream)
        for name in (first, second)
    }
    async with stack.tenant() as (reads, reader), stack.tenant() as (waits, waiter):
        async with asking(reads, first, bodies[first]):
            await until(stack, first, lambda row: row["phase"] == "prefill")
            async with asking(waits, second, bodies[second]):
                await until(stack, second, lambda row: row["phase"] == "queue")
                assert (await stack.books(waiter))[1] > PROMPT_TOKENS
            await until(stack, second, lambda row: row["phase"] is None)
            assert await stack.settled(waiter) == 0
            await until(stack, first, is_begun)
            now = await stack.progress()
            assert look_at(now, first)["phase"] == "prefilling"
            assert look_at(now, second)["phase"] is None
            assert now["kv"]["used_tokens"] > 0
        await stack.until_free()
        # what the engine had computed is charged, and no more
        assert 0 < await stack.settled(reader) < PROMPT_TOKENS


@pytest.mark.parametrize("is_stream", [False, True])
async def test_client_that_leaves_an_answer_frees_the_engine(stack: Stack, is_stream: bool) -> None:
    name = f"answered-{is_stream}".lower()
    async with stack.tenant() as (client, tenant_id):
        async with asking(client, name, chat("Count.", stream=is_stream)):
            now = await stack.until(lambda now: look_at(now, name).get("num_output_tokens", 0) > 4)
            assert now["kv"]["used_tokens"] > 0
            await until_decoding(stack)
            assert (await stack.books(tenant_id))[1] > 4_000
        await stack.until_free()
        assert 4 < await stack.settled(tenant_id) < 4_000


async def test_operator_ends_a_request(stack: Stack, client: AsyncOpenAI) -> None:
    task = asyncio.create_task(
        client.chat.completions.create(**chat("Count."), extra_headers={"X-Request-Id": "ended"})
    )
    await stack.until(lambda now: look_at(now, "ended")["phase"] == "decoding")
    async with stack.admin() as admin:
        (await admin.post("/requests/ended/cancel")).raise_for_status()
    with pytest.raises(openai.ConflictError, match="cancelled by the operator"):
        await task
    await stack.until_free()


@pytest.mark.parametrize("is_stream", [False, True])
async def test_deadline_of_the_clients_choice_ends_its_request(
    stack: Stack, client: AsyncOpenAI, is_stream: bool
) -> None:
    headers = {"X-Request-Timeout-S": "2", "X-Request-Id": "short"}
    with pytest.raises(openai.APIError) as caught:
        await ask(client, chat("Count.", stream=is_stream), headers)
    assert caught.value.code in {"total_timeout", "first_token_timeout"}
    if not is_stream:
        assert isinstance(caught.value, openai.InternalServerError)
        assert caught.value.status_code == 504
    await stack.until_free()


async def test_client_that_times_out_frees_the_engine(stack: Stack, client: AsyncOpenAI) -> None:
    hasty = client.with_options(
        timeout=0.5
    )  # until the first bytes, which a prefill sends after 1 s
    with pytest.raises(openai.APITimeoutError):
        await hasty.chat.completions.create(
            **chat(f"hasty {stack.long_text(PROMPT_TOKENS)}", stream=True)
        )
    await stack.until_free()
