"""The seam to generation: what a job asks of the engine, and what it hears while it runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from sala_serve.generation.call import Reserved

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Mapping

    from sala_serve.bodies import Generation
    from sala_serve.generation.call import Deadlines, Path
    from sala_serve.telemetry import RequestRecord
    from sala_serve.tenants.model import Principal


@dataclass(frozen=True)
class EngineRequest:
    """One generation that a job or a stored response needs."""

    principal: Principal
    path: Path
    document: Mapping[str, Any] = field(repr=False)
    """The body for the engine, as a client would send it; ``stream`` decides what is heard."""
    request_id: str
    endpoint: str = "/v1/responses"
    """For the record: what the client asked for."""
    is_batch: bool = False
    trace_headers: Mapping[str, str] = field(default_factory=dict)
    record: RequestRecord | None = None
    """Of the request that waits for the answer; ``None``: nobody waits, so a record of its own is made."""
    deadlines: Deadlines | None = None
    """Of the client that waits; ``None``: nobody waits."""
    generation: Generation | None = field(default=None, repr=False)
    """``document``, checked and written for the engine; ``None``: not yet."""
    is_charged_when_cut: Callable[[], bool] = lambda: True
    """Asked when it is broken off: whether that was its owner, who pays for what was computed."""


@dataclass(frozen=True)
class Progress:
    """Where a generation stands while it has nothing to say; what is not known is ``None``."""

    phase: Literal["counting", "queued", "prefill", "decoding"]
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


Piece = Progress | Reserved | dict[str, Any]


class Engines(Protocol):
    """Runs generations for jobs."""

    def check(self, request: EngineRequest) -> EngineRequest:
        """Return ``request`` ready to run. Called in a thread: a body has megabytes.

        Raises:
            RequestError: what :meth:`run` would start with, as far as that is known already.
        """

    def run(self, request: EngineRequest) -> AsyncGenerator[Piece]:
        """Run one generation; closing the generator early stops the engine.

        Yields progress, once the headers of its reservation, and each chunk of a stream (the last one has
        ``usage``) or the one whole answer.
        Raises :class:`~sala_serve.errors.GatewayError`.
        """

    async def current(self, principal: Principal) -> Principal:
        """Return what the key of a job may do now; raises PermissionDenied if it no longer works."""

    async def count_tokens(self, principal: Principal, document: Mapping[str, Any]) -> int:
        """Return how many prompt tokens a chat has; raises GatewayError."""
