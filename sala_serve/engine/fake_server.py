"""Fake engines that listen in this process and can be killed and started again on the same port."""

from __future__ import annotations

import asyncio
import socket
from contextlib import nullcontext
from typing import TYPE_CHECKING

import uvicorn

from sala_serve.engine.fake import Behaviour, FakeEngine

if TYPE_CHECKING:
    from types import TracebackType


class FakeServer:
    """One fake engine on a port of its own, for the length of a block."""

    def __init__(self, behaviour: Behaviour | None = None) -> None:
        self.behaviour = behaviour or Behaviour()
        self.engine = FakeEngine(self.behaviour, on_death=self.kill)
        self._port = 0
        self._server: uvicorn.Server | None = None
        self._serving: asyncio.Task[None] | None = None

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self._port}"

    @property
    def num_connections(self) -> int:
        """Open connections, idle ones included."""
        return len(self._server.server_state.connections) if self._server else 0

    async def __aenter__(self) -> FakeServer:
        await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.kill()
        await self._ended()

    async def start(self) -> None:
        """Listen, on the same port as before; nothing is remembered of what an earlier life computed."""
        await self._ended()
        self.engine = FakeEngine(self.behaviour, on_death=self.kill)
        listener = socket.create_server(("127.0.0.1", self._port), backlog=512)
        self._port = listener.getsockname()[1]
        config = uvicorn.Config(self.engine.app, log_config=None, access_log=False, lifespan="off")
        self._server = _Server(config)
        self._serving = asyncio.create_task(_serve(self._server, listener))
        while not self._server.started:  # noqa: ASYNC110 - uvicorn has no event
            await asyncio.sleep(0.002)

    def kill(self) -> None:
        """Be gone at once: every connection is reset, new ones are refused."""
        if (server := self._server) is None:
            return
        self._server = None
        for job in self.engine.core.jobs:
            self.engine.journal.ends.setdefault(job.request_id, "died")
        for listening in server.servers:
            listening.close()
        _reset_connections(server)
        server.should_exit = server.force_exit = True

    async def _ended(self) -> None:
        if self._serving is not None:
            await asyncio.wait({self._serving})
            self._serving = None


async def _serve(server: uvicorn.Server, listener: socket.socket) -> None:
    await server.serve(sockets=[listener])
    _reset_connections(server)  # those that were being accepted in the moment of the kill


def _reset_connections(server: uvicorn.Server) -> None:
    for connection in list(server.server_state.connections):
        connection.transport.abort()


class _Server(uvicorn.Server):
    """uvicorn that leaves signals alone and notices its end sooner."""

    async def main_loop(self) -> None:
        while not self.should_exit:
            await self.on_tick(0)
            await asyncio.sleep(0.01)

    def capture_signals(self) -> nullcontext[None]:  # type: ignore[override]
        return nullcontext()
