"""One request from arrival to end: who asked, which phases it went through, how it ended."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

from sala_serve.telemetry.tracing import NO_TRACE

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.types import Scope

    from sala_serve.telemetry.tracing import RequestTrace

PROBES = frozenset({"/healthz", "/readyz", "/metrics"})
"""Endpoints that are polled every few seconds."""
_SCOPE_KEY = "sala_serve.record"


class Phase(StrEnum):
    """What a request waits for, in this order; a retry goes back to ``QUEUE``."""

    RECEIVE = "receive"
    """The body arrives and is parsed."""
    COUNT = "count"
    """Its tokens are counted and reserved."""
    QUEUE = "queue"
    """It waits for its turn."""
    PREFILL = "prefill"
    """The engine has it and has sent no token."""
    DECODE = "decode"
    """From the first token to the last."""
    SETTLE = "settle"
    """Its usage is written to the tenant's account."""


@dataclass(frozen=True)
class Usage:
    """Token counts of one answer, as the engine reports them."""

    num_prompt_tokens: int
    num_cached_tokens: int
    num_completion_tokens: int


@dataclass
class RequestRecord:
    """One request. Holds nothing of the prompt, the answer or the key."""

    request_id: str
    endpoint: str
    """The route's path, or "other"; bounded, because it labels metrics."""
    started_at_s: float
    """Monotonic."""
    clock: Callable[[], float] = field(default=time.monotonic, repr=False)
    """Monotonic seconds, the clock of ``started_at_s``."""
    trace: RequestTrace = field(default=NO_TRACE, repr=False)
    status: int | None = None
    """Outcome: the HTTP status, unless the answer failed after its first byte."""
    error_code: str | None = None
    ttft_s: float | None = None
    usage: Usage | None = None
    tenant_id: str | None = None
    """None until the key is known."""
    key_id: str | None = None
    """The public part of the key."""
    tier: str | None = None
    engine_id: str | None = None
    num_prompt_tokens: int | None = None
    """As counted by the gateway, known before the engine has answered."""
    note: object | None = field(default=None, repr=False)
    """What was last said about its waiting or its prefill, for the admin page; its sort is the generation's."""
    phase: Phase | None = None
    phases_s: dict[Phase, float] = field(default_factory=dict)
    """Seconds spent in each phase that is over; of phases entered twice, the sum."""
    _entered_at_s: float = field(default=0.0, repr=False)
    _token_at_s: float | None = field(default=None, repr=False)

    def attach(self, scope: Scope) -> None:
        """Make this the record of ``scope``'s request."""
        scope[_SCOPE_KEY] = self

    @classmethod
    def of(cls, scope: Scope) -> RequestRecord:
        """Return the record that :class:`~sala_serve.middleware.RecordMiddleware` attached."""
        record = scope[_SCOPE_KEY]
        assert isinstance(record, cls)
        return record

    def enter(self, phase: Phase) -> None:
        """Begin ``phase``; the one before is over. Entering the phase it is in changes nothing."""
        if phase is self.phase:
            return
        self._leave()
        self.phase, self._entered_at_s = phase, self.clock()
        self.trace.enter(phase)

    def token(self) -> float | None:
        """Note that tokens arrive now; the first time ends the prefill and sets ``ttft_s``.

        Returns:
            Seconds since the last call, for :meth:`Metrics.token_gap`; None the first time.
        """
        now_s, last_at_s = self.clock(), self._token_at_s
        self._token_at_s = now_s
        if last_at_s is not None:
            return now_s - last_at_s
        self.ttft_s = now_s - self.started_at_s
        self.enter(Phase.DECODE)
        return None

    def finish(self) -> float:
        """End the last phase and the trace; return the request's seconds. Called once, by who began it."""
        self._leave()
        self.trace.finish(self)
        return self.clock() - self.started_at_s

    def _leave(self) -> None:
        if self.phase is not None:
            spent_s = self.clock() - self._entered_at_s
            self.phases_s[self.phase] = self.phases_s.get(self.phase, 0.0) + spent_s
            self.phase = None
