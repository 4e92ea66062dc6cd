"""Which engine a request goes to: the one where its first token is expected earliest.

That weighs a prefix that an engine holds against the work it already has, both in seconds, so that a long prefix
decides and a short one, a shared system prompt say, does not draw everything to one engine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sala_serve.scheduling.ledger import Blocked

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sala_serve.scheduling.ledger import EngineLedger, Job
    from sala_serve.scheduling.shares import Account


@dataclass(frozen=True)
class Placement:
    """Where a request belongs."""

    ledger: EngineLedger
    cached_tokens: int
    """Prompt tokens that the engine should find in its prefix cache."""
    expected_s: float
    """From now to the first token."""
    blocked: Blocked | None
    """Why it cannot start there now."""


@dataclass(frozen=True)
class Reservation:
    """Memory that is kept free for a request which many others would otherwise overtake."""

    ledger: EngineLedger
    job: Job


def place(
    job: Job,
    account: Account,
    ledgers: Sequence[EngineLedger],
    *,
    pinned_id: str | None = None,
    reservation: Reservation | None = None,
) -> Placement | None:
    """Return where ``job`` belongs; None if there is no engine.

    Args:
        job: a waiting one.
        account: its tenant's.
        ledgers: of the engines that are ready.
        pinned_id: of the engine that the requests with its ``prompt_cache_key`` went to. It is taken unless
            waiting for it costs more than computing the prompt elsewhere.
        reservation: for another request.
    """
    options = [_option(job, account, ledger, reservation) for ledger in ledgers]
    if not options:
        return None
    best = min(
        options, key=lambda o: (o.expected_s, o.ledger.num_running(), o.ledger.engine.engine_id)
    )
    for option in options:
        if option.ledger.engine.engine_id == pinned_id:
            elsewhere_s = job.work.prompt.num_tokens / _tokens_per_s(best, job)
            if option.expected_s <= best.expected_s + elsewhere_s:
                return option
    return best


def _option(
    job: Job, account: Account, ledger: EngineLedger, reservation: Reservation | None
) -> Placement:
    num_tokens = job.work.prompt.num_tokens
    cached = ledger.prefixes.cached_tokens(job.chain, num_tokens)
    uncached = num_tokens - cached
    reserved_for = reservation.job if reservation and reservation.ledger is ledger else None
    blocked = ledger.blocked(job, account, uncached, reserved_for)
    if uncached > ledger.settings.long_prompt_tokens:
        ahead_s = ledger.long_left_tokens() / ledger.long_rate.tokens_per_s
    else:
        ahead_s = ledger.short_left_tokens() / ledger.short_rate.tokens_per_s
    if blocked in (Blocked.SLOTS, Blocked.MEMORY):
        ahead_s = max(ahead_s, ledger.next_end_s())
    expected_s = ahead_s + uncached / ledger.rate(uncached).tokens_per_s
    return Placement(ledger, cached, expected_s, blocked)


def _tokens_per_s(option: Placement, job: Job) -> float:
    return option.ledger.rate(job.work.prompt.num_tokens).tokens_per_s
