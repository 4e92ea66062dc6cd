"""One running `sala-serve up` with the demo checkpoint and real vLLM, for all modules of this folder."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from openai import AsyncOpenAI
from tokenizers import Tokenizer

from sala_serve.engine import guard

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

DEMO = Path(__file__).parents[3] / "training" / "demo"
READY_TIMEOUT_S = 240
STOP_LIMIT_S = 60
STEPS_PER_S = 200
"""Of one token, on a fast machine; a slow one takes fewer in a second."""
FREE_LIMIT_S = 30
"""One step of a prefill takes seconds on a machine that runs other tests beside, and cannot be broken off."""
STRUCTURED_OUTPUTS = {"backend": "xgrammar", "disable_any_whitespace": True}
ADMIN_TOKEN = "the operator's own token"
ADMIN_LINE = r"admin API on (http://[^\s\"]+)"
LONG_PROMPT_TOKENS = 4_000
"""One longer prompt at a time; further ones wait in the gateway."""


@dataclass(frozen=True)
class Stack:
    """A running `sala-serve up`."""

    url: str
    admin_url: str
    engine_socket: Path
    spans: list[bytes]
    """What the engine has told about its traces, as it came: protobuf."""
    process: subprocess.Popen[bytes]
    """The guard that ends it if the tests are killed."""
    log: Path

    async def progress(self) -> dict[str, Any]:
        """Ask the engine itself how far its requests are, and how much memory they hold."""
        async with self.engine() as client:
            document: dict[str, Any] = (await client.get("/sala/progress")).json()
        return document

    async def until(self, holds: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
        """Wait until the engine's progress is as wanted, and return it."""
        async with asyncio.timeout(120):
            while not holds(now := await self.progress()):  # noqa: ASYNC110 - another process
                await asyncio.sleep(0.02)
        return now

    async def until_free(self) -> None:
        """Wait until the engine has no request and holds no memory, which takes it a second of steps at most.

        A busy machine takes its steps slowly: there the bound in seconds is a wide one.
        """
        begun_at_s, begun_at = time.monotonic(), (await self.progress())["step"]
        now = await self.until(lambda now: not now["requests"] and not now["kv"]["used_tokens"])
        assert now["step"] - begun_at <= STEPS_PER_S
        assert time.monotonic() - begun_at_s < FREE_LIMIT_S

    def admin(self) -> httpx.AsyncClient:
        """Talk to the gateway's admin API."""
        headers = {"Authorization": f"Bearer {ADMIN_TOKEN}"}
        return httpx.AsyncClient(base_url=f"{self.admin_url}/admin/v1", headers=headers, timeout=60)

    @asynccontextmanager
    async def tenant(self) -> AsyncIterator[tuple[AsyncOpenAI, str]]:
        """Make a tenant; return a client with a key of it, and its id."""
        async with self.admin() as admin:
            limits = {"tokens_in_flight": 1_000_000, "tokens_per_day": 10_000_000}
            made = await admin.post("/tenants", json={"name": "Tenant", "limits": limits})
            tenant_id = made.raise_for_status().json()["id"]
            key = await admin.post(f"/tenants/{tenant_id}/keys", json={"name": "one"})
            token = key.raise_for_status().json()["key"]
        async with AsyncOpenAI(
            base_url=f"{self.url}/v1", api_key=token, max_retries=0, timeout=300
        ) as client:
            yield client, tenant_id

    async def books(self, tenant_id: str) -> tuple[int, int]:
        """Return a tenant's tokens of today, and those in flight."""
        async with self.admin() as admin:
            limits = (await admin.get(f"/tenants/{tenant_id}/usage")).json()["limits"]
        return round(limits["tokens_per_day"]["used"]), round(limits["tokens_in_flight"]["used"])

    async def settled(self, tenant_id: str) -> int:
        """Wait until nothing of a tenant is in flight; return its tokens of today."""
        async with asyncio.timeout(60):
            while (books := await self.books(tenant_id))[1]:  # noqa: ASYNC110 - another process
                await asyncio.sleep(0.02)
        return books[0]

    @asynccontextmanager
    async def engine(self) -> AsyncIterator[httpx.AsyncClient]:
        """Talk to the engine itself, past the gateway."""
        transport = httpx.AsyncHTTPTransport(uds=str(self.engine_socket))
        async with httpx.AsyncClient(
            transport=transport, base_url="http://engine", timeout=120
        ) as client:
            yield client

    @staticmethod
    def long_text(num_tokens: int, start: int = 0) -> str:
        """Paragraphs of a novel that the model was not trained on, cut to a number of tokens."""
        tokenizer = Tokenizer.from_file(str(DEMO / "checkpoint" / "tokenizer.json"))
        text = (DEMO / "persuasion.txt").read_text(encoding="utf-8")
        ids = tokenizer.encode(text, add_special_tokens=False).ids[start : start + num_tokens]
        assert len(ids) == num_tokens
        decoded: str = tokenizer.decode(ids, skip_special_tokens=False)
        return decoded

    def engine_pids(self) -> list[int]:
        """Every process of the engine that lives: they share the session that its guard opened."""
        listing = subprocess.run(
            ["ps", "-eo", "pid=,ppid=,sid=,stat="], capture_output=True, text=True, check=True
        )
        rows = [line.split() for line in listing.stdout.splitlines()]
        served = {pid for pid, ppid, *_ in rows if int(ppid) == self.process.pid}
        sessions = {sid for _, ppid, sid, _ in rows if ppid in served}
        return [int(pid) for pid, _, sid, stat in rows if sid in sessions and stat[0] != "Z"]


def _runs(pid: int) -> bool:
    """Tell whether a process lives; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@contextmanager
def _collector() -> Iterator[tuple[str, list[bytes]]]:
    """Take the spans that an engine exports: where to, and what has come."""
    spans: list[bytes] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            spans.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_arguments: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/v1/traces", spans
        server.shutdown()
        thread.join()


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """One for all modules; what it computed for one test may be in the cache of the next."""
    folder = tmp_path_factory.mktemp("stack")
    with _collector() as (spans_url, spans), _started(folder, spans_url) as process:
        log = (folder / "log").read_text()
        url, admin_url = re.search(r"listening on (http://\S+?),", log), re.search(ADMIN_LINE, log)
        assert url is not None
        assert admin_url is not None
        (socket,) = folder.glob("sala-serve-*/engine.sock")
        stack = Stack(url[1], admin_url[1], socket, spans, process, folder / "log")
        pids = stack.engine_pids()
        assert len(pids) >= 3  # guard, API server, engine
        yield stack
        pids += stack.engine_pids()
        os.killpg(process.pid, signal.SIGTERM)
        assert process.wait(timeout=STOP_LIMIT_S) == 0
        assert not [pid for pid in pids if _runs(pid)]


@contextmanager
def _started(folder: Path, spans_url: str) -> Iterator[subprocess.Popen[bytes]]:
    env = {key: value for key, value in os.environ.items() if not key.startswith("SALA_")}
    env |= {
        "TMPDIR": str(folder),
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        # several threads would wait for each other in loops, at the cost of the tests beside these
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
        "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",
        "OTEL_BSP_SCHEDULE_DELAY": "100",
        "SALA_SERVE_ADMIN__TOKEN": ADMIN_TOKEN,
        "SALA_SERVE_ADMIN__PORT": "0",
        "SALA_SERVE_TENANTS__REQUIRE_KEYS": "false",
        "SALA_SERVE_SCHEDULING__LONG_PROMPT_TOKENS": str(LONG_PROMPT_TOKENS),
    }
    log = folder / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, guard.__file__, str(STOP_LIMIT_S)]
            + [sys.executable, "-m", "sala_serve", "up", str(DEMO / "checkpoint")]
            + ["--served-model-name", "demo", "--port", "0"]
            + ["--", "--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
            # a small model would fill its answer with white space
            + ["--structured-outputs-config", json.dumps(STRUCTURED_OUTPUTS)]
            + ["--otlp-traces-endpoint", spans_url],
            stdin=subprocess.PIPE,
            start_new_session=True,
            env=env,
            stdout=output,
            stderr=output,
        )
    try:
        deadline_s = time.monotonic() + READY_TIMEOUT_S
        while "Ready after" not in log.read_text():
            assert process.poll() is None, log.read_text()[-5000:]
            assert time.monotonic() < deadline_s, log.read_text()[-5000:]
            time.sleep(0.2)
        yield process
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.wait()


@pytest.fixture
async def client(stack: Stack) -> AsyncIterator[AsyncOpenAI]:
    """OpenAI's client of the gateway."""
    async with AsyncOpenAI(
        base_url=f"{stack.url}/v1", api_key="none", max_retries=0, timeout=300
    ) as client:
        yield client
