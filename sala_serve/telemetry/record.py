"""What is known about one request while it runs; the access log and the metrics are written from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from starlette.types import Scope

    from sala_serve.telemetry.metrics import Usage

_SCOPE_KEY = "sala_serve.record"


@dataclass
class RequestRecord:
    """One request: who, where, how it ended. Holds nothing of the prompt or the answer."""

    request_id: str
    endpoint: str
    """The route's path, or "other"; bounded, because it labels metrics."""
    started_at_s: float
    """Monotonic."""
    status: int | None = None
    """Outcome: the HTTP status, unless the answer failed after its first byte."""
    error_code: str | None = None
    ttft_s: float | None = None
    usage: Usage | None = None

    def attach(self, scope: Scope) -> None:
        """Make this the record of ``scope``'s request."""
        scope[_SCOPE_KEY] = self

    @classmethod
    def of(cls, scope: Scope) -> RequestRecord:
        """Return the record that the access middleware attached."""
        record = scope[_SCOPE_KEY]
        assert isinstance(record, cls)
        return record
