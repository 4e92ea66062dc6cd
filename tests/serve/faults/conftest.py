"""What stands around a gateway in these tests: a slow way to Redis, a proxy, a process of its own."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import sys
import tempfile
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


class SlowWay:
    """A way to Redis on which each piece takes :attr:`delay_s`, in both directions."""

    def __init__(self, port: int) -> None:
        self.delay_s = 0.0
        self.url = ""
        self._port = port

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Join one connection to Redis."""
        with suppress(OSError):
            there = await asyncio.open_connection("127.0.0.1", self._port)
            await asyncio.gather(self._carry(reader, there[1]), self._carry(there[0], writer))

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                await asyncio.sleep(self.delay_s)
                writer.write(data)
                await writer.drain()
        finally:
            writer.close()


@pytest.fixture
def slow_way():
    """A function that opens a way to the Redis at a port, quick at first."""

    @asynccontextmanager
    async def start(port: int) -> AsyncIterator[SlowWay]:
        way = SlowWay(port)
        async with await asyncio.start_server(way.serve, "127.0.0.1", 0) as server:
            way.url = f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}/0"
            yield way

    return start


@pytest.fixture
def run_gateway():
    """A function that runs ``sala-serve gateway`` before an engine, with settings by section."""

    @asynccontextmanager
    async def run(
        engine_url: str, settings: dict[str, dict[str, Any]]
    ) -> AsyncIterator[tuple[asyncio.subprocess.Process, httpx.AsyncClient]]:
        env = {name: value for name, value in os.environ.items() if not name.startswith("SALA_")}
        for section, fields in settings.items():
            for name, value in fields.items():
                env[f"SALA_SERVE_{section}__{name}".upper()] = str(value)
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "sala_serve", "gateway"),
            *("--engine-url", engine_url, "--port", "0"),
            env=env,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )
        reading = None
        try:
            async with asyncio.timeout(60):
                line = b""
                while not (found := re.search(rb"listening on (http://\S+?),", line)):
                    line = await process.stderr.readline()
                    assert line, "it ended"
                reading = asyncio.create_task(process.stderr.read())  # a full pipe would stop it
                async with httpx.AsyncClient(base_url=found[1].decode(), verify=False) as http:
                    while (await http.get("/readyz")).status_code != 200:  # noqa: ASYNC110
                        await asyncio.sleep(0.01)
            async with httpx.AsyncClient(base_url=found[1].decode(), verify=False) as http:
                yield process, http
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()
            if reading is not None:
                await reading

    return run


NGINX = """
daemon off; master_process off; pid pid; error_log error.log;
events {}
http {
    access_log off;
    client_body_temp_path body; proxy_temp_path proxy;
    fastcgi_temp_path fastcgi; scgi_temp_path scgi; uwsgi_temp_path uwsgi;
    client_max_body_size 32m;
    server {
        listen unix:socket;
        location / { proxy_pass URL; proxy_http_version 1.1; proxy_read_timeout 2s; }
    }
}
"""


@pytest.fixture
def nginx(eventually):
    """A function that starts a real nginx, which gives up on two seconds of silence, before a URL."""
    program = shutil.which("nginx")
    if program is None:
        pytest.skip("no nginx on this machine")

    @asynccontextmanager
    async def start(url: str) -> AsyncIterator[httpx.AsyncClient]:
        with tempfile.TemporaryDirectory() as name:  # the path of a socket must be short
            folder = Path(name)
            (folder / "nginx.conf").write_text(NGINX.replace("URL", url))
            process = await asyncio.create_subprocess_exec(
                *(program, "-p", folder, "-c", folder / "nginx.conf", "-e", folder / "error.log"),
                cwd=folder,
                stderr=asyncio.subprocess.DEVNULL,
            )
            try:
                await eventually((folder / "socket").exists)
                transport = httpx.AsyncHTTPTransport(uds=str(folder / "socket"), verify=False)
                async with httpx.AsyncClient(transport=transport, base_url="http://proxy") as http:
                    yield http
            finally:
                process.kill()
                await process.wait()

    return start
