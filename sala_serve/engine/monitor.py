"""Is the engine ready, and which models does it serve? Asked again and again while the gateway runs."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import httpx

from sala_serve.errors import EngineUnavailable, ModelNotFound

if TYPE_CHECKING:
    from collections.abc import Callable

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
        client: httpx.AsyncClient,
        *,
        metrics: Metrics,
        probe_interval_s: float,
        stuck_after_s: float,
        clock: Callable[[], float],
    ) -> None:
        self._client = client
        self._metrics = metrics
        self._probe_interval_s = probe_interval_s
        self._stuck_after_s = stuck_after_s
        self._clock = clock
        self._answered_at_s = clock()
        self._num_exits = 0
        self._ready = asyncio.Event()
        self.status = EngineStatus(is_ready=False, reason="engine starting")
        metrics.engine_up(False)

    async def run(self) -> None:
        """Probe for ever; cancel to stop."""
        while True:
            await self.probe()
            await asyncio.sleep(self._probe_interval_s)

    async def wait_ready(self) -> None:
        """Return once the engine is ready."""
        await self._ready.wait()

    def engine_exited(self, reason: str) -> None:
        """Take note at once that the engine's process is gone."""
        self._num_exits += 1
        self._set_down(reason)

    def require_ready(self) -> None:
        """Raise :class:`EngineUnavailable` unless the engine is ready."""
        if not self.status.is_ready:
            raise EngineUnavailable(f"The engine is not ready: {self.status.reason}.")

    def require_known(self) -> None:
        """Raise :class:`EngineUnavailable` if the engine has never told its models."""
        if not self.status.models:
            self.require_ready()

    def require_model(self, name: str) -> ServedModel:
        """Return the model ``name``, or raise :class:`ModelNotFound` if the engine has no such model."""
        for model in self.status.models:
            if model.name == name:
                return model
        raise ModelNotFound(
            f"The model '{name[:100]}' does not exist; /v1/models lists those served.",
            param="model",
        )

    async def probe(self) -> None:
        """Ask the engine once and update :attr:`status`."""
        num_exits = self._num_exits
        try:
            health = await self._client.get("/health", timeout=PROBE_TIMEOUT_S)
            self._answered_at_s = self._clock()
            if health.status_code != 200:
                self._set_down("the engine reports itself unhealthy")
            elif not self.status.is_ready:
                models = await self._models()
                if num_exits == self._num_exits:
                    self._set_ready(models)
        except httpx.TimeoutException:
            # a busy engine answers late (tens of seconds during a long prefill); only silence counts
            if self._clock() - self._answered_at_s > self._stuck_after_s:
                self._set_down(f"no answer for more than {self._stuck_after_s:.0f} s")
        except httpx.HTTPError:
            if self.status.is_ready:
                self._set_down("the connection is refused")
        except (ValueError, KeyError, TypeError):
            self._set_down("its list of models cannot be read")

    async def _models(self) -> tuple[ServedModel, ...]:
        response = await self._client.get("/v1/models", timeout=PROBE_TIMEOUT_S)
        models = tuple(
            ServedModel(str(entry["id"]), entry.get("max_model_len"), int(entry.get("created", 0)))
            for entry in response.raise_for_status().json()["data"]
        )
        if not models:
            raise ValueError
        return models

    def _set_ready(self, models: tuple[ServedModel, ...]) -> None:
        self.status = EngineStatus(is_ready=True, reason="", models=models)
        self._ready.set()
        self._metrics.engine_up(True)
        logger.info(
            "engine ready: %s",
            ", ".join(f"{model.name} max_model_len={model.max_model_len}" for model in models),
        )

    def _set_down(self, reason: str) -> None:
        if self.status.is_ready:
            logger.warning("engine down: %s", reason)
        self.status = replace(self.status, is_ready=False, reason=reason)
        self._ready.clear()
        self._metrics.engine_up(False)
