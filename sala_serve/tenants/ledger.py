"""What of each tenant's limits is used, in one store: Redis, or one in this process."""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING, Any, Final

from sala_serve.tenants import scripts

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from sala_serve.lua import Scripts
    from sala_serve.telemetry import Usage
    from sala_serve.tenants.model import Limits

LIMIT_NAMES: Final = {
    "requests": "requests_per_min",
    "input": "input_tokens_per_min",
    "output": "output_tokens_per_min",
    "flight": "tokens_in_flight",
    "long": "long_prefills",
    "day": "tokens_per_day",
}
"""Short name in the scripts to field of :class:`~sala_serve.tenants.model.Limits`, in the scripts' order."""
MAX_RENEWED_AT_ONCE = 200
"""A script holds up everybody else's."""


@dataclass(frozen=True)
class Charge:
    """What one reservation takes of each limit, in whole tokens; ``long`` is 0 or 1."""

    input: int
    output: int
    flight: int
    long: int
    day: int


@dataclass(frozen=True)
class Used:
    """What of a tenant's limits is used; of those a minute, what has not refilled yet."""

    requests: float
    input: float
    output: float
    flight: int
    long: int
    day: int


@dataclass(frozen=True)
class Verdict:
    """The store's answer to one step."""

    refused_by: str | None
    """Key of ``LIMIT_NAMES``, or "repeated": this reservation was made before, or has ended."""
    wait_ms: int
    """Until every limit that refills by itself would admit the claim; 0 also where only others end it."""
    now_ms: int
    """Unix."""
    num_expired: int
    """Reservations whose lease had ended, given back in this step."""
    used: Used


def counted_input(num_prompt_tokens: int, num_cached_tokens: int, rate: float) -> int:
    """Return how many input tokens count, given that a cached one counts ``rate``."""
    # rounded first, since 0.1 * 30 is above 3
    return num_prompt_tokens - num_cached_tokens + math.ceil(round(num_cached_tokens * rate, 6))


class Ledger:
    """Runs the scripts of :mod:`sala_serve.tenants.scripts`.

    Args:
        store: where the ledger is.
        lease_s: how long a reservation lives without being renewed.
        unix_clock: seconds; ``None``: the store's own clock, which all replicas share.
        on_expired: told how many reservations each step gave back because their leases had ended.
    """

    def __init__(
        self,
        store: Scripts,
        *,
        lease_s: float,
        unix_clock: Callable[[], float] | None = None,
        on_expired: Callable[[int], None] = lambda _: None,
    ) -> None:
        self._on_expired = on_expired
        self._store = store
        self._lease_ms = round(lease_s * 1000)
        self._unix_clock = unix_clock
        self._reserve = store.register_script(scripts.RESERVE)
        self._settle = store.register_script(scripts.SETTLE)
        self._refund = store.register_script(scripts.REFUND)
        self._renew = store.register_script(scripts.RENEW)
        self._peek = store.register_script(scripts.PEEK)

    async def reserve(
        self, tenant_id: str, limits: Limits, reservation_id: str, charge: Charge
    ) -> Verdict:
        """Take ``charge`` of all limits, or nothing."""
        return await self._run(self._reserve, tenant_id, limits, reservation_id, *astuple(charge))

    async def settle(
        self,
        tenant_id: str,
        limits: Limits,
        reservation_id: str,
        usage: Usage,
        num_requests: int = 1,
    ) -> Verdict:
        """Replace a reservation by what was used, once; one that is not known is charged whole."""
        num_prompt, num_cached = usage.num_prompt_tokens, usage.num_cached_tokens
        input_tokens = counted_input(num_prompt, num_cached, limits.cached_token_rate)
        output_tokens = usage.num_completion_tokens
        charged = (input_tokens, output_tokens, input_tokens + output_tokens)
        counts = (num_requests, num_prompt, num_cached, output_tokens)
        return await self._run(self._settle, tenant_id, limits, reservation_id, *charged, *counts)

    async def refund(self, tenant_id: str, limits: Limits, reservation_id: str) -> Verdict:
        """Give a reservation's tokens back, once."""
        return await self._run(self._refund, tenant_id, limits, reservation_id)

    async def renew(
        self, tenant_id: str, limits: Limits, reservations: Mapping[str, Charge]
    ) -> None:
        """Lengthen leases; reservations that are not known are entered."""
        items = list(reservations.items())
        for start in range(0, len(items), MAX_RENEWED_AT_ONCE):
            part = items[start : start + MAX_RENEWED_AT_ONCE]
            flat = [each for key, charge in part for each in (key, *astuple(charge))]
            await self._run(self._renew, tenant_id, limits, *flat)

    async def used(self, tenant_id: str, limits: Limits) -> Used:
        """Return what is used now."""
        return (await self._run(self._peek, tenant_id, limits)).used

    async def usage_by_day(self, tenant_id: str, days: Sequence[int]) -> list[dict[str, int]]:
        """Return what was used on days since 1970, with the fields that :class:`Usage` counts."""
        answers = []
        for day in days:
            stored: dict[bytes, bytes] = await self._store.hgetall(_usage_key(tenant_id, day))
            answers.append({key.decode(): int(value) for key, value in stored.items()})
        return answers

    async def _run(self, script: Any, tenant_id: str, limits: Limits, *args: str | int) -> Verdict:
        now_ms = 0 if self._unix_clock is None else round(self._unix_clock() * 1000)
        bounds = [getattr(limits, field) for field in LIMIT_NAMES.values()]
        answer = await script(
            keys=[
                *(f"sala:{kind}:{{{tenant_id}}}" for kind in ("limits", "held", "leases")),
                _usage_key(tenant_id, ""),
            ],
            args=[
                now_ms,
                self._lease_ms,
                *("" if bound is None else bound for bound in bounds),
                *args,
            ],
        )
        refused_by, wait_ms, at_ms, num_expired, *used = answer
        self._on_expired(int(num_expired))
        return Verdict(
            refused_by=refused_by.decode() or None,
            wait_ms=int(wait_ms),
            now_ms=int(at_ms),
            num_expired=int(num_expired),
            used=Used(
                requests=float(used[0]),
                input=float(used[1]),
                output=float(used[2]),
                flight=int(used[3]),
                long=int(used[4]),
                day=int(used[5]),
            ),
        )


def _usage_key(tenant_id: str, day: int | str) -> str:
    return f"sala:usage:{{{tenant_id}}}:{day}"
