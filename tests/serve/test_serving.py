"""The real process: signals, draining, the engine beside it."""

from __future__ import annotations

import asyncio
import json
import os
import re
import resource
import signal
import sys
from contextlib import asynccontextmanager, suppress

import httpx
import pytest

from sala_serve import serving
from sala_serve.__main__ import main
from sala_serve.serving import MAX_HEAD_BYTES, GatewayServer, bind

PATH = "/v1/chat/completions"
REQUEST = {"model": "sala", "messages": [{"role": "user", "content": "Hi"}], "stream": True}


class Process:
    """A running ``sala-serve``; what it prints is kept."""

    def __init__(self, process):
        self.process = process
        self.out = ""
        self.err = ""
        self.url = ""

    def kill(self, number):
        self.process.send_signal(number)

    async def exit_status(self):
        async with asyncio.timeout(20):
            return await self.process.wait()

    async def read(self, stream, name):
        while chunk := await stream.read(65536):
            setattr(self, name, getattr(self, name) + chunk.decode())
            if found := re.search(r"listening on (http://\S+?),", self.err):
                self.url = found[1]


@asynccontextmanager
async def sala_serve(*arguments, env=None):
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "sala_serve", *arguments),
        env=env,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    it = Process(process)
    async with asyncio.TaskGroup() as group:
        group.create_task(it.read(process.stdout, "out"))
        group.create_task(it.read(process.stderr, "err"))
        try:
            yield it
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()


@pytest.fixture
async def behind_gateway(fake_engine, eventually):
    """Start ``sala-serve gateway`` in front of a fake engine."""
    engine, engine_url = fake_engine

    @asynccontextmanager
    async def start(**variables):
        env = {**os.environ, **variables}
        arguments = ("gateway", "--engine-url", engine_url, "--port", "0")
        async with sala_serve(*arguments, env=env) as it:
            await eventually(lambda: "Ready after" in it.out)
            async with httpx.AsyncClient(base_url=it.url, timeout=20, verify=False) as http:
                yield engine, it, http

    return start


async def test_sigterm_lets_running_streams_finish_and_admits_no_more(behind_gateway):
    async with behind_gateway() as (engine, it, http):
        engine.behaviour.num_tokens, engine.behaviour.itl_s = 10, 0.1
        async with http.stream("POST", PATH, json=REQUEST) as response:
            chunks = response.aiter_text()
            text = await anext(chunks)
            it.kill(signal.SIGTERM)
            await asyncio.sleep(0.2)
            probe = await http.get("/readyz")
            assert (probe.status_code, probe.json()["error"]["code"]) == (503, "shutting_down")
            assert (await http.post(PATH, json=REQUEST)).status_code == 503
            async for chunk in chunks:
                text += chunk
        assert "word9" in text
        assert text.endswith("data: [DONE]\n\n")
        assert await it.exit_status() == 0


async def test_drain_hands_back_what_waits_and_says_how_long_the_rest_takes(
    behind_gateway, eventually
):
    variables = {
        "SALA_SERVE_SCHEDULING__LONG_PROMPT_TOKENS": "50",
        "SALA_SERVE_SERVER__PROGRESS_INTERVAL_S": "0.1",
        "SALA_SERVE_SERVER__HOLD_STATUS_S": "0",
    }
    async with behind_gateway(**variables) as (engine, it, http), asyncio.TaskGroup() as group:
        engine.behaviour.num_prompt_tokens, engine.behaviour.num_cached_tokens = 100, 0
        engine.behaviour.ttft_s, engine.behaviour.num_tokens = 1.5, 3
        running = group.create_task(http.post(PATH, json={**REQUEST, "stream": False}))
        await eventually(lambda: engine.journal.num_running == 1)
        streamed = group.create_task(http.post(PATH, json=REQUEST))
        whole = group.create_task(http.post(PATH, json={**REQUEST, "stream": False}))
        await asyncio.sleep(0.4)
        it.kill(signal.SIGTERM)
        refused = await whole
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
        assert int(refused.headers["Retry-After"]) > 0
        text = (await streamed).text
        assert ": queued place=1" in text
        error = json.loads(text.strip().split("\n\n")[-1].removeprefix("data: "))["error"]
        assert error["code"] == "shutting_down"
        draining = (await http.get("/readyz")).json()["draining"]
        assert draining["num_requests"] == 1
        assert (await running).status_code == 200
        assert await it.exit_status() == 0
        assert engine.journal.num_aborted == 0
        assert len(engine.journal.bodies) == 1
        assert re.search(r"draining: \d requests run, about \d+ s of work remain", it.err)


async def test_admin_port_is_there_with_a_token_and_outlives_the_drain(behind_gateway, eventually):
    token = "a token of the tests"
    variables = {"SALA_SERVE_ADMIN__TOKEN": token, "SALA_SERVE_ADMIN__PORT": "0"}
    async with behind_gateway(**variables) as (engine, it, http):
        engine.behaviour.ttft_s = 1.0
        (url,) = re.findall(r"admin API on (http://\S+)", it.err)
        admin = httpx.AsyncClient(
            base_url=url, headers={"Authorization": f"Bearer {token}"}, verify=False
        )
        async with admin, asyncio.TaskGroup() as group:
            created = await admin.post("/admin/v1/tenants", json={"id": "acme", "name": "Acme"})
            assert created.status_code == 201, created.text
            key = await admin.post("/admin/v1/tenants/acme/keys", json={"name": "one"})
            bearer = {"Authorization": f"Bearer {key.json()['key']}"}
            # where keys can be made, one is asked for
            assert (await http.get("/v1/models")).status_code == 401
            assert (await http.get("/v1/models", headers=bearer)).status_code == 200
            assert (await http.get(f"{url}/admin/v1/tenants")).status_code == 401
            assert (await http.get("/admin/v1/tenants", headers=admin.headers)).status_code == 404
            asked = group.create_task(http.post(PATH, json=REQUEST, headers=bearer))
            await eventually(lambda: engine.journal.num_running == 1)
            it.kill(signal.SIGTERM)
            (request,) = (await admin.get("/admin/v1/requests")).json()["data"]
            assert request["tenant_id"] == "acme"
            assert (await asked).status_code == 200
        assert await it.exit_status() == 0
        assert token not in it.err


async def test_requests_that_outlast_the_drain_end_with_an_error(behind_gateway):
    async with behind_gateway(SALA_SERVE_DRAIN_TIMEOUT_S="0.5") as (engine, it, http):
        engine.behaviour.num_tokens, engine.behaviour.itl_s = 1000, 0.05
        async with http.stream("POST", PATH, json=REQUEST) as response:
            chunks = response.aiter_text()
            text = await anext(chunks)
            it.kill(signal.SIGTERM)
            async for chunk in chunks:
                text += chunk
        last = json.loads(text.split("\n\n")[-2].removeprefix("data: "))
        assert last["error"]["code"] == "shutting_down"
        assert "[DONE]" not in text
        assert await it.exit_status() == 0
        assert engine.journal.num_aborted == 1
        assert "cut 1 requests" in it.err


async def test_second_signal_cuts_at_once(behind_gateway, eventually):
    async with behind_gateway() as (engine, it, http):
        engine.behaviour.ttft_s = 60
        async with asyncio.TaskGroup() as group:
            posting = group.create_task(http.post(PATH, json=REQUEST))
            await eventually(lambda: engine.journal.num_running == 1)
            it.kill(signal.SIGINT)
            await eventually(lambda: "1 requests run" in it.err)
            it.kill(signal.SIGINT)
            response = await posting
        assert (response.status_code, response.json()["error"]["code"]) == (503, "shutting_down")
        assert await it.exit_status() == 0


async def test_every_request_may_have_its_two_sockets(behind_gateway):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 512), hard))  # children inherit it
    try:
        async with behind_gateway() as (_, it, _):
            limit = resource.prlimit(it.process.pid, resource.RLIMIT_NOFILE)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert limit == (hard, hard)


async def test_up_answers_at_once_becomes_ready_and_prints_a_curl_line_that_works(stub, eventually):
    arguments = ("up", str(stub.checkpoint), "--port", "0")
    async with sala_serve(*arguments, env=stub.env("slow_start")) as it:
        await eventually(lambda: it.url)
        async with httpx.AsyncClient(base_url=it.url) as http:
            probe = await http.get("/readyz")
            assert probe.status_code == 503
            assert "engine starting" in probe.json()["error"]["message"]
            assert (await http.get("/healthz")).status_code == 200
        await eventually(lambda: "Ready after" in it.out and it.out.endswith("\n\n"))
        curl = await asyncio.create_subprocess_shell(
            it.out.partition("Try:")[2],
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
        answer, _ = await curl.communicate()
        assert json.loads(answer)["model"] == "checkpoint"
        assert len(stub.alive()) == 2
        it.kill(signal.SIGTERM)
        assert await it.exit_status() == 0
        assert "engine | " in it.err
    await eventually(lambda: not stub.alive())


async def test_nothing_of_the_engine_outlives_a_killed_gateway(stub, eventually):
    arguments = ("up", str(stub.checkpoint), "--port", "0")
    async with sala_serve(*arguments, env=stub.env("ok")) as it:
        await eventually(lambda: "Ready after" in it.out)
        assert len(stub.alive()) == 2
        it.kill(signal.SIGKILL)
        await it.exit_status()
        await eventually(lambda: not stub.alive())


async def test_up_says_why_the_engine_cannot_start(stub, eventually):
    arguments = ("up", str(stub.checkpoint), "--port", "0")
    async with sala_serve(*arguments, env=stub.env("die_at_start")) as it:
        assert await it.exit_status() == 1
    last = it.err.partition("sala-serve: error: ")[2]
    assert "did not start in 3 attempts" in last
    assert "OSError: no file named model.safetensors found" in last
    await eventually(lambda: not stub.alive())


async def test_up_refuses_a_checkpoint_that_is_not_sala(stub):
    config = json.loads((stub.checkpoint / "config.json").read_text())
    config["mixer_types"] = ["mamba", "minicpm4"]
    (stub.checkpoint / "config.json").write_text(json.dumps(config))
    async with sala_serve("up", str(stub.checkpoint), env=stub.env("ok")) as it:
        assert await it.exit_status() == 2
    assert it.err.startswith("sala-serve: error: mixer_types: supported are")
    assert len(it.err.splitlines()) == 1
    assert stub.pids() == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--engine-url", "localhost:8001"), "argument --engine-url: expected a URL"),
        (("--engine-url", "http://127.0.0.1:8001/v1"), "without /v1"),
        (("--engine-url", "http://me:secret@h"), "without a user"),
        (("--engine-url", "http://h", "--port", "x"), "argument --port: expected a port number"),
        (("--engine-url", "http://h", "--host", "x" * 100), "cannot listen on"),
    ],
)
def test_unusable_argument_is_one_clear_line(capsys, monkeypatch, arguments, message):
    for name in [name for name in os.environ if name.startswith("SALA_")]:
        monkeypatch.delenv(name)
    try:
        status = main(["gateway", *arguments])
    except SystemExit as exit:  # argparse
        status = exit.code
    assert status == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("folder", ["missing", "x" * 100])
async def test_unusable_temporary_folder_is_a_clear_error(stub, tmp_path, folder):
    if folder != "missing":
        (tmp_path / folder).mkdir()
    env = {**stub.env("ok"), "TMPDIR": str(tmp_path / folder)}
    if folder == "missing":  # then Python tries others: leave it none
        env["PYTHONPATH"] += os.pathsep + str(tmp_path)
        (tmp_path / "sitecustomize.py").write_text(
            "import tempfile\ntempfile._candidate_tempdir_list = lambda: ['/dev/null/x']\n"
        )
    async with sala_serve("up", str(stub.checkpoint), env=env) as it:
        assert await it.exit_status() == 2
    assert "set TMPDIR" in it.err
    assert len(it.err.splitlines()) == 1


async def test_head_of_a_request_is_bounded(stack):
    host, port = stack.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\nX: ")
    with suppress(ConnectionError):
        for _ in range(2 * MAX_HEAD_BYTES // 65536):
            writer.write(b"a" * 65536)
            await writer.drain()
            await asyncio.sleep(0)
        assert (await reader.read()).startswith(b"HTTP/1.1 400 ")
    writer.close()
    with suppress(ConnectionError):
        await writer.wait_closed()
    assert (await stack.http.get("/healthz", headers={"X": "a" * 100_000})).status_code == 200


async def test_head_that_does_not_end_is_given_up(stack, monkeypatch):
    monkeypatch.setattr(serving, "HEAD_TIMEOUT_S", 0.1)
    host, port = stack.url.removeprefix("http://").split(":")
    for start in (b"", b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\nGET /he"):
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(start)
        async with asyncio.timeout(20):
            answer = await reader.read()
        assert answer.count(b"HTTP/1.1 200") == start.count(b"healthz")
        writer.close()
        await writer.wait_closed()


async def test_port_in_use_is_a_clear_error(stub, fake_engine):
    port = fake_engine[1].rpartition(":")[2]
    arguments = ("up", str(stub.checkpoint), "--port", port)
    async with sala_serve(*arguments, env=stub.env("ok")) as it:
        assert await it.exit_status() == 2
    assert f"cannot listen on 127.0.0.1:{port}" in it.err
    assert stub.pids() == []


@pytest.mark.parametrize("is_complete", [True, False])
async def test_client_that_takes_nothing_is_cut_off_also_after_its_answer(eventually, is_complete):
    async def app(scope, receive, send):
        if scope["type"] == "lifespan":
            return
        await send({"type": "http.response.start", "status": 200, "headers": []})
        body = {"type": "http.response.body", "body": bytes(30_000_000)}
        await send({**body, "more_body": not is_complete})

    listener = bind("127.0.0.1", 0)
    server = GatewayServer(app, send_timeout_s=0.2)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    await eventually(lambda: server.started)
    _, writer = await asyncio.open_connection(*listener.getsockname(), limit=1024)
    writer.write(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
    await eventually(lambda: server.server_state.connections)
    await eventually(lambda: not server.server_state.connections)
    writer.close()
    server.should_exit = True
    await serving
