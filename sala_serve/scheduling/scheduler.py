"""The scheduler: requests ask it for their turn."""

from __future__ import annotations

import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Generic

from sala_serve.errors import EngineUnavailable
from sala_serve.scheduling.salt import cache_salt
from sala_serve.scheduling.work import AnyEngine, Waiting, Work

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from sala_serve.scheduling.settings import SchedulingSettings
    from sala_serve.scheduling.work import PoolView, ProgressView, UsageView


class Turn(Generic[AnyEngine]):
    """A request that may run now; what becomes of it is reported here.

    Attributes:
        engine: where it runs.
        cache_salt: for the engine's prefix cache.
        vllm_priority: smaller is earlier.
        predicted_cached_tokens: prompt tokens that the engine should find in its prefix cache.
        must_give_way: set by :meth:`prefill_progress`: close the engine's answer, leave the block and ask for
            another turn with the same work; what was computed is kept.
    """

    def __init__(self, engine: AnyEngine, salt: str) -> None:
        self.engine = engine
        self.cache_salt = salt
        self.vllm_priority = 0
        self.predicted_cached_tokens = 0
        self.must_give_way = False

    def prefill_progress(self, progress: ProgressView) -> None:
        """Report how far the engine is; call it for each look, also while answers are generated."""

    def first_token(self) -> None:
        """Report that the prompt is computed."""

    def finished(self, usage: UsageView | None) -> None:
        """Report the end of the answer; None: the engine has not said what it took."""


class Scheduler(Generic[AnyEngine]):
    """Decides which request goes to which engine, and when."""

    def __init__(
        self,
        pool: PoolView[AnyEngine],
        settings: SchedulingSettings,
        *,
        secret: bytes,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._pool = pool
        self._settings = settings
        self._secret = secret
        self._clock = clock

    @asynccontextmanager
    async def turn(
        self, work: Work, on_wait: Callable[[Waiting], None]
    ) -> AsyncIterator[Turn[AnyEngine]]:
        """Wait for the turn of ``work``; it lasts as long as the block.

        Args:
            work: the request.
            on_wait: called at once and then every second while it waits.

        Raises:
            QueueFull: too much waits.
            QueueTimeout: its turn did not come by its deadline.
            PromptDoesNotFit: no engine of its model could ever hold it.
            EngineUnavailable: no engine serves its model.
        """
        engines = self._pool.ready(work.model)
        if not engines:
            raise EngineUnavailable("The engine is not ready.")
        yield Turn(engines[0], cache_salt(self._secret, work.tenant_id))

    def forecast(self, work: Work) -> Waiting:
        """Return what ``work`` would be told if it came now."""
        return Waiting(1, 0, 0, 0.0, work.prompt.num_tokens / self._settings.prefill_tokens_per_s)
