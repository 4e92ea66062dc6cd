"""Limits of tenants: reserved before work is dispatched, settled by what the engine counted, else given back.

All replicas keep one account of each tenant in Redis (:mod:`sala_serve.tenants.ledger`). While Redis is away a
tenant's tier says whether it is refused, or served from this replica's share of its limits, in an account in
this process which is entered in Redis when that is back. docs/tenants.md states what holds when.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from sala_serve.errors import StateUnavailable
from sala_serve.state import State, StateSettings
from sala_serve.telemetry import Metrics, Usage
from sala_serve.tenants.ledger import LIMIT_NAMES, Charge, Ledger, counted_input
from sala_serve.tenants.refusals import rate_limit_headers, refusal, too_large

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping

    from sala_serve.tenants.ledger import Used, Verdict
    from sala_serve.tenants.model import Limits, Principal, Tenant, Tier
    from sala_serve.tenants.settings import LimitsSettings

logger = logging.getLogger(__name__)

_TICK_S = 0.5
_NOTHING = Usage(num_prompt_tokens=0, num_cached_tokens=0, num_completion_tokens=0)


@dataclass(frozen=True)
class Claim:
    """What a request may use at most, as far as is known before it runs."""

    input_tokens: int
    """Exact, cached ones included."""
    predicted_cached_tokens: int
    output_tokens: int
    """The longest answer, or a prediction of it; above a limit it takes all of that limit."""
    is_long: bool
    """Whether it counts as a long prefill."""


class Reservation:
    """What a running request holds of its tenant's limits."""

    def __init__(
        self, limiter: Limiter, tenant: Tenant, charge: Charge, *, headers: Mapping[str, str]
    ) -> None:
        self.headers = headers
        """``x-ratelimit-*``, true when the reservation was made."""
        self.tenant = tenant
        self.charge = charge
        self.reservation_id = _new_id()
        self.local_limits: Limits | None = None
        """This replica's share, if it granted this on its own."""
        self.is_over = False
        self._limiter = limiter

    async def settle(self, usage: Usage) -> None:
        """Charge ``usage`` instead of what was claimed; the first call counts.

        Never fails: while Redis is away, or if this is cancelled, it is charged later.
        """
        if not self.is_over:
            self.is_over = True
            await self._limiter.end(self, usage)


@dataclass(frozen=True)
class _Step:
    """A settlement or (without usage) a refund that Redis has not confirmed."""

    tenant: Tenant
    usage: Usage | None
    num_requests: int = 1


class Limiter:
    """Admits requests by their tenant's limits.

    Args:
        state: where the account is that replicas share.
        settings: leases, and what holds without Redis.
        tier: the tier of a name.
        unix_clock: seconds, for tests; ``None``: the clock of the store.
        metrics: count refusals and tokens; none: of its own.
    """

    def __init__(
        self,
        state: State,
        settings: LimitsSettings,
        *,
        tier: Callable[[str], Tier],
        clock: Callable[[], float],
        unix_clock: Callable[[], float] | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        self._state = state
        self._settings = settings
        self._tier = tier
        self._clock = clock
        self._metrics = metrics or Metrics()
        self._ledger = Ledger(
            state.scripts,
            lease_s=settings.lease_s,
            unix_clock=unix_clock,
            on_expired=self._metrics.limit_expired,
        )
        self._unix_clock = unix_clock
        self._local_state: State | None = None
        self._local: Ledger | None = None
        self._live: dict[str, Reservation] = {}
        self._steps: dict[str, _Step] = {}
        self._local_steps: dict[str, tuple[Limits, _Step]] = {}
        self._unlimited: dict[str, _Step] = {}
        self._renewed_at_s = clock()
        self._num_losses_seen = state.num_losses
        self._reconciling = asyncio.Lock()
        self._metrics.at_scrape(
            lambda: self._metrics.set_limit_books(
                num_reservations=len(self._live), num_unconfirmed=len(self._steps)
            )
        )

    @asynccontextmanager
    async def reserve(
        self, principal: Principal, claim: Claim, *, request_id: str
    ) -> AsyncIterator[Reservation]:
        """Hold ``claim`` for the length of the block; it is given back unless the block settles it.

        Args:
            principal: whose limits.
            claim: how much.
            request_id: for the log.

        Raises:
            RateLimited: a limit does not admit the claim, now or ever.
            InsufficientQuota: the day's budget does not.
            StateUnavailable: Redis is away and the tenant's tier does not go on without it.
        """
        reservation = await self._take(principal.tenant, claim, request_id)
        self._live[reservation.reservation_id] = reservation
        self._count_tokens(
            reservation, "reserved", reservation.charge.input, reservation.charge.output
        )
        try:
            yield reservation
        finally:
            if not reservation.is_over:
                reservation.is_over = True
                await self.end(reservation, None)

    async def end(self, reservation: Reservation, usage: Usage | None) -> None:
        """Settle a reservation, or refund it; for :class:`Reservation` and the block it lives in."""
        tenant, key = reservation.tenant, reservation.reservation_id
        self._live.pop(key, None)
        used_input, used_output = 0, 0
        if usage is not None:
            used_input = counted_input(
                usage.num_prompt_tokens, usage.num_cached_tokens, tenant.limits.cached_token_rate
            )
            used_output = usage.num_completion_tokens
        self._count_tokens(reservation, "settled", used_input, used_output)
        unused_input = max(reservation.charge.input - used_input, 0)
        unused_output = max(reservation.charge.output - used_output, 0)
        self._count_tokens(reservation, "refunded", unused_input, unused_output)
        if _is_unlimited(tenant.limits):
            if usage is not None:
                self._add_unlimited(tenant, usage)
            return
        # noted before it is tried: if this is cancelled or Redis is away, run() does it
        self._steps[key] = step = _Step(tenant, usage)
        if (limits := reservation.local_limits) is not None:
            self._local_steps[key] = (limits, step)
            await self._try_local_step(key)
        await self._try_step(key)

    async def used(self, tenant: Tenant) -> Used:
        """Return what is used of a tenant's limits now.

        Raises:
            StateUnavailable: Redis is away.
        """
        with self._state.guarded():
            return await self._ledger.used(tenant.tenant_id, tenant.limits)

    async def usage_by_day(self, tenant_id: str, days: list[int]) -> list[dict[str, int]]:
        """Return what a tenant used on days counted from 1970, UTC.

        Raises:
            StateUnavailable: Redis is away.
        """
        with self._state.guarded():
            return await self._ledger.usage_by_day(tenant_id, days)

    async def run(self) -> None:
        """Renew leases, repeat what Redis has not confirmed, enter what was granted without it."""
        while True:
            await self.tick()
            await asyncio.sleep(_TICK_S)

    async def tick(self) -> None:
        """Do once what is due."""
        for key in list(self._local_steps):
            await self._try_local_step(key)
        if not self._state.is_available:
            return
        try:
            await self._reconcile()
            if self._clock() - self._renewed_at_s >= self._settings.lease_s / 3:
                await self._renew()
            await self._flush()
        except StateUnavailable:
            logger.debug("limits wait for the shared state")

    async def close(self) -> None:
        """Charge what is still to be charged, if Redis is there."""
        await self.tick()
        if self._steps or self._unlimited:
            num_steps = len(self._steps) + len(self._unlimited)
            logger.error("%d settlements are lost: the shared state is away", num_steps)
        if self._local_state is not None:
            await self._local_state.close()

    async def _take(self, tenant: Tenant, claim: Claim, request_id: str) -> Reservation:
        limits = tenant.limits
        if _is_unlimited(limits):
            return Reservation(self, tenant, _charge(claim, limits), headers={})
        tier = self._tier(tenant.tier)
        charge = _charge(claim, limits)
        if (never := too_large(charge, limits)) is not None:
            self._metrics.limit_refused(LIMIT_NAMES[never])
            raise refusal(never, limits, charge, verdict=None)
        try:
            await self._reconcile()
            reservation = Reservation(self, tenant, charge, headers={})
            verdict = await self._reserve_shared(reservation)
        except StateUnavailable:
            if tier.on_state_loss == "refuse":
                self._metrics.limit_refused("state")
                raise
            return await self._take_locally(tenant, claim, request_id)
        self._raise_if_refused(verdict, limits, charge)
        reservation.headers = rate_limit_headers(limits, verdict.used, verdict.now_ms)
        return reservation

    async def _reserve_shared(self, reservation: Reservation) -> Verdict:
        tenant, key = reservation.tenant, reservation.reservation_id
        with self._state.guarded():
            try:
                verdict = await self._ledger.reserve(
                    tenant.tenant_id, tenant.limits, key, reservation.charge
                )
            except BaseException:
                # it may have been made all the same, or be made when Redis thaws
                self._steps[key] = _Step(tenant, None)
                raise
        return verdict

    async def _take_locally(self, tenant: Tenant, claim: Claim, request_id: str) -> Reservation:
        share = share_of(tenant.limits, self._settings.local_share)
        charge = _charge(claim, share)
        if too_large(charge, share) is not None:
            self._metrics.limit_refused("state")
            raise StateUnavailable(
                "The gateway's shared state is not available, and this request is larger than what one "
                "replica may admit without it; please retry."
            )
        if self._local is None:
            self._local_state = State.create(StateSettings(), clock=self._clock)
            # ends with this process, so nothing has to be renewed
            self._local = Ledger(
                self._local_state.scripts, lease_s=10**6, unix_clock=self._unix_clock
            )
        reservation = Reservation(self, tenant, _charge(claim, tenant.limits), headers={})
        reservation.local_limits = share
        key = reservation.reservation_id
        try:
            verdict = await self._local.reserve(tenant.tenant_id, share, key, charge)
        except BaseException:
            self._local_steps[key] = (share, _Step(tenant, None))
            raise
        self._raise_if_refused(verdict, share, charge)
        self._metrics.limit_granted_locally()
        logger.debug("%s granted without the shared state", request_id)
        reservation.headers = rate_limit_headers(share, verdict.used, verdict.now_ms)
        return reservation

    def _raise_if_refused(self, verdict: Verdict, limits: Limits, charge: Charge) -> None:
        if (name := verdict.refused_by) is not None:
            self._metrics.limit_refused(LIMIT_NAMES[name])
            raise refusal(name, limits, charge, verdict=verdict)

    async def _reconcile(self) -> None:
        """After a loss, enter in Redis what this replica's requests hold, before anything is reserved."""
        if self._num_losses_seen == self._state.num_losses or not self._state.is_available:
            return
        async with self._reconciling:
            num_losses = self._state.num_losses
            if self._num_losses_seen != num_losses:
                await self._renew()
                await self._flush()
                self._num_losses_seen = num_losses

    async def _renew(self) -> None:
        by_tenant: dict[str, dict[str, Reservation]] = {}
        for key, reservation in self._live.items():
            if not _is_unlimited(reservation.tenant.limits):
                by_tenant.setdefault(reservation.tenant.tenant_id, {})[key] = reservation
        for tenant_id, reservations in by_tenant.items():
            limits = next(iter(reservations.values())).tenant.limits
            charges = {key: each.charge for key, each in reservations.items()}
            with self._state.guarded():
                await self._ledger.renew(tenant_id, limits, charges)
        self._renewed_at_s = self._clock()

    async def _flush(self) -> None:
        for key in list(self._steps):
            await self._try_step(key)
        for tenant_id in list(self._unlimited):
            # under an id of its own, so that it counts once however often it is sent
            self._steps[_new_id()] = self._unlimited.pop(tenant_id)
        for key in list(self._steps):
            await self._try_step(key)

    async def _try_step(self, key: str) -> None:
        step = self._steps.get(key)
        if step is None:
            return
        try:
            with self._state.guarded():
                await self._apply(self._ledger, step.tenant.limits, key, step)
        except StateUnavailable:
            return
        self._steps.pop(key, None)

    async def _try_local_step(self, key: str) -> None:
        if (found := self._local_steps.get(key)) is not None:
            assert self._local is not None
            await self._apply(self._local, found[0], key, found[1])
            self._local_steps.pop(key, None)

    async def _apply(self, ledger: Ledger, limits: Limits, key: str, step: _Step) -> None:
        tenant_id = step.tenant.tenant_id
        if step.usage is None:
            await ledger.refund(tenant_id, limits, key)
        else:
            await ledger.settle(tenant_id, limits, key, step.usage, step.num_requests)

    def _count_tokens(
        self,
        reservation: Reservation,
        outcome: Literal["reserved", "settled", "refunded"],
        num_input: int,
        num_output: int,
    ) -> None:
        tenant_id = reservation.tenant.tenant_id
        self._metrics.limit_tokens(tenant_id, "input", outcome, num_input)
        self._metrics.limit_tokens(tenant_id, "output", outcome, num_output)

    def _add_unlimited(self, tenant: Tenant, usage: Usage) -> None:
        """Sum up what a tenant without limits used; entered twice a second, not with each request."""
        sum_ = self._unlimited.get(tenant.tenant_id, _Step(tenant, _NOTHING, 0))
        assert sum_.usage is not None
        total = Usage(
            num_prompt_tokens=sum_.usage.num_prompt_tokens + usage.num_prompt_tokens,
            num_cached_tokens=sum_.usage.num_cached_tokens + usage.num_cached_tokens,
            num_completion_tokens=sum_.usage.num_completion_tokens + usage.num_completion_tokens,
        )
        self._unlimited[tenant.tenant_id] = _Step(tenant, total, sum_.num_requests + 1)


def share_of(limits: Limits, share: float) -> Limits:
    """Return ``share`` of each limit, rounded down, but not to nothing."""
    fields = {
        field: max(int(bound * share), min(bound, 1))
        for field in LIMIT_NAMES.values()
        if (bound := getattr(limits, field)) is not None
    }
    return replace(limits, **fields)


def _is_unlimited(limits: Limits) -> bool:
    return all(getattr(limits, field) is None for field in LIMIT_NAMES.values())


def _charge(claim: Claim, limits: Limits) -> Charge:
    input_tokens = counted_input(
        claim.input_tokens, claim.predicted_cached_tokens, limits.cached_token_rate
    )
    output_tokens = claim.output_tokens
    if limits.output_tokens_per_min is not None:
        output_tokens = min(output_tokens, limits.output_tokens_per_min)
    flight = claim.input_tokens + claim.output_tokens
    if limits.tokens_in_flight is not None and claim.input_tokens < limits.tokens_in_flight:
        flight = min(flight, limits.tokens_in_flight)
    day = input_tokens + claim.output_tokens
    if limits.tokens_per_day is not None and input_tokens < limits.tokens_per_day:
        day = min(day, limits.tokens_per_day)
    return Charge(
        input=input_tokens, output=output_tokens, flight=flight, long=int(claim.is_long), day=day
    )


def _new_id() -> str:
    return uuid.uuid4().hex
