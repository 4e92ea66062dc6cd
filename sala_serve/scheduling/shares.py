"""Tenants share by tokens of work: who has had how much, who goes next, and how uneven it has been.

Each tenant has an account: the work it was charged, divided by its weight. A request is charged up to one piece
ahead of what the engine has done of it: a short one whole at dispatch, net of the predicted prefix hit; a million
tokens in pieces while they are computed; generated tokens as they come; and what is paid too much or too little
is put right at the end. The tenant with the lowest account goes next.

A tenant is *backlogged* while it has requests waiting, or a running one that is not paid in full. One that becomes
backlogged is lifted to the lowest account of those that are: idleness earns nothing. What it has had beyond
that stays on its account.

The bound is :func:`gap_bound_tokens`; docs/scheduling.md derives it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sala_serve.scheduling.ledger import Job
    from sala_serve.scheduling.settings import SchedulingSettings

MAX_WATCHED = 64
"""Backlogged tenants between whom the gap is measured."""


def gap_bound_tokens(
    settings: SchedulingSettings,
    lightest_weight: float,
    output_tokens: float,
    prompt_tokens: float,
) -> float:
    """Return by how much the difference of two accounts can change while both tenants wait and could start.

    Let ``i`` be ahead of ``j``. It starts something only while it is at most the lead ahead, and that costs one
    piece at first. Its long prefill, if it has one, goes on being charged; when it is more than
    ``give_way_tokens`` ahead, it is put back at the next kept state, at most an interval and one report
    later (a report covers less than a piece). What its running requests generate comes on top. The same the other
    way round, so the spread of the difference is at most twice that. No prompt's length is in it, unless
    ``give_way_tokens`` is None: then a long prefill runs to its end.

    Args:
        settings: of the scheduler.
        lightest_weight: of the tenants compared.
        output_tokens: most that the running requests of one tenant generate together.
        prompt_tokens: of the longest prompt.
    """
    jumps = 2 * settings.piece_tokens + settings.output_token_cost * output_tokens
    ahead = settings.lead_tokens
    if settings.give_way_tokens is None:
        jumps += prompt_tokens
    else:
        jumps += settings.state_interval_tokens
        ahead += settings.give_way_tokens
    return 2 * (ahead + jumps / lightest_weight)


@dataclass(eq=False)
class Account:
    """What one tenant has had."""

    tenant_id: str
    weight: float
    work: float = 0.0
    """Charged so far, divided by the weight, and lifted after idleness."""
    total_tokens: float = 0.0
    """Charged so far, never lifted, not divided."""
    is_backlogged: bool = False


class Shares:
    """All accounts."""

    def __init__(self) -> None:
        self.accounts: dict[str, Account] = {}
        self.gap = GapMeter()
        self._level = 0.0

    def account(self, tenant_id: str, weight: float) -> Account:
        """Return a tenant's account, opened at the level of those that wait if it is new."""
        account = self.accounts.get(tenant_id)
        if account is None:
            account = Account(tenant_id, weight, self.level())
            self.accounts[tenant_id] = account
        # a tenant may change its tier
        account.weight = weight
        return account

    def level(self) -> float:
        """Return the lowest account of the backlogged tenants, or what it was when the last one left."""
        lowest = min((a.work for a in self.accounts.values() if a.is_backlogged), default=None)
        if lowest is not None:
            self._level = max(self._level, lowest)
            return lowest
        return self._level

    def charge(self, account: Account, tokens: float) -> None:
        """Book ``tokens`` of work; negative ones are given back."""
        account.work += tokens / account.weight
        account.total_tokens += tokens
        self.gap.charged(account)

    def set_backlogged(self, account: Account, is_backlogged: bool) -> bool:
        """Note whether the tenant has something to wait for; returns whether it has just begun to wait."""
        if is_backlogged == account.is_backlogged:
            return False
        if is_backlogged:
            account.work = max(account.work, self.level())
            account.is_backlogged = True
            self.gap.joined(account)
            return True
        account.is_backlogged = False
        self.gap.left(account)
        if not any(a.is_backlogged for a in self.accounts.values()):
            # nobody waited for what the last ones had, so nobody is owed for it
            self._level = max(a.work for a in self.accounts.values())
        return False

    def forget(self, tenant_id: str) -> None:
        """Drop an idle tenant's account if a new one would say the same."""
        account = self.accounts.get(tenant_id)
        if account and not account.is_backlogged and account.work <= self.level():
            del self.accounts[tenant_id]

    def forget_settled(self, active: set[str]) -> None:
        """Drop the accounts of all tenants but ``active`` ones that owe nothing."""
        for tenant_id in [t for t in self.accounts if t not in active]:
            self.forget(tenant_id)


class Beside:
    """What tenants have had on an engine beside a long prefill that runs there, since it began.

    The prefill is its tenant's backlog: while others are further ahead of it than the lead, theirs is held
    back, so that it goes on. Who begins to wait later begins where the prefill's tenant is.
    """

    def __init__(self, job: Job, owner: Account) -> None:
        self.job = job
        self.owner = owner
        self.has_progress = False
        """Whether the engine says how far the prefill is; if not, nobody is held back for it."""
        self._own = 0.0
        self._others: dict[str, float] = {}

    def charged(self, account: Account, tokens: float) -> None:
        """Note a charge for work on this engine."""
        share = tokens / account.weight
        if account is self.owner:
            self._own += share
        else:
            before = self._others.get(account.tenant_id, self._own)
            self._others[account.tenant_id] = before + share

    def joined(self, tenant_id: str) -> None:
        """Note that a tenant has begun to wait: what it did not ask for before is not owed to it."""
        if tenant_id in self._others:
            self._others[tenant_id] = max(self._others[tenant_id], self._own)

    def lead(self, account: Account) -> float:
        """Return how far a tenant is ahead of the prefill's, here and on the whole; 0 if it is not."""
        if not self.has_progress or account is self.owner:
            return 0.0
        here = self._others.get(account.tenant_id, self._own) - self._own
        return here if account.work > self.owner.work else 0.0


class GapMeter:
    """How far the service of two tenants has drifted apart while both were backlogged.

    For each pair: the spread of the difference of their accounts since both became backlogged, which is the
    largest difference of service over any interval within that time.
    """

    def __init__(self) -> None:
        self.largest = 0.0
        """Since the start, in tokens of work at weight 1."""
        self._waiting: dict[str, Account] = {}
        self._spreads: dict[tuple[str, str], tuple[float, float]] = {}

    @property
    def current(self) -> float:
        """Of the pairs that are backlogged now."""
        return max((high - low for low, high in self._spreads.values()), default=0.0)

    def joined(self, account: Account) -> None:
        """Start to compare a tenant with the others that wait."""
        if len(self._waiting) >= MAX_WATCHED:
            return
        for other in self._waiting.values():
            difference = _difference(account, other)
            self._spreads[_pair(account, other)] = difference, difference
        self._waiting[account.tenant_id] = account

    def charged(self, account: Account) -> None:
        """Compare again after a tenant's account has changed."""
        if account.tenant_id not in self._waiting:
            return
        for other in self._waiting.values():
            if other is account:
                continue
            pair, difference = _pair(account, other), _difference(account, other)
            low, high = self._spreads[pair]
            low, high = min(low, difference), max(high, difference)
            self._spreads[pair] = low, high
            self.largest = max(self.largest, high - low)

    def left(self, account: Account) -> None:
        """Stop comparing a tenant."""
        if self._waiting.pop(account.tenant_id, None):
            for other in self._waiting.values():
                del self._spreads[_pair(account, other)]


def _pair(one: Account, other: Account) -> tuple[str, str]:
    first, second = sorted((one.tenant_id, other.tenant_id))
    return first, second


def _difference(one: Account, other: Account) -> float:
    difference = one.work - other.work
    return difference if one.tenant_id < other.tenant_id else -difference
