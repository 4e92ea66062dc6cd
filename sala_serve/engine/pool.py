"""The engines of one gateway: which there are, which can take work, how far their requests have got."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from sala_serve.engine.http import HttpEngine
from sala_serve.engine.monitor import EngineMonitor
from sala_serve.engine.watch import EngineWatch
from sala_serve.errors import EngineStuck, EngineUnavailable, ModelNotFound

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from sala_serve.engine.monitor import EngineStatus, ServedModel
    from sala_serve.engine.progress import EngineProgress, RequestProgress
    from sala_serve.engine.settings import EngineSettings
    from sala_serve.telemetry import Metrics


@dataclass(frozen=True)
class EngineFacts:
    """What an engine can hold; None: not known (yet)."""

    max_model_len: int | None = None
    """Tokens of prompt and answer of one request."""
    kv_capacity_tokens: int | None = None
    """Tokens of all requests together."""
    max_num_seqs: int | None = None
    """Requests that it computes at the same time."""


class Engine:
    """One vLLM server."""

    def __init__(
        self,
        engine_id: str,
        settings: EngineSettings,
        *,
        metrics: Metrics,
        clock: Callable[[], float],
    ) -> None:
        self.engine_id = engine_id
        self.url = settings.url
        self.client = HttpEngine(settings)
        self.monitor = EngineMonitor(
            self.client,
            engine_id=engine_id,
            metrics=metrics,
            probe_interval_s=settings.probe_interval_s,
            stuck_after_s=settings.stuck_after_s,
            clock=clock,
        )
        self._watch = EngineWatch(
            self.client,
            self.monitor,
            engine_id=engine_id,
            metrics=metrics,
            stuck_after_s=settings.stuck_after_s,
            clock=clock,
        )
        self.monitor.tell_when_stuck(self._lose_requests)

    @property
    def status(self) -> EngineStatus:
        """Whether it can take work, and its models."""
        return self.monitor.status

    @property
    def is_stuck(self) -> bool:
        """Whether it lives and yet does nothing; then it is not ready either."""
        return self.monitor.is_stuck

    @property
    def num_starts(self) -> int:
        """Times that it has become ready as another process than before: 1 after the first."""
        return self.monitor.num_starts

    @property
    def facts(self) -> EngineFacts:
        """What it can hold."""
        lengths = [m.max_model_len for m in self.status.models if m.max_model_len is not None]
        return EngineFacts(
            max_model_len=max(lengths, default=None),
            kv_capacity_tokens=self.look.kv_capacity_tokens,
            max_num_seqs=self.look.max_num_seqs,
        )

    @property
    def look(self) -> EngineProgress:
        """The last look inside."""
        return self._watch.look

    @property
    def progress(self) -> Mapping[str, RequestProgress]:
        """How far its requests have got, by the ``X-Request-Id`` they were sent with.

        Empty for an engine without ``/sala/progress``.
        """
        return self.look.requests

    @property
    def kv_used_tokens(self) -> int | None:
        """Tokens that its memory holds for requests; None if it does not say."""
        return self.look.kv_used_tokens

    def note_unreachable(self) -> None:
        """Take it out until the next good probe; for who could not connect."""
        self.monitor.note_unreachable()

    def note_broken(self) -> None:
        """Take it out until the next good probe; for whose connection broke, lest others follow."""
        self.monitor.note_broken()

    async def run(self) -> None:
        """Watch the engine; cancel to stop."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self.monitor.run())
            group.create_task(self._watch.run())

    def _lose_requests(self, _reason: str) -> None:
        self.client.cut_all(EngineStuck("The engine stopped making progress; the answer is lost."))


class EnginePool:
    """All engines; they stay the same while the gateway runs."""

    def __init__(self, engines: Sequence[Engine]) -> None:
        self.engines: Mapping[str, Engine] = {engine.engine_id: engine for engine in engines}

    @classmethod
    def create(
        cls,
        settings: Sequence[EngineSettings],
        *,
        metrics: Metrics,
        clock: Callable[[], float],
    ) -> EnginePool:
        """Make the engines; nothing is connected yet.

        Raises:
            ValueError: two engines have the same id.
        """
        ids = [each.engine_id or urlsplit(each.url).netloc for each in settings]
        if repeated := {each for each in ids if ids.count(each) > 1}:
            raise ValueError(f"expected a different engine_id for each engine, got {repeated}")
        return cls(
            [
                Engine(engine_id, each, metrics=metrics, clock=clock)
                for engine_id, each in zip(ids, settings, strict=True)
            ]
        )

    def ready(self, model: str | None = None) -> list[Engine]:
        """Return the engines that can take work, of those that serve ``model`` if given."""
        return [
            engine
            for engine in self.engines.values()
            if engine.status.is_ready
            and (model is None or any(each.name == model for each in engine.status.models))
        ]

    def models(self) -> list[ServedModel]:
        """Return the models that the engines serve, also while they are down; the first of each name."""
        served = [model for engine in self.engines.values() for model in engine.status.models]
        return list({model.name: model for model in reversed(served)}.values())[::-1]

    def require_model(self, name: str) -> ServedModel:
        """Return the model ``name``.

        Raises:
            EngineUnavailable: no engine has ever told its models.
            ModelNotFound: no engine serves that model.
        """
        models = self.models()
        if not models:
            self.require_ready()
        for model in models:
            if model.name == name:
                return model
        raise ModelNotFound(
            f"The model '{name[:100]}' does not exist; /v1/models lists those served.",
            param="model",
        )

    def require_ready(self) -> None:
        """Raise :class:`EngineUnavailable` unless some engine can take work."""
        if not self.ready():
            reasons = {engine.status.reason for engine in self.engines.values()}
            raise EngineUnavailable(f"The engine is not ready: {'; '.join(sorted(reasons))}.")

    async def wait_ready(self) -> None:
        """Return once some engine can take work."""
        waiting = [
            asyncio.ensure_future(engine.monitor.wait_ready()) for engine in self.engines.values()
        ]
        try:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for each in waiting:
                each.cancel()

    async def run(self) -> None:
        """Watch all engines; cancel to stop."""
        async with asyncio.TaskGroup() as group:
            for engine in self.engines.values():
                group.create_task(engine.run())
