"""`sala-serve up` with the demo checkpoint and real vLLM, asked as a user would ask it."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI
from tokenizers import Tokenizer

from sala_serve.engine import guard

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

DEMO = Path(__file__).parents[2] / "training" / "demo"
DEMO_CHECKPOINT = DEMO / "checkpoint"
HELD_OUT_TEXT = DEMO / "persuasion.txt"
MODEL = "demo"
READY_TIMEOUT_S = 240
STOP_LIMIT_S = 60
NUM_RETRIEVAL_TOKENS = 16_384

QUESTION = "What is the passkey for the {}?"
FACT = "The passkey for the {} is {}."
PASSKEY = ("north tower", "48213")
OTHER_FACTS = {0.3: ("old mill", "90657"), 0.7: ("red bridge", "13874")}
"""Depth in the document -> what is said there besides."""

pytestmark = [pytest.mark.engine, pytest.mark.slow]


@dataclass(frozen=True)
class Stack:
    """A running `sala-serve up`."""

    url: str
    engine_socket: Path
    process: subprocess.Popen[bytes]
    """The guard that ends it if the tests are killed."""
    log: Path

    async def engine_metric(self, name: str) -> float:
        """Read one value from the engine's own metrics."""
        transport = httpx.AsyncHTTPTransport(uds=str(self.engine_socket))
        async with httpx.AsyncClient(transport=transport, timeout=30) as client:
            text = (await client.get("http://engine/metrics")).text
        (value,) = re.findall(rf"^vllm:{name}{{.*}} (\S+)$", text, re.MULTILINE)
        return float(value)

    async def until_engine_metric(self, name: str, wanted: float) -> None:
        async with asyncio.timeout(60):
            while await self.engine_metric(name) != wanted:  # noqa: ASYNC110 - another process
                await asyncio.sleep(0.05)

    def engine_pids(self) -> list[int]:
        """Every process of the engine that lives: they share the session that its guard opened."""
        listing = subprocess.run(
            ["ps", "-eo", "pid=,ppid=,sid=,stat="], capture_output=True, text=True, check=True
        )
        rows = [line.split() for line in listing.stdout.splitlines()]
        served = {pid for pid, ppid, *_ in rows if int(ppid) == self.process.pid}
        sessions = {sid for _, ppid, sid, _ in rows if ppid in served}
        return [int(pid) for pid, _, sid, stat in rows if sid in sessions and stat[0] != "Z"]


def runs(pid: int) -> bool:
    """Tell whether a process lives; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    folder = tmp_path_factory.mktemp("stack")
    log = folder / "log"
    env = {key: value for key, value in os.environ.items() if not key.startswith("SALA_")}
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, guard.__file__, str(STOP_LIMIT_S)]
            + [sys.executable, "-m", "sala_serve", "up", str(DEMO_CHECKPOINT)]
            + ["--served-model-name", MODEL, "--port", "0"],
            stdin=subprocess.PIPE,
            start_new_session=True,
            env={**env, "TMPDIR": str(folder), "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"},
            stdout=output,
            stderr=output,
        )
    try:
        deadline_s = time.monotonic() + READY_TIMEOUT_S
        while "Ready after" not in log.read_text():
            assert process.poll() is None, log.read_text()[-5000:]
            assert time.monotonic() < deadline_s, log.read_text()[-5000:]
            time.sleep(0.2)
        url = re.search(r"listening on (http://\S+?),", log.read_text())
        assert url is not None
        (socket,) = folder.glob("sala-serve-*/engine.sock")
        stack = Stack(url[1], socket, process, log)
        pids = stack.engine_pids()
        assert len(pids) >= 3  # guard, API server, engine
        yield stack
        pids += stack.engine_pids()
        os.killpg(process.pid, signal.SIGTERM)
        assert process.wait(timeout=STOP_LIMIT_S) == 0
        assert not [pid for pid in pids if runs(pid)]
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.wait()


@pytest.fixture
async def client(stack: Stack) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(
        base_url=f"{stack.url}/v1", api_key="none", max_retries=0, timeout=300
    ) as client:
        yield client


def chat(content: str) -> list[Any]:
    return [{"role": "user", "content": content}]


def long_text(num_tokens: int) -> str:
    """Paragraphs of a novel that the model was not trained on, cut to a number of tokens."""
    tokenizer = Tokenizer.from_file(str(DEMO_CHECKPOINT / "tokenizer.json"))
    text = HELD_OUT_TEXT.read_text(encoding="utf-8")
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert len(ids) >= num_tokens
    decoded: str = tokenizer.decode(ids[:num_tokens], skip_special_tokens=False)
    return decoded


def document(depth_frac: float) -> str:
    """``NUM_RETRIEVAL_TOKENS`` tokens, less room for a question, with the passkey and other facts."""
    facts = {**OTHER_FACTS, depth_frac: PASSKEY}
    paragraphs = long_text(NUM_RETRIEVAL_TOKENS - 150).split("\n\n")
    for place_frac, (key, value) in sorted(facts.items(), reverse=True):
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


async def test_repeated_prompt_comes_from_the_cache(client: AsyncOpenAI) -> None:
    options: dict[str, Any] = {"model": MODEL, "messages": chat(long_text(2000)), "max_tokens": 1}
    cached = []
    for _ in range(2):
        answer = await client.chat.completions.create(**options)
        assert answer.usage is not None
        assert answer.usage.prompt_tokens_details is not None
        cached.append(answer.usage.prompt_tokens_details.cached_tokens)
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


async def test_wrong_field_names_it(client: AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await client.chat.completions.create(
            model=MODEL, messages=chat("Hello"), extra_body={"temperature": "hot"}
        )
    assert (caught.value.code, caught.value.param) == ("invalid_request", "temperature")


async def test_hang_up_in_the_middle_of_a_stream_frees_the_engine(
    stack: Stack, client: AsyncOpenAI
) -> None:
    await stack.until_engine_metric("num_requests_running", 0)
    stream = await client.chat.completions.create(
        model=MODEL,
        messages=chat("Count."),
        stream=True,
        max_tokens=10_000,
        extra_body={"ignore_eos": True},
    )
    num_chunks = 0
    async for _ in stream:
        num_chunks += 1
        if num_chunks == 5:
            break
    assert await stack.engine_metric("num_requests_running") == 1
    assert await stack.engine_metric("kv_cache_usage_perc") > 0
    await stream.close()
    await stack.until_engine_metric("num_requests_running", 0)
    await stack.until_engine_metric("kv_cache_usage_perc", 0)


@pytest.mark.parametrize("is_stream", [False, True])
async def test_hang_up_during_prefill_frees_the_engine(
    stack: Stack, client: AsyncOpenAI, is_stream: bool
) -> None:
    # another text for each case, so that none of it is cached
    text = f"{is_stream} {long_text(NUM_RETRIEVAL_TOKENS - 200)}"

    async def ask() -> None:
        answer = await client.chat.completions.create(
            model=MODEL,
            messages=chat(text),
            stream=is_stream,
            max_tokens=128,
            extra_body={"ignore_eos": True},
        )
        if is_stream:
            async for _ in answer:
                pass

    asking = asyncio.create_task(ask())
    await stack.until_engine_metric("num_requests_running", 1)
    asking.cancel()
    await asyncio.wait([asking])
    assert asking.cancelled()
    await stack.until_engine_metric("num_requests_running", 0)
    await stack.until_engine_metric("kv_cache_usage_perc", 0)


@pytest.mark.parametrize("depth_frac", [0.1, 0.5, 0.9])
async def test_passkey_is_found_in_16k_tokens(client: AsyncOpenAI, depth_frac: float) -> None:
    key, value = PASSKEY
    messages = chat(f"{document(depth_frac)}\n\n{QUESTION.format(key)}")
    answer = await client.chat.completions.create(
        model=MODEL, messages=messages, max_tokens=32, temperature=0
    )
    assert answer.usage is not None
    assert NUM_RETRIEVAL_TOKENS - 100 <= answer.usage.prompt_tokens <= NUM_RETRIEVAL_TOKENS
    assert numbers(answer.choices[0].message.content) == [value], answer.choices[0].message.content


async def test_follow_up_on_a_long_document_reads_only_what_is_new(client: AsyncOpenAI) -> None:
    messages = chat(f"{document(0.9)}\n\n{QUESTION.format(PASSKEY[0])}")
    options: dict[str, Any] = {"model": MODEL, "max_tokens": 32, "temperature": 0}
    for key, value in [PASSKEY, *OTHER_FACTS.values()]:
        if messages[1:]:
            messages.append({"role": "user", "content": QUESTION.format(key)})
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
