"""What a job is: its identity, its states, what is kept of it."""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping

Lane = Literal["response", "batch"]
"""Which workers run a job; also which kind of object it is."""


class Status(StrEnum):
    """The life of a job. The last five are final: nothing changes a job that is in one of them."""

    QUEUED = "queued"
    RUNNING = "in_progress"
    COMPLETED = "completed"
    INCOMPLETE = "incomplete"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"

    @property
    def is_final(self) -> bool:
        """Whether the job is over."""
        return self not in (Status.QUEUED, Status.RUNNING)


def new_id(prefix: str) -> str:
    """Return an identity that cannot be guessed: 192 random bits after ``prefix``."""
    return prefix + secrets.token_hex(24)


@dataclass(frozen=True)
class Job:
    """A stored job as it was when it was read."""

    job_id: str
    lane: Lane
    tenant_id: str
    status: Status
    created_unix_s: float
    attempt: int
    """Starts so far; 0 before the first."""
    document: Mapping[str, Any]
    """The object that its owner sees; the last version that was committed."""
    progress: Mapping[str, Any]
    """Where a job that is not over stands: queue place, tokens read; empty when nothing is known."""
    has_events: bool = False
    """Whether its events are stored, so that a stream of them can be resumed."""
    cancel_asked_unix_s: float | None = None
    """When its owner asked its worker to end it."""
    counts: Mapping[str, int] = field(default_factory=dict)
    """What its worker has counted: lines of a batch, their tokens."""


@dataclass(frozen=True)
class Lease:
    """The right to run a job, until another worker takes it over. ``token`` fences every write."""

    job_id: str
    lane: Lane
    tenant_id: str
    token: int
    attempt: int
    """From 1."""
    age_s: float
    """Since it was asked for, by Redis' clock."""
    last_sequence_number: int
    """Of the events stored by earlier attempts; -1: none."""
    spec: Mapping[str, Any] = field(repr=False)
    """What :meth:`JobStore.submit` was given."""


@dataclass(frozen=True)
class Event:
    """One stored event of a job's output."""

    sequence_number: int
    """From 0, without gaps."""
    body: bytes
    """JSON object without its sequence number."""

    def sse(self) -> bytes:
        """Return the event as a client of a stream gets it."""
        kind: str = json.loads(self.body)["type"]
        numbered = b'{"sequence_number":%d,' % self.sequence_number + self.body[1:]
        return b"event: " + kind.encode() + b"\ndata: " + numbered + b"\n\n"


def dump(document: Any) -> bytes:
    """Return ``document`` as compact JSON."""
    text: str = json.dumps(document, ensure_ascii=False, separators=(",", ":"))
    return text.encode()
