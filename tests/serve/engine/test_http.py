"""One connection a request: what breaks is named, what is left leaves nothing behind."""

import asyncio
import gc
import random
import warnings
from contextlib import suppress
from pathlib import Path

import pytest

from sala_serve.engine.fake import Behaviour
from sala_serve.engine.fake_server import FakeServer
from sala_serve.engine.http import HttpEngine
from sala_serve.engine.settings import EngineSettings
from sala_serve.errors import EngineLost, EngineTimeout, EngineUnavailable

PATH = "/v1/chat/completions"
BODY = b'{"model": "sala", "messages": [{"role": "user", "content": "Hi"}]}'
STREAM = BODY[:-1] + b', "stream": true}'


def client(url, **settings):
    return HttpEngine(EngineSettings(url=url, **settings))


def num_sockets():
    num = 0
    for entry in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # the one that lists the folder
            num += str(entry.readlink()).startswith("socket:")
    return num


async def ask(engine, body=BODY, headers=None):
    async with engine.post(PATH, body, headers=headers or {}, prompt_field="messages") as reply:
        return await reply.read()


async def raw_server(answer):
    """A server that reads something and then does what ``answer`` says."""

    async def serve(reader, writer):
        # a client that has what it wanted goes, and at the end the server cuts who still writes
        with suppress(OSError, asyncio.CancelledError):
            await reader.read(10)
            await answer(writer)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    return server, f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def test_whole_answer_and_stream():
    async with FakeServer(Behaviour(num_tokens=4)) as server:
        engine = client(server.url)
        assert b'"choices"' in await ask(engine)
        assert (await ask(engine, STREAM)).endswith(b"data: [DONE]\n\n")
        assert engine.num_open == 0


@pytest.mark.parametrize(
    ("written", "error"),
    [
        (b"", EngineLost),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf", EngineLost),
        (b"SSH-2.0-OpenSSH\r\n", EngineLost),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n", EngineLost),
    ],
)
async def test_answer_that_is_not_whole_is_lost(written, error):
    async def answer(writer):
        writer.write(written)
        await writer.drain()

    server, url = await raw_server(answer)
    async with server:
        with pytest.raises(error):
            await ask(client(url))


async def test_silence_and_refusal_are_told_apart():
    async def silent(_writer):
        await asyncio.sleep(5)

    server, url = await raw_server(silent)
    async with server:
        with pytest.raises(EngineTimeout):
            await ask(client(url, read_timeout_s=0.05))
        server.close()
    with pytest.raises(EngineUnavailable):
        await ask(client(url))


async def test_requests_of_a_stuck_engine_end_with_the_cause():
    async with FakeServer(Behaviour(ttft_s=60)) as server:
        engine = client(server.url)
        asking = asyncio.create_task(ask(engine))
        while not server.engine.core.jobs:  # noqa: ASYNC110 - the engine has no event
            await asyncio.sleep(0.005)
        engine.cut_all(EngineLost("stuck"))
        with pytest.raises(EngineLost, match="stuck"):
            await asking
        assert engine.num_open == 0


async def test_engine_waits_for_a_slow_reader():
    written = 0

    async def flood(writer):
        nonlocal written
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100000000\r\n\r\n")
        piece = b"x" * 65536
        for _ in range(100_000_000 // len(piece)):
            writer.write(piece)
            await writer.drain()
            written += len(piece)

    server, url = await raw_server(flood)
    async with server:
        engine = client(url)
        async with engine.post(PATH, BODY, headers={}, prompt_field="messages") as reply:
            chunks = reply.chunks()
            await anext(chunks)
            await asyncio.sleep(0.3)
            # the sockets' buffers and ours are full, and no more was taken
            assert written < 20_000_000
            await chunks.aclose()


async def test_clients_that_leave_at_any_moment_leave_no_socket():
    generator = random.Random(7)
    behaviour = Behaviour(ttft_s=0.005, itl_s=0.002, num_tokens=5)
    async with FakeServer(behaviour) as server:
        engine = client(server.url)
        await ask(engine)
        await asyncio.sleep(0.05)
        before = num_sockets()
        gc.disable()  # what only the collector would close counts as left behind
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", ResourceWarning)
                for _ in range(150):
                    asking = asyncio.create_task(ask(engine, STREAM))
                    await asyncio.sleep(generator.random() * 0.02)
                    asking.cancel()
                    await asyncio.wait({asking})
            for _ in range(100):
                if num_sockets() == before and not server.engine.core.jobs:
                    break
                await asyncio.sleep(0.02)
            assert num_sockets() == before
            assert engine.num_open == 0
            assert not server.engine.core.jobs
        finally:
            gc.enable()
