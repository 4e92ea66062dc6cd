"""Processes that a load test starts, and sees to their end."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

from machine import ROOT

START_TIMEOUT_S = 120.0


class StartFailed(Exception):  # noqa: N818 - named for what happened
    """A process ended, or said nothing, before it was ready."""


def free_port() -> int:
    """Return a port of this machine on which nobody listens now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port


class Process:
    """One process, whose output goes to a file; a block that is left kills it.

    Args:
        command: its arguments.
        log: what it prints; appended to.
        env: added to this process's environment, without its ``SALA_*``.
    """

    def __init__(
        self, command: Sequence[str], log: Path, env: Mapping[str, str] | None = None
    ) -> None:
        self._command = list(command)
        self.log = log
        kept = {name: value for name, value in os.environ.items() if not name.startswith("SALA_")}
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        self._env = kept | {"PYTHONPATH": os.pathsep.join(paths)} | dict(env or {})
        self._running: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Process:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    @property
    def pid(self) -> int:
        """Of the process that runs."""
        assert self._running is not None
        return self._running.pid

    @property
    def is_running(self) -> bool:
        """Whether it has not ended."""
        return self._running is not None and self._running.poll() is None

    def start(self) -> None:
        """Start it, or start it again."""
        assert not self.is_running
        with self.log.open("ab") as log:
            self._running = subprocess.Popen(
                self._command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=self._env
            )

    def kill(self) -> None:
        """End it at once."""
        if self._running is not None:
            self._running.kill()
            self._running.wait()

    def stop(self, timeout_s: float) -> int | None:
        """Ask it to end; return its exit status, or ``None`` if it had to be killed."""
        assert self._running is not None
        self._running.terminate()
        try:
            return self._running.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
            return None

    def wait_port(self, port: int) -> None:
        """Wait until something listens on ``port``."""
        ends_at_s = time.monotonic() + START_TIMEOUT_S
        while True:
            try:
                with socket.create_connection(("127.0.0.1", port), timeout=1):
                    return
            except OSError:
                self._check(ends_at_s)
            time.sleep(0.05)

    def wait_line(self, pattern: str) -> str:
        """Wait until it has printed ``pattern``; return what the pattern's group matched."""
        ends_at_s = time.monotonic() + START_TIMEOUT_S
        while (found := re.search(pattern, self.log.read_text(errors="replace"))) is None:
            self._check(ends_at_s)
            time.sleep(0.05)
        return found[1]

    def _check(self, ends_at_s: float) -> None:
        if not self.is_running or time.monotonic() > ends_at_s:
            last = self.log.read_text(errors="replace")[-2000:]
            raise StartFailed(f"{self._command[0]} did not start. Its last words:\n{last}")
