"""What the page shows, as plain values; ``overview.py`` fills them, the template lays them out."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Bar:
    """Something used of something there is."""

    label: str
    used: int
    limit: int | None
    """None: no end is known."""


@dataclass(frozen=True)
class KeyRow:
    """One key; never its secret."""

    key_id: str
    state: str
    """``active``, or why it is not."""
    can_revoke: bool


@dataclass(frozen=True)
class TenantRow:
    """One tenant and how much of its limits is used."""

    tenant_id: str
    name: str
    tier: str
    is_active: bool
    num_queued: int = 0
    queued_tokens: int = 0
    num_running: int = 0
    limits: tuple[Bar, ...] = ()
    keys: tuple[KeyRow, ...] = ()


@dataclass(frozen=True)
class EngineRow:
    """One engine's page of the ledger, in tokens."""

    engine_id: str
    state: str
    """``ready``, ``stuck``, or why it is not ready."""
    num_prefilling: int = 0
    num_decoding: int = 0
    prefill_left_tokens: int = 0
    memory: Bar = field(default_factory=lambda: Bar("memory", 0, None))
    prefill_tokens_per_s: float | None = None


@dataclass(frozen=True)
class RequestRow:
    """One request that is admitted and not over."""

    request_id: str
    tenant_id: str
    endpoint: str
    phase: str
    age_s: float
    tier: str = ""
    engine_id: str = ""
    num_prompt_tokens: int | None = None
    place: int | None = None
    """In the queue; None once it runs."""
    ahead_tokens: int | None = None
    expected_s: float | None = None
    """To its start while it is queued, to its first token while it prefills."""
    done_tokens: int | None = None
    """Of the prompt, while it prefills."""
    cached_tokens: int | None = None


@dataclass(frozen=True)
class Overview:
    """The whole page."""

    engines: tuple[EngineRow, ...] = ()
    requests: tuple[RequestRow, ...] = ()
    tenants: tuple[TenantRow, ...] | None = ()
    """None: the shared state is away."""
    jobs: tuple[tuple[str, str, int], ...] = ()
    """Kind, status, number."""
    queued_tokens: int = 0
    expected_drain_s: float | None = None
    service_gap_tokens: float = 0.0
    service_gap_bound_tokens: float = 0.0
    is_draining: bool = False

    @property
    def queued(self) -> list[RequestRow]:
        """Requests in the queue, the next one first."""
        waiting = [row for row in self.requests if row.phase == "queue"]
        return sorted(waiting, key=lambda row: row.place or 0)

    @property
    def running(self) -> list[RequestRow]:
        """All others, the oldest first."""
        others = [row for row in self.requests if row.phase != "queue"]
        return sorted(others, key=lambda row: -row.age_s)
