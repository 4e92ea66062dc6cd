"""Looks into one engine: how far its requests are, and whether it moves at all."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from typing import TYPE_CHECKING

from sala_serve.engine.progress import (
    PROGRESS_PATH,
    EngineProgress,
    parse_metrics,
    parse_progress,
)
from sala_serve.errors import GatewayError

if TYPE_CHECKING:
    from collections.abc import Callable

    from sala_serve.engine.http import HttpEngine
    from sala_serve.engine.monitor import EngineMonitor
    from sala_serve.telemetry import Metrics

logger = logging.getLogger(__name__)

WORKING_INTERVAL_S = 0.25
"""Between two looks while requests run."""
IDLE_INTERVAL_S = 1.0
LOOK_TIMEOUT_S = 5.0


class EngineWatch:
    """Finds an engine stuck by lack of progress, which ``/health`` does not show.

    Stuck is an engine that has requests and in which for ``stuck_after_s`` nothing moves: no step, no computed
    token, no request that comes or goes. A healthy prefill of a million tokens moves with each of its chunks.
    """

    def __init__(
        self,
        http: HttpEngine,
        monitor: EngineMonitor,
        *,
        engine_id: str,
        metrics: Metrics,
        stuck_after_s: float,
        clock: Callable[[], float],
    ) -> None:
        self._http = http
        self._monitor = monitor
        self._engine_id = engine_id
        self._metrics = metrics
        self._stuck_after_s = stuck_after_s
        self._clock = clock
        self._moved_at_s = clock()
        self._num_starts_seen = 0
        self.has_plugin: bool | None = None
        """Whether it serves ``/sala/progress``; None while that is not known."""
        self.look = EngineProgress(step=None)
        """The last look."""

    async def run(self) -> None:
        """Look again and again; cancel to stop."""
        while True:
            self._http.has_begun.clear()
            await self.look_once()
            if self._is_working() and self.has_plugin:
                await asyncio.sleep(WORKING_INTERVAL_S)
            else:
                with suppress(TimeoutError):
                    async with asyncio.timeout(IDLE_INTERVAL_S):
                        await self._http.has_begun.wait()

    async def look_once(self) -> None:
        """Look, and judge."""
        if self._monitor.num_starts != self._num_starts_seen:
            # another process: what was known of the one before says nothing about it
            self._num_starts_seen = self._monitor.num_starts
            self.look, self.has_plugin = EngineProgress(step=None), None
            self._moved_at_s = self._clock()
        try:
            look = await self._ask()
        except GatewayError:
            look = None  # no answer is no sign of life, and no news either
        except (ValueError, KeyError, TypeError):
            logger.warning("engine %s: its progress cannot be read", self._engine_id)
            look = None
        if look is not None:
            self._take(look)
        self._judge()

    async def _ask(self) -> EngineProgress:
        if self.has_plugin is not False:
            answer = await self._http.get(PROGRESS_PATH, timeout_s=LOOK_TIMEOUT_S)
            if answer.status == 200:
                self.has_plugin = True
                return parse_progress(answer.body)
            if answer.status == 404 and self.has_plugin is None:
                self.has_plugin = False
        answer = await self._http.get("/metrics", timeout_s=LOOK_TIMEOUT_S)
        return parse_metrics(answer.body.decode())

    def _take(self, look: EngineProgress) -> None:
        before, self.look = self.look, look
        if before.step is not None and look.step is not None:
            if look.instance != before.instance or look.step < before.step:
                self._monitor.note_restarted()
                self._num_starts_seen = self._monitor.num_starts
            else:
                self._count_prefill(before, look)
        if look.has_moved_since(before):
            self._moved_at_s = self._clock()
            self._monitor.note_moving()

    def _count_prefill(self, before: EngineProgress, look: EngineProgress) -> None:
        num_tokens = 0
        for request_id, now in look.requests.items():
            then = before.requests.get(request_id)
            # a request's cached tokens are known when its prefill begins, and were not computed
            is_begun = then is not None and then.phase != "waiting"
            start = then.num_computed_tokens if then and is_begun else now.num_cached_tokens
            num_tokens += max(0, now.num_computed_tokens - start)
        if num_tokens:
            self._metrics.prefill_done(self._engine_id, num_tokens)

    def _judge(self) -> None:
        if not self._is_working() or not self._monitor.status.is_ready:
            self._moved_at_s = self._clock()
        elif (still_for_s := self._clock() - self._moved_at_s) > self._stuck_after_s:
            logger.error(
                "engine %s is stuck: no progress for %.0f s with %d requests open",
                *(self._engine_id, still_for_s, self._http.num_open),
            )
            self._monitor.note_stuck(f"no progress for more than {self._stuck_after_s:.0f} s")

    def _is_working(self) -> bool:
        return self.look.is_working or self._http.num_open > 0
