"""The decisions: which waiting request starts next, where, and when a long prefill makes room for another tenant's."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from sala_serve.scheduling.ledger import Blocked, EngineLedger, Job
from sala_serve.scheduling.prefixes import Pins
from sala_serve.scheduling.routing import Placement, Reservation, place

if TYPE_CHECKING:
    from collections.abc import Callable

    from sala_serve.scheduling.queue import FairQueue, Tenant
    from sala_serve.scheduling.settings import SchedulingSettings

MAX_PASSED = 16
"""Short, and long, requests of one tenant that cannot start and are passed for one that can."""


class Chooser:
    """Chooses; it changes nothing but its own reservation and pins."""

    def __init__(
        self,
        settings: SchedulingSettings,
        queue: FairQueue,
        ready: Callable[[str], list[EngineLedger]],
        clock: Callable[[], float],
    ) -> None:
        self._settings = settings
        self._queue = queue
        self._ready = ready
        self._clock = clock
        self._pins = Pins(settings.max_pins)
        self._reservation: Reservation | None = None

    def choose(self) -> tuple[Job, Placement] | None:
        """Return the request that goes next and where it goes; None if none can.

        Of the tenants whose account is within the lead of the lowest that can start something: the most urgent
        request.
        """
        if self._settings.order == "arrival":
            choice = self._oldest()
        else:
            choice = self._fairest()
        if choice is not None:
            self._pin(*choice)
            self.forget(choice[0])
        return choice

    def forget(self, job: Job) -> None:
        """Keep no memory free for ``job`` any more."""
        if self._reservation and self._reservation.job is job:
            self._reservation = None

    def must_give_way(self, job: Job, ledger: EngineLedger) -> bool:
        """Tell whether a running long prefill, which has just passed a kept state, is put back.

        It is when a tenant waits for the same engine that has had much less, and what is computed of it stays.
        """
        settings = self._settings
        if settings.give_way_tokens is None or settings.order == "arrival" or job.has_first_token:
            return False
        if job.left_tokens <= settings.state_interval_tokens:
            return False
        tenant = self._queue.tenants[job.work.tenant_id]
        return self._is_ahead_of_waiting(
            tenant, ledger, settings.give_way_tokens, (Blocked.AHEAD, Blocked.LONG)
        )

    def _pin(self, job: Job, placement: Placement) -> None:
        work = job.work
        ready = {ledger.engine.engine_id for ledger in self._ready(work.model)}
        engine_id = self._pins.get(work.tenant_id, work.pin_key)
        if engine_id not in ready:
            # one that had too much to do stays the pinned one
            engine_id = placement.ledger.engine.engine_id
        self._pins.set(work.tenant_id, work.pin_key, engine_id)

    def _oldest(self) -> tuple[Job, Placement] | None:
        job = self._queue.oldest()
        placement = self._place(job, self._queue.tenants[job.work.tenant_id])
        return None if placement is None or placement.blocked else (job, placement)

    def _fairest(self) -> tuple[Job, Placement] | None:
        now_s = self._clock()
        lowest: float | None = None
        choices: list[tuple[Job, Placement]] = []
        full = _FullLanes(self._ready)
        for tenant in self._queue.by_account():
            work = tenant.account.work
            if lowest is not None and work > lowest + self._settings.lead_tokens:
                break
            choice = self._first_startable(tenant, full, now_s)
            if choice is not None:
                lowest = work if lowest is None else lowest
                choices.append(choice)
        return min(choices, key=lambda c: self._queue.urgency(c[0], now_s), default=None)

    def _first_startable(
        self, tenant: Tenant, full: _FullLanes, now_s: float
    ) -> tuple[Job, Placement] | None:
        num_passed = {True: 0, False: 0}
        for job in self._queue.by_urgency(tenant, now_s):
            is_long = self._is_long(job.uncached_tokens)
            if num_passed[is_long] >= MAX_PASSED or full.is_closed(is_long, job.work.model):
                continue
            placement = self._place(job, tenant)
            if placement is None:
                continue
            if placement.blocked is None:
                return job, placement
            full.note(is_long, placement)
            num_passed[is_long] += placement.blocked is not Blocked.PREFIX
            is_kept_out = placement.blocked is Blocked.MEMORY and self._queue.is_overdue(job, now_s)
            if is_kept_out and self._reservation is None:
                self._reservation = Reservation(placement.ledger, job)
        return None

    def _place(self, job: Job, tenant: Tenant) -> Placement | None:
        work = job.work
        ledgers = self._ready(work.model)
        if self._reservation and self._reservation.ledger.engine.engine_id not in {
            ledger.engine.engine_id for ledger in self._ready(self._reservation.job.work.model)
        }:
            self._reservation = None
        placement = place(
            job,
            tenant.account,
            ledgers,
            pinned_id=self._pins.get(work.tenant_id, work.pin_key),
            reservation=self._reservation,
        )
        if placement is None or placement.blocked or self._settings.order == "arrival":
            return placement
        if any(ledger.leader(job) for ledger in ledgers):
            return replace(placement, blocked=Blocked.PREFIX)
        if self._is_long(work.prompt.num_tokens - placement.cached_tokens):
            # else it would have to give way at once
            lead_tokens = self._settings.lead_tokens
            if self._is_ahead_of_waiting(tenant, placement.ledger, lead_tokens, (Blocked.AHEAD,)):
                return replace(placement, blocked=Blocked.SHARE)
        return placement

    def _is_ahead_of_waiting(
        self, tenant: Tenant, ledger: EngineLedger, tokens: int, reasons: tuple[Blocked, ...]
    ) -> bool:
        """Tell whether another tenant, more than ``tokens`` behind, waits for this engine for one of ``reasons``."""
        now_s = self._clock()
        for other in self._queue.by_account():
            if other.account.work + tokens >= tenant.account.work:
                return False
            jobs = self._queue.by_urgency(other, now_s)
            for is_long in (False, True):
                first = next((j for j in jobs if self._is_long(j.uncached_tokens) is is_long), None)
                if first is None or (is_long and Blocked.LONG not in reasons):
                    continue
                placement = self._place(first, other)
                if placement is None or placement.ledger is not ledger:
                    continue
                # what is put back keeps its memory in the prefix cache; there must be enough beside it
                has_memory = ledger.kv_need_tokens(first) <= ledger.kv_free_tokens()
                if placement.blocked in reasons and has_memory:
                    return True
        return False

    def _is_long(self, uncached_tokens: int) -> bool:
        return uncached_tokens > self._settings.long_prompt_tokens


class _FullLanes:
    """Engines that take no more short, or long, prompts at the moment: the first to find out saves others the look."""

    def __init__(self, ready: Callable[[str], list[EngineLedger]]) -> None:
        self._ready = ready
        self._full: tuple[set[str], set[str]] = set(), set()
        self._closed: dict[tuple[bool, str], bool] = {}

    def note(self, is_long: bool, placement: Placement) -> None:
        if placement.blocked in (Blocked.SLOTS, Blocked.LONG, Blocked.AHEAD):
            self._full[is_long].add(placement.ledger.engine.engine_id)
            self._closed.clear()

    def is_closed(self, is_long: bool, model: str) -> bool:
        closed = self._closed.get((is_long, model))
        if closed is None:
            engine_ids = {ledger.engine.engine_id for ledger in self._ready(model)}
            closed = self._closed[is_long, model] = engine_ids <= self._full[is_long]
        return closed
