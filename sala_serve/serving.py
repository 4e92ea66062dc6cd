"""Runs the gateway as a process: the socket, the signals, the engine beside it, the orderly end."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from sala_serve.api.admin import build_admin_app
from sala_serve.app import build_app
from sala_serve.config import ConfigError
from sala_serve.engine.supervisor import EngineStartFailed
from sala_serve.generation.updates import beside

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from starlette.types import ASGIApp

    from sala_serve.engine.supervisor import EngineSupervisor
    from sala_serve.gateway import Gateway

logger = logging.getLogger(__name__)

KEEP_ALIVE_S = 75
"""Idle client connections are kept longer than load balancers do (60 s), so that these close first."""
MAX_HEAD_BYTES = 256 * 1024
HEAD_TIMEOUT_S = 60.0
_CLOSE_TIMEOUT_S = 5


class BoundedHeadProtocol(HttpToolsProtocol):
    """uvicorn's protocol bounds neither the size of a request's head nor the time it takes to arrive."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Give the client ``HEAD_TIMEOUT_S`` for its first request's head."""
        super().connection_made(transport)
        self._expect_head()

    def data_received(self, data: bytes) -> None:
        """Take bytes of one request or more."""
        self._num_head_bytes += len(data)
        super().data_received(data)
        # bytes are counted anew with each head, so what came with the end of one does not count
        if self._head_timer is not None and self._num_head_bytes > MAX_HEAD_BYTES:
            self.send_400_response("The request's headers are too large.")

    def on_message_begin(self) -> None:
        """Begin a request's head."""
        super().on_message_begin()
        self._head_is_over()
        self._expect_head()

    def on_headers_complete(self) -> None:
        """End a request's head."""
        self._head_is_over()
        super().on_headers_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """Let go of the timer."""
        self._head_is_over()
        super().connection_lost(exc)

    def _expect_head(self) -> None:
        self._num_head_bytes = 0
        self._head_timer: asyncio.TimerHandle | None = self.loop.call_later(
            HEAD_TIMEOUT_S, self.transport.close
        )

    def _head_is_over(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None


class GatewayServer(uvicorn.Server):
    """uvicorn without its signal handlers: it would close the port before requests have drained.

    A client that takes nothing for ``send_timeout_s`` is cut off, also after its answer: what is on its way to it
    would be held for as long as it likes, by a connection that counts nowhere.
    """

    def __init__(self, app: ASGIApp, *, send_timeout_s: float = 60.0) -> None:
        self._send_timeout_s = send_timeout_s
        super().__init__(
            uvicorn.Config(
                app,
                http=BoundedHeadProtocol,
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=_CLOSE_TIMEOUT_S,
            )
        )

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to :func:`serve`."""
        yield

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until told to stop."""
        async with beside(self._cut_stalled()):
            await super().serve(sockets)

    async def _cut_stalled(self) -> None:
        stalled: dict[Any, tuple[int, float]] = {}
        while True:
            await asyncio.sleep(min(self._send_timeout_s / 4, 1.0))
            now_s = asyncio.get_running_loop().time()
            before, stalled = stalled, {}
            for connection in list(self.server_state.connections):
                num_bytes = connection.transport.get_write_buffer_size()
                num_before, since_s = before.get(connection, (0, now_s))
                if num_bytes == 0:
                    continue
                if num_bytes != num_before:
                    stalled[connection] = num_bytes, now_s
                elif now_s - since_s < self._send_timeout_s:
                    stalled[connection] = num_bytes, since_s
                else:
                    connection.transport.abort()


def bind(host: str, port: int) -> socket.socket:
    """Bind the gateway's port, before anything slow is started.

    Raises:
        ConfigError: the address is in use or not ours.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}") from None
    except UnicodeError:  # of a name that is too long
        raise ConfigError(f"cannot listen on {host}:{port}: not a host name") from None


async def serve(
    gateway: Gateway,
    listener: socket.socket,
    *,
    supervisor: EngineSupervisor | None,
    on_ready: Callable[[], None],
    admin_listener: socket.socket | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT, then drain; a second signal cuts the running requests.

    Args:
        gateway: the gateway to serve.
        listener: a bound socket, which is closed at the end.
        admin_listener: another one, for the admin port.
        supervisor: runs the engine, if it is ours to run.
        on_ready: called once, when the engine is ready for the first time.

    Raises:
        EngineStartFailed: the engine cannot start; the gateway has stopped in order.
    """
    stop = asyncio.Event()
    start_failure: list[EngineStartFailed] = []
    send_timeout_s = gateway.settings.server.send_timeout_s
    servers = [(GatewayServer(build_app(gateway), send_timeout_s=send_timeout_s), listener)]
    if admin_listener is not None:
        servers.append((GatewayServer(build_admin_app(gateway)), admin_listener))

    def on_signal() -> None:
        if stop.is_set():
            logger.warning("second signal: cutting %d running requests", gateway.running.cut_all())
            gateway.jobs.cut()
        stop.set()

    async def announce() -> None:
        await gateway.pool.wait_ready()
        on_ready()

    async def run_engine(supervisor: EngineSupervisor) -> None:
        try:
            await supervisor.run()
        except EngineStartFailed as error:
            start_failure.append(error)
            stop.set()

    loop = asyncio.get_running_loop()
    for signal_number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signal_number, on_signal)
    try:
        async with asyncio.TaskGroup() as group:
            serving = [group.create_task(server.serve(sockets=[each])) for server, each in servers]
            announcing = group.create_task(announce())
            engine = supervisor and group.create_task(run_engine(supervisor))
            await stop.wait()
            announcing.cancel()
            await _drain(gateway)
            # also the admin port, on which the drain could be watched
            for (server, _), task in zip(servers, serving, strict=True):
                server.should_exit = True
                await task
            if engine:
                engine.cancel()
    finally:
        for signal_number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(signal_number)
    if start_failure:
        raise start_failure[0]


async def _drain(gateway: Gateway) -> None:
    timeout_s = gateway.settings.server.drain_timeout_s
    logger.info("stopping: %d requests run, %.0f s to finish", len(gateway.running), timeout_s)
    async with asyncio.TaskGroup() as group:
        group.create_task(_drain_jobs(gateway, timeout_s))
        if num_cut := await gateway.running.drain(timeout_s):
            logger.warning("cut %d requests that did not finish in time", num_cut)


async def _drain_jobs(gateway: Gateway, timeout_s: float) -> None:
    try:
        async with asyncio.timeout(timeout_s):
            await gateway.jobs.drain()
    except TimeoutError:
        logger.warning("%d jobs did not finish in time", gateway.jobs.num_running)
