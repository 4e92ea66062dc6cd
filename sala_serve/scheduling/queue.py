"""The fair queue: what waits, of whom, and in which order it is looked at.

Between tenants the lowest account is first (:mod:`sala_serve.scheduling.shares`); of those within the lead of it,
the most urgent request. Within a tenant the most urgent is first, too. Urgency is slack relative to
length, as in LARS: with a deadline that is proportional to a prompt's own prefill time, the least relative slack
is the greatest ratio of time waited to prefill time. A 500-token question becomes urgent 2,000 times faster
than a million-token prompt, which nevertheless gets ahead of all that has waited less in proportion. And after
``overdue_s`` and ``overdue_prefills`` times its own prefill it is ahead of everything younger.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sala_serve.errors import QueueFull, wait_headers
from sala_serve.scheduling.shares import Account, Shares

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sala_serve.scheduling.ledger import Job
    from sala_serve.scheduling.settings import SchedulingSettings
    from sala_serve.scheduling.work import Waiting

ORDER_S = 0.5
"""For which an order by urgency is good."""
MIN_LENGTH_TOKENS = 512
"""Shorter prompts are as urgent as ones of this length: what they cost is not their prefill."""


@dataclass(eq=False)
class Tenant:
    """One tenant's requests."""

    tenant_id: str
    account: Account
    waiting: list[Job] = field(default_factory=list)
    """By urgency, as it was a moment ago."""
    running: list[Job] = field(default_factory=list)
    queued_tokens: int = 0
    """Prompt tokens that wait."""
    ordered_at_s: float = float("-inf")


class FairQueue:
    """Requests by tenant."""

    def __init__(self, settings: SchedulingSettings) -> None:
        self._settings = settings
        self.shares = Shares()
        self.tenants: dict[str, Tenant] = {}
        """With something waiting or running."""
        self.num_queued = 0
        self.queued_tokens = 0
        """Prompt tokens that wait, of all tenants."""
        self.num_refused = 0

    def check_room(self, job: Job, forecast: Callable[[Job], Waiting]) -> None:
        """Refuse a request that has just been added, if it takes the room of others.

        A tenant may have as much waiting as is left free besides. So one alone fills half of the queue, two a third
        each, and there is always room for another.

        Raises:
            QueueFull: with headers that say how long it would have taken.
        """
        settings, tenant = self._settings, self.tenants[job.work.tenant_id]
        own_tokens, num_own = tenant.queued_tokens, len(tenant.waiting)
        num_before, tokens_before = (
            self.num_queued - 1,
            self.queued_tokens - job.work.prompt.num_tokens,
        )
        if (
            num_own <= settings.max_queued_requests - num_before
            and own_tokens <= settings.max_queued_tokens - tokens_before
        ):
            return
        self.num_refused += 1
        told = forecast(job)
        raise QueueFull(
            f"Too much work waits: {num_before} requests with {tokens_before} prompt tokens; with this one, "
            f"{num_own} with {own_tokens} would be yours.",
            headers=wait_headers(told.expected_start_s, place=told.place),
        )

    def add(self, job: Job, now_s: float) -> bool:
        """Let a request wait; returns whether its tenant has just begun to."""
        work = job.work
        tenant = self.tenants.get(work.tenant_id)
        if tenant is None:
            account = self.shares.account(work.tenant_id, work.tier.weight)
            tenant = self.tenants[work.tenant_id] = Tenant(work.tenant_id, account)
        tenant.account.weight = work.tier.weight
        insort(tenant.waiting, job, key=lambda each: self.urgency(each, now_s))
        self.num_queued += 1
        tenant.queued_tokens += work.prompt.num_tokens
        self.queued_tokens += work.prompt.num_tokens
        return self.update(tenant)

    def start(self, job: Job) -> None:
        """Note that a waiting request runs."""
        tenant = self.tenants[job.work.tenant_id]
        self._remove_waiting(tenant, job)
        tenant.running.append(job)

    def remove(self, job: Job) -> None:
        """Forget a request, in whatever state it is."""
        tenant = self.tenants[job.work.tenant_id]
        if job in tenant.running:
            tenant.running.remove(job)
        else:
            self._remove_waiting(tenant, job)
        self.update(tenant)
        if not tenant.waiting and not tenant.running:
            del self.tenants[tenant.tenant_id]
            self.shares.forget_settled(set(self.tenants))

    def update(self, tenant: Tenant) -> bool:
        """Note whether the tenant is backlogged; returns whether it has just begun to be."""
        piece = self._settings.piece_tokens
        is_backlogged = bool(tenant.waiting) or any(
            job.left_tokens > piece for job in tenant.running
        )
        return self.shares.set_backlogged(tenant.account, is_backlogged)

    def by_account(self) -> list[Tenant]:
        """Return the tenants with something waiting, the lowest account first."""
        waiting = [tenant for tenant in self.tenants.values() if tenant.waiting]
        return sorted(waiting, key=lambda tenant: tenant.account.work)

    def by_urgency(self, tenant: Tenant, now_s: float) -> list[Job]:
        """Return a tenant's waiting requests, the most urgent first."""
        if now_s - tenant.ordered_at_s > ORDER_S:
            tenant.waiting.sort(key=lambda job: self.urgency(job, now_s))
            tenant.ordered_at_s = now_s
        return tenant.waiting

    def by_arrival(self) -> list[Job]:
        """Return all waiting requests, the oldest first."""
        return sorted(self.waiting(), key=lambda job: job.work.arrived_at_s)

    def oldest(self) -> Job:
        """Return the one that waits longest."""
        return min(self.waiting(), key=lambda job: job.work.arrived_at_s)

    def waiting(self) -> Iterator[Job]:
        """Yield all waiting requests."""
        for tenant in self.tenants.values():
            yield from tenant.waiting

    def is_overdue(self, job: Job, now_s: float) -> bool:
        """Tell whether a request has waited too long to be overtaken."""
        settings = self._settings
        prefill_s = job.uncached_tokens / settings.prefill_tokens_per_s
        limit_s = settings.overdue_s + settings.overdue_prefills * prefill_s
        return now_s - job.work.arrived_at_s > limit_s

    def urgency(self, job: Job, now_s: float) -> tuple[float, float]:
        """Return a sort key; the most urgent has the smallest."""
        arrived_at_s = job.work.arrived_at_s
        if self.is_overdue(job, now_s):
            return 0.0, arrived_at_s
        ratio = (now_s - arrived_at_s) / max(job.uncached_tokens, MIN_LENGTH_TOKENS)
        # equally urgent, as in the instant of arrival: the shorter first
        return 1.0 / (1.0 + ratio), float(job.uncached_tokens)

    def _remove_waiting(self, tenant: Tenant, job: Job) -> None:
        tenant.waiting.remove(job)
        self.num_queued -= 1
        tenant.queued_tokens -= job.work.prompt.num_tokens
        self.queued_tokens -= job.work.prompt.num_tokens
