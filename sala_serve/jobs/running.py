"""The seam to generation: what a job asks of the engine, and what it hears while it runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Mapping

    from sala_serve.tenants.model import Principal

Path = Literal["/v1/chat/completions", "/v1/completions"]


@dataclass(frozen=True)
class EngineRequest:
    """One generation that a job or a stored response needs; always streamed by the engine."""

    principal: Principal
    path: Path
    document: Mapping[str, Any] = field(repr=False)
    """The body for the engine, as a client would send it."""
    request_id: str
    lane: Literal["interactive", "background", "batch"] = "interactive"
    trace_headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Progress:
    """Where a generation stands before its first token; what is not known is ``None``."""

    phase: Literal["queued", "prefill"]
    place: int | None = None
    """In the queue, from 1."""
    ahead_tokens: int | None = None
    expected_start_s: float | None = None
    expected_first_token_s: float | None = None
    """Both in seconds from now."""
    done_tokens: int | None = None
    total_tokens: int | None = None
    cached_tokens: int | None = None

    def fields(self) -> dict[str, Any]:
        """Return what is known, for a client."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def comment(self) -> bytes:
        """Return it as a line of a stream that every client ignores."""
        rest = " ".join(
            f"{name}={value:.0f}" for name, value in self.fields().items() if name != "phase"
        )
        return f": {self.phase} {rest}\n\n".encode()


class Generate(Protocol):
    """Runs one generation; closing the generator early stops the engine.

    Yields progress and then each chunk of the engine's stream as its JSON object, the last one with
    ``usage``. Raises :class:`~sala_serve.errors.GatewayError`.
    """

    def __call__(self, request: EngineRequest) -> AsyncGenerator[Progress | Mapping[str, Any]]:
        """Start a generation."""
