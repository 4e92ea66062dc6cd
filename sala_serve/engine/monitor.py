"""Is the engine ready, and which models does it serve? Asked again and again while the gateway runs."""

from __future__ import annotations

import asyncio
import json
import logging
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from sala_serve.errors import EngineLost, EngineTimeout, EngineUnavailable

if TYPE_CHECKING:
    from collections.abc import Callable

    from sala_serve.engine.http import HttpEngine
    from sala_serve.telemetry import Metrics

logger = logging.getLogger(__name__)

PROBE_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class ServedModel:
    """One model as the engine lists it."""

    name: str
    max_model_len: int | None
    """Tokens of prompt and answer together."""
    created_unix_s: int


@dataclass(frozen=True)
class EngineStatus:
    """What is known about the engine."""

    is_ready: bool
    reason: str
    """Why it is not ready, for people."""
    models: tuple[ServedModel, ...] = ()
    """Kept while the engine is down."""


class EngineMonitor:
    """Watches one engine through its ``/health`` and ``/v1/models``."""

    def __init__(
        self,
        http: HttpEngine,
        *,
        engine_id: str,
        metrics: Metrics,
        probe_interval_s: float,
        stuck_after_s: float,
        clock: Callable[[], float],
    ) -> None:
        self._http = http
        self._engine_id = engine_id
        self._metrics = metrics
        self._probe_interval_s = probe_interval_s
        self._stuck_after_s = stuck_after_s
        self._clock = clock
        self._answered_at_s = clock()
        self._num_exits = 0
        self._was_gone = True
        self._is_silent = False
        self._makes_no_progress = False
        self._ready = asyncio.Event()
        self._in_doubt = asyncio.Event()
        self._on_stuck: Callable[[str], None] = lambda _reason: None
        self.num_starts = 0
        """Times that it has become ready as another process than before."""
        self.status = EngineStatus(is_ready=False, reason="engine starting")
        metrics.engine_up(False, engine=engine_id)

    @property
    def is_stuck(self) -> bool:
        """Whether it lives and yet does nothing."""
        return self._is_silent or self._makes_no_progress

    def tell_when_stuck(self, on_stuck: Callable[[str], None]) -> None:
        """Have ``on_stuck`` called with the reason when the engine is found stuck."""
        before = self._on_stuck

        def tell(reason: str) -> None:
            before(reason)
            on_stuck(reason)

        self._on_stuck = tell

    async def run(self) -> None:
        """Probe for ever; cancel to stop."""
        while True:
            self._in_doubt.clear()
            await self.probe()
            with suppress(TimeoutError):
                async with asyncio.timeout(self._probe_interval_s):
                    await self._in_doubt.wait()

    async def wait_ready(self) -> None:
        """Return once the engine is ready."""
        await self._ready.wait()

    def engine_exited(self, reason: str) -> None:
        """Take note at once that the engine's process is gone."""
        self._num_exits += 1
        self._gone(reason)

    def note_unreachable(self) -> None:
        """Take note that a request could not connect; the next good probe makes it ready again."""
        if self.status.is_ready:
            self._gone("the connection is refused")

    def note_broken(self) -> None:
        """Take note that a connection broke in the middle; the next good probe, at once if it lives, tells more."""
        if self.status.is_ready:
            self._set_down("a connection broke")
            self._in_doubt.set()

    def note_restarted(self) -> None:
        """Take note that it is another process than a moment ago, though no probe has missed it."""
        self.num_starts += 1
        self._makes_no_progress = False

    def note_stuck(self, reason: str) -> None:
        """Take the engine out until :meth:`note_moving` or another process."""
        self._makes_no_progress = True
        self._stuck(reason)

    def note_moving(self) -> None:
        """Take note that the engine makes progress again."""
        self._makes_no_progress = False

    async def probe(self) -> None:
        """Ask the engine once and update :attr:`status`."""
        num_exits = self._num_exits
        try:
            health = await self._http.get("/health", timeout_s=PROBE_TIMEOUT_S)
            self._answered_at_s = self._clock()
            self._is_silent = False
            if health.status != 200:
                self._set_down("the engine reports itself unhealthy")
            elif not self.status.is_ready and not self._makes_no_progress:
                models = await self._models()
                if num_exits == self._num_exits:
                    self._set_ready(models)
        except EngineTimeout:
            # a busy engine answers late (tens of seconds during a long prefill); only silence counts
            if not self.is_stuck and self._clock() - self._answered_at_s > self._stuck_after_s:
                self._is_silent = True
                self._stuck(f"no answer for more than {self._stuck_after_s:.0f} s")
        except (EngineUnavailable, EngineLost):
            self._answered_at_s = self._clock()
            self._is_silent = False
            if not self._was_gone:
                self._gone("the connection is refused")
        except (ValueError, KeyError, TypeError):
            self._set_down("its list of models cannot be read")

    async def _models(self) -> tuple[ServedModel, ...]:
        answer = await self._http.get("/v1/models", timeout_s=PROBE_TIMEOUT_S)
        models = tuple(
            ServedModel(str(entry["id"]), entry.get("max_model_len"), int(entry.get("created", 0)))
            for entry in json.loads(answer.body)["data"]
        )
        if answer.status != 200 or not models:
            raise ValueError
        return models

    def _set_ready(self, models: tuple[ServedModel, ...]) -> None:
        if self._was_gone:
            self._was_gone = False
            self.num_starts += 1
        self.status = EngineStatus(is_ready=True, reason="", models=models)
        self._ready.set()
        self._metrics.engine_up(True, engine=self._engine_id)
        logger.info(
            "engine %s ready: %s",
            self._engine_id,
            ", ".join(f"{model.name} max_model_len={model.max_model_len}" for model in models),
        )

    def _gone(self, reason: str) -> None:
        self._was_gone = True
        self._is_silent = self._makes_no_progress = False
        self._set_down(reason)

    def _stuck(self, reason: str) -> None:
        self._set_down(reason)
        self._on_stuck(reason)

    def _set_down(self, reason: str) -> None:
        if self.status.is_ready:
            logger.warning("engine %s down: %s", self._engine_id, reason)
        self.status = replace(self.status, is_ready=False, reason=reason)
        self._ready.clear()
        self._metrics.engine_up(False, engine=self._engine_id)
