from __future__ import annotations

from itertools import combinations
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sala_serve.scheduling.rates import LaneRate, Rate
from sala_serve.scheduling.shares import Beside, Shares, gap_bound_tokens

if TYPE_CHECKING:
    from sala_serve.scheduling.settings import SchedulingSettings


def test_idleness_earns_nothing():
    shares = Shares()
    busy, idle = shares.account("busy", 1.0), shares.account("idle", 1.0)
    shares.set_backlogged(busy, True)
    shares.charge(busy, 1_000_000)
    shares.set_backlogged(idle, True)
    assert idle.work == busy.work == 1_000_000


def test_what_a_tenant_had_stays_on_its_account_when_it_leaves_for_a_moment():
    shares = Shares()
    other, heavy = shares.account("other", 1.0), shares.account("heavy", 1.0)
    for account in (other, heavy):
        shares.set_backlogged(account, True)
    shares.charge(heavy, 5000)
    shares.set_backlogged(heavy, False)
    shares.forget_settled(set())
    assert shares.account("heavy", 1.0) is heavy
    shares.set_backlogged(heavy, True)
    assert (heavy.work, other.work) == (5000, 0)


def test_nobody_owes_for_what_nobody_else_wanted():
    shares = Shares()
    alone = shares.account("alone", 1.0)
    shares.set_backlogged(alone, True)
    shares.charge(alone, 5000)
    shares.set_backlogged(alone, False)
    later = shares.account("later", 1.0)
    for account in (alone, later):
        shares.set_backlogged(account, True)
    assert alone.work == later.work


def test_settled_accounts_of_idle_tenants_are_forgotten():
    shares = Shares()
    for idx in range(100):
        account = shares.account(f"t{idx}", 1.0)
        shares.set_backlogged(account, True)
        shares.charge(account, 10)
        shares.set_backlogged(account, False)
        shares.forget_settled(set())
    assert not shares.accounts


def test_weight_divides_the_charge():
    shares = Shares()
    account = shares.account("t", 4.0)
    shares.charge(account, 1000)
    assert (account.work, account.total_tokens) == (250, 1000)


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("charge"), st.integers(0, 3), st.integers(-50, 100)),
            st.tuples(st.just("wait"), st.integers(0, 3), st.booleans()),
        ),
        max_size=40,
    )
)
def test_measured_gap_is_the_largest_over_all_intervals(steps: list[tuple[str, int, int]]):
    shares = Shares()
    accounts = [shares.account(f"t{idx}", 1.0) for idx in range(4)]
    history: dict[tuple[int, int], list[float]] = {}
    largest = 0.0
    for kind, idx, value in steps:
        if kind == "charge":
            shares.charge(accounts[idx], value)
        else:
            shares.set_backlogged(accounts[idx], bool(value))
        for i, j in combinations(range(4), 2):
            if accounts[i].is_backlogged and accounts[j].is_backlogged:
                seen = history.setdefault((i, j), [])
                seen.append(accounts[i].work - accounts[j].work)
                largest = max([largest, *(abs(seen[-1] - before) for before in seen)])
            else:
                history.pop((i, j), None)
    assert shares.gap.largest == pytest.approx(largest)


def test_bound_holds_no_prompt_length_and_shrinks_with_weight(settings: SchedulingSettings):
    bound = gap_bound_tokens(settings, 1.0, 0, 1 << 20)
    assert bound == 2 * (2048 + 8192 + 4096 + 2 * 2048)
    assert gap_bound_tokens(settings, 2.0, 0, 1 << 20) == 2 * (2048 + 8192 + (4096 + 2 * 2048) / 2)
    assert gap_bound_tokens(settings, 1.0, 100, 1 << 20) == bound + 2 * 4 * 100


def test_lead_beside_a_prefill_counts_from_when_a_tenant_began_to_wait():
    shares = Shares()
    owner, other = shares.account("owner", 1.0), shares.account("other", 1.0)
    beside = Beside(None, owner)
    beside.has_progress = True
    beside.charged(owner, 10_000)
    beside.charged(other, 3000)
    other.work = owner.work + 1
    assert beside.lead(other) == 3000
    beside.charged(owner, 10_000)
    assert beside.lead(other) == -7000
    beside.joined("other")
    assert beside.lead(other) == 0
    assert beside.lead(owner) == 0


def test_who_is_behind_on_the_whole_leads_nobody():
    shares = Shares()
    owner, other = shares.account("owner", 1.0), shares.account("other", 1.0)
    beside = Beside(None, owner)
    beside.has_progress = True
    beside.charged(other, 3000)
    shares.charge(owner, 1)
    assert beside.lead(other) == 0


def test_without_progress_nobody_is_held_back():
    shares = Shares()
    beside, other = Beside(None, shares.account("owner", 1.0)), shares.account("other", 1.0)
    other.work = 1
    beside.charged(other, 3000)
    assert beside.lead(other) == 0


def test_rate_goes_from_its_seed_to_what_is_seen():
    rate = Rate(1000.0)
    assert rate.tokens_per_s == 1000
    for _ in range(100):
        rate.observe(500, 1.0)
    assert rate.tokens_per_s == pytest.approx(500, rel=0.1)
    for _ in range(200):
        rate.observe(2000, 1.0)
    assert rate.tokens_per_s == pytest.approx(2000, rel=0.1)


def test_lane_counts_only_the_time_in_which_something_ran():
    lane = LaneRate(1000.0)
    for start_s in range(0, 10_000, 100):
        lane.started(float(start_s))
        lane.started(float(start_s) + 1)
        lane.done(500, start_s + 1.0)
        lane.done(500, start_s + 2.0)
        lane.stopped(start_s + 2.0)
        lane.stopped(start_s + 2.0)
    assert lane.tokens_per_s == pytest.approx(500, rel=0.1)
