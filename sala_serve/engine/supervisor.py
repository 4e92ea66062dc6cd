"""Keeps an engine process running: starts it, restarts it when it dies, stops it with the gateway."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import signal
import sys
from collections import deque
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sala_serve.engine import guard

if TYPE_CHECKING:
    from asyncio.subprocess import Process
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
    from pathlib import Path

    from sala_serve.engine.launch import EngineCommand
    from sala_serve.engine.monitor import EngineMonitor

logger = logging.getLogger(__name__)

_NUM_KEPT_LINES = 400
_MAX_LINE_CHARS = 2000
_LAST_OUTPUT_S = 2.0


@dataclass(frozen=True)
class RestartPolicy:
    """When and how often a dead engine is started again."""

    first_delay_s: float = 1.0
    max_delay_s: float = 60.0
    """The delay doubles with each death up to this."""
    healthy_after_s: float = 120.0
    """An engine that was ready for this long dies as if for the first time."""
    max_failed_starts: int = 3
    """Deaths in a row before readiness after which nothing but a person will help."""
    stop_grace_s: float = 15.0
    """Between SIGTERM and SIGKILL when the engine is stopped."""


class EngineStartFailed(Exception):  # noqa: N818 - named for what happened
    """The engine died before it was ready, as often as the policy allows."""

    def __init__(self, num_attempts: int, causes: list[str]) -> None:
        super().__init__(f"the engine did not start in {num_attempts} attempts")
        self.num_attempts = num_attempts
        self.causes = causes
        """The last telling lines of its log."""


class EngineSupervisor:
    """Runs one engine command; everything it prints goes to ``print_line``."""

    def __init__(
        self,
        command: EngineCommand,
        *,
        socket: Path,
        monitor: EngineMonitor,
        policy: RestartPolicy,
        print_line: Callable[[str], None],
        clock: Callable[[], float],
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._command = command
        self._socket = socket
        self._monitor = monitor
        self._policy = policy
        self._print_line = print_line
        self._clock = clock
        self._sleep = sleep
        self._restart = asyncio.Event()
        monitor.tell_when_stuck(self.restart)

    def restart(self, reason: str) -> None:
        """Stop the engine, which is stuck: SIGTERM, and SIGKILL after the policy's grace; then start it again."""
        logger.error("stopping the engine: %s", reason)
        self._restart.set()

    async def run(self) -> None:
        """Keep the engine running; cancel to stop it, which takes up to the policy's grace.

        Raises:
            EngineStartFailed: it died before it was ready, ``max_failed_starts`` times in a row.
        """
        policy = self._policy
        num_failed_starts, delay_s = 0, policy.first_delay_s
        while True:
            lines: deque[str] = deque(maxlen=_NUM_KEPT_LINES)
            status, ready_for_s = await self._run_once(lines)
            if ready_for_s is None:
                num_failed_starts += 1
                logger.error(
                    "engine exited with status %d before it was ready (attempt %d of %d): %s",
                    *(status, num_failed_starts, policy.max_failed_starts),
                    "; ".join(telling_lines(lines)),
                )
                if num_failed_starts >= policy.max_failed_starts:
                    self._monitor.engine_exited("the engine cannot start")
                    raise EngineStartFailed(num_failed_starts, telling_lines(lines))
            else:
                num_failed_starts = 0
                if ready_for_s >= policy.healthy_after_s:
                    delay_s = policy.first_delay_s
                logger.error(
                    "engine exited with status %d after %.0f s of service: %s",
                    *(status, ready_for_s, "; ".join(telling_lines(lines))),
                )
            self._monitor.engine_exited("the engine exited and is being restarted")
            logger.info("restarting the engine in %.1f s", delay_s)
            await self._sleep(delay_s)
            delay_s = min(2 * delay_s, policy.max_delay_s)

    async def _run_once(self, lines: deque[str]) -> tuple[int, float | None]:
        """Run the engine until it exits; return its status and for how long it was ready, if ever."""
        ready_at_s: float | None = None

        async def note_ready() -> None:
            nonlocal ready_at_s
            await self._monitor.wait_ready()
            ready_at_s = self._clock()

        self._restart.clear()
        async with asyncio.TaskGroup() as group:
            noting = group.create_task(note_ready())
            async with self._process(lines) as process:
                ending = group.create_task(process.wait())
                stopping = group.create_task(self._restart.wait())
                await asyncio.wait({ending, stopping}, return_when=asyncio.FIRST_COMPLETED)
                ended_at_s = self._clock()
                stopping.cancel()
            status = await ending
            noting.cancel()
        return status, None if ready_at_s is None else ended_at_s - ready_at_s

    @asynccontextmanager
    async def _process(self, lines: deque[str]) -> AsyncIterator[Process]:
        """Start the engine under its guard; on leaving, nothing of it is left."""
        self._socket.unlink(missing_ok=True)
        lifeline_read, lifeline_write = os.pipe()
        output_read, output_write = os.pipe()
        # pipes of our own: asyncio's hold back the end of a process until every heir has closed them
        try:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, guard.__file__, str(self._policy.stop_grace_s)),
                *self._command.argv,
                env=dict(self._command.env),
                stdin=lifeline_read,
                stdout=output_write,
                stderr=output_write,
                start_new_session=True,
            )
        except BaseException:
            os.close(lifeline_write)
            os.close(output_read)
            raise
        finally:
            os.close(lifeline_read)
            os.close(output_write)
        async with asyncio.TaskGroup() as group:
            reading = group.create_task(self._read_lines(output_read, lines))
            try:
                yield process
            finally:
                os.close(lifeline_write)
                await self._end(process)
                # the output ends with its last holder, unless one has left the process group
                await asyncio.wait({reading}, timeout=_LAST_OUTPUT_S)
                reading.cancel()

    async def _end(self, process: Process) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(self._policy.stop_grace_s + 5):
                await process.wait()
        # what the guard could not take with it: children of an engine that died by itself
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()

    async def _read_lines(self, output: int, lines: deque[str]) -> None:
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader()
        transport, _ = await loop.connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(output, "rb", buffering=0)
        )
        rest = b""
        try:
            while chunk := await reader.read(65536):
                *complete, rest = (rest + chunk).split(b"\n")
                for line in complete:
                    self._take_line(line, lines)
                if len(rest) > _MAX_LINE_CHARS:
                    self._take_line(rest, lines)
                    rest = b""
            if rest:
                self._take_line(rest, lines)
        finally:
            transport.close()

    def _take_line(self, line: bytes, lines: deque[str]) -> None:
        text = line.decode("utf-8", "replace").rstrip()[:_MAX_LINE_CHARS]
        lines.append(text)
        self._print_line(text)


_LOG_PREFIX = re.compile(
    r"^(\([^)]*pid=\d+\)\s*)*((ERROR|WARNING|INFO|CRITICAL)\s+\d\d-\d\d \d\d:\d\d:\d\d\s+\[[^\]]*\]\s*)?"
)
_ERROR_LINE = re.compile(
    r"^([A-Za-z_]\w*\.)*[A-Za-z_]\w*(Error|Exception|Failed)\b: .|: error: |^error: "
)
_FOLLOW_UP = re.compile(r"Engine core initialization failed|root cause above|cancelled|Broken pipe")


def telling_lines(lines: Iterable[str], *, num_lines: int = 3) -> list[str]:
    """Return the lines that say why an engine died: its distinct error messages, else its last lines."""
    plain = [line for line in (_LOG_PREFIX.sub("", line).strip() for line in lines) if line]
    errors = [line for line in plain if _ERROR_LINE.search(line)]
    causes = [line for line in errors if not _FOLLOW_UP.search(line)] or errors or plain
    return list(dict.fromkeys(causes))[-num_lines:]
