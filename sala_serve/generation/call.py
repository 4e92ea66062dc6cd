"""What a generation is asked for, and what it tells while it lives."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from sala_serve.scheduling.work import Waiting

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from sala_serve.bodies import Generation
    from sala_serve.running import RunningRequest
    from sala_serve.telemetry import RequestRecord
    from sala_serve.tenants.model import Principal

Path = Literal["/v1/chat/completions", "/v1/completions"]
PROMPT_FIELDS: Mapping[Path, str] = {
    "/v1/chat/completions": "messages",
    "/v1/completions": "prompt",
}


@dataclass(frozen=True)
class Deadlines:
    """How long each phase may take, in seconds; ``None`` is without end."""

    queue_s: float | None
    """From the call to the start on an engine."""
    first_token_s: float | None
    """From the start on an engine to the first token."""
    between_tokens_s: float | None
    """Between two tokens of a stream."""
    total_s: float | None
    """From the call to its end."""

    def shortened(self, total_s: float) -> Deadlines:
        """Return these deadlines, none of them later than ``total_s``."""
        return Deadlines(
            *(
                total_s if each is None else min(each, total_s)
                for each in (self.queue_s, self.first_token_s, self.between_tokens_s, self.total_s)
            )
        )


@dataclass(frozen=True)
class Call:
    """One generation to run, whoever asks: a client that streams or waits, a job, a line of a batch."""

    principal: Principal
    path: Path
    generation: Generation
    request_id: str
    """Of the record and the logs; the engine gets it with a suffix, since clients may repeat theirs."""
    record: RequestRecord = field(repr=False)
    """Kept up to date while the call runs; reported by whoever made it."""
    deadlines: Deadlines
    trace_headers: Mapping[str, str] = field(default_factory=dict)
    """``traceparent`` and ``tracestate`` for the engine."""
    tier: str | None = None
    """Service tier; ``None``: the body's ``service_tier`` if the key may use it, else the tenant's."""
    is_charged_when_cut: Callable[[], bool] = lambda: True
    """Asked when it is broken off from outside: whether that was its owner, who pays for what was computed."""
    scope: RunningRequest | None = field(default=None, repr=False)
    """Cuts it from outside; ``None``: it ends early only by being closed."""


@dataclass(frozen=True)
class Reserved:
    """The tenant's limits allow it."""

    headers: Mapping[str, str]
    """``x-ratelimit-*`` for the client."""


@dataclass(frozen=True)
class Quiet:
    """Nothing new for a while: the prompt is being counted, or the next token takes long."""

    phase: Literal["counting", "decoding"]


@dataclass(frozen=True)
class Prefilling:
    """The engine has the request and has sent no token yet."""

    done_tokens: int | None
    """Prompt tokens computed or found in the cache; ``None`` if the engine does not tell."""
    total_tokens: int
    cached_tokens: int | None
    expected_first_token_s: float | None
    """Seconds from now."""


@dataclass(frozen=True)
class Chunk:
    """One event of a streamed answer."""

    event: bytes
    """As the client gets it, with its closing blank line."""
    document: dict[str, Any]


@dataclass(frozen=True)
class Whole:
    """An answer that is not streamed."""

    body: bytes
    document: dict[str, Any]


Update = Reserved | Quiet | Waiting | Prefilling | Chunk | Whole
