"""Counting by asking the engine, and noticing that one's own tokenizer is not the engine's."""

import asyncio
import logging
import time

import pytest

from sala_serve.engine.fake import Behaviour
from sala_serve.engine.fake_server import FakeServer
from sala_serve.engine.pool import EnginePool
from sala_serve.engine.settings import EngineSettings
from sala_serve.errors import EngineUnavailable, InvalidRequest
from sala_serve.telemetry import Metrics
from sala_serve.tokens.prompt import Prompt, block_hashes
from sala_serve.tokens.remote import CheckedTokenCounter, EngineTokenCounter

CHAT = {"model": "sala", "messages": [{"role": "user", "content": "two words"}]}


@pytest.fixture
async def server():
    behaviour = Behaviour(num_prompt_tokens=None, num_cached_tokens=None)
    async with FakeServer(behaviour) as server:
        yield server


@pytest.fixture
async def pool(server):
    settings = EngineSettings(url=server.url, probe_interval_s=0.02)
    pool = EnginePool.create([settings], metrics=Metrics(), clock=time.monotonic)
    running = asyncio.create_task(pool.run())
    async with asyncio.timeout(5):
        await pool.wait_ready()
    yield pool
    running.cancel()
    await asyncio.wait([running])


async def test_engine_counts_chats_and_each_prompt(server, pool):
    counter = EngineTokenCounter(pool)
    assert (await counter.count_chat(CHAT)).num_tokens == 3
    several = await counter.count_completion({"model": "sala", "prompt": ["a b", "c"]})
    assert [prompt.num_tokens for prompt in several] == [2, 1]
    assert server.engine.journal.num_tokenized == 3


async def test_hashes_are_those_of_the_engines_tokens_and_ids_need_no_engine(server, pool):
    counter = EngineTokenCounter(pool)
    ids = list(range(1000))
    assert await counter.count_completion({"prompt": ids}) == [Prompt(1000, block_hashes(ids))]
    assert server.engine.journal.num_tokenized == 0
    words = " ".join(f"w{number}" for number in range(600))
    (once,) = await counter.count_completion({"prompt": words})
    (again,) = await counter.count_completion({"prompt": f"{words} more"})
    assert len(once.block_hashes) == 1
    assert again.block_hashes == once.block_hashes


@pytest.mark.parametrize("prompt", [None, [], ""])
async def test_missing_prompt_is_the_callers_fault(pool, prompt):
    counter = EngineTokenCounter(pool)
    if prompt == "":
        assert (await counter.count_completion({"prompt": prompt}))[0].num_tokens == 0
        return
    with pytest.raises(InvalidRequest):
        await counter.count_completion({"prompt": prompt})


async def test_no_engine_is_no_count(server, pool, eventually):
    server.kill()
    await eventually(lambda: not pool.ready())
    with pytest.raises(EngineUnavailable):
        await EngineTokenCounter(pool).count_chat(CHAT)


class OwnCounter:
    """Counts as the fake engine does, or one too many."""

    def __init__(self, num_too_many):
        self._num_too_many = num_too_many

    async def count_chat(self, document):
        texts = []
        for message in document["messages"]:
            parts = message["content"]
            parts = [parts] if isinstance(parts, str) else [part["text"] for part in parts]
            texts += [message["role"], *parts]
        return Prompt(len(" ".join(texts).split()) + self._num_too_many)

    async def count_completion(self, document):
        return [Prompt(len(document["prompt"].split()))]


async def test_own_counter_holds_while_it_agrees(server, pool):
    counter = CheckedTokenCounter(OwnCounter(0), EngineTokenCounter(pool), pool)
    await counter.run()
    num_asked = server.engine.journal.num_tokenized
    assert num_asked == 3
    assert (await counter.count_chat(CHAT)).num_tokens == 3
    assert server.engine.journal.num_tokenized == num_asked


async def test_engine_is_asked_once_the_own_counter_is_found_wrong(server, pool, caplog):
    counter = CheckedTokenCounter(OwnCounter(1), EngineTokenCounter(pool), pool)
    assert (await counter.count_chat(CHAT)).num_tokens == 4
    with caplog.at_level(logging.ERROR):
        await counter.run()
    assert "does not fit the engine" in caplog.text
    assert "Γειά" not in caplog.text
    assert (await counter.count_chat(CHAT)).num_tokens == 3
