"""When will it be my turn? The queue is played forward by its own rule, at the speeds that were seen."""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sala_serve.scheduling.work import Waiting

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from sala_serve.scheduling.ledger import EngineLedger, Job
    from sala_serve.scheduling.settings import SchedulingSettings


@dataclass(frozen=True)
class Line:
    """One tenant's waiting requests, in its own order."""

    account_work: float
    weight: float
    jobs: Sequence[Job]


def play_forward(
    lines: Mapping[str, Line], ledgers: Sequence[EngineLedger], settings: SchedulingSettings
) -> dict[Job, Waiting]:
    """Return what each waiting request may be told.

    Short prompts and long ones are two queues: the engine computes them side by side, and the speed of each was
    observed beside the other.
    """
    short: dict[str, Line] = {}
    long: dict[str, Line] = {}
    for tenant_id, line in lines.items():
        is_long = [job.uncached_tokens > settings.long_prompt_tokens for job in line.jobs]
        for jobs, wanted in ((short, False), (long, True)):
            chosen = [job for job, each in zip(line.jobs, is_long, strict=True) if each is wanted]
            if chosen:
                jobs[tenant_id] = Line(line.account_work, line.weight, chosen)
    if not ledgers:
        return _unknown(short) | _unknown(long)
    return _play_short(short, ledgers, settings) | _play_long(long, lines, ledgers, settings)


def play_in_sequence(jobs: Sequence[Job], ledgers: Sequence[EngineLedger]) -> dict[Job, Waiting]:
    """Return what each may be told if they go in this order, none before the one ahead of it."""
    rate = sum(ledger.long_rate.tokens_per_s for ledger in ledgers)
    told, tokens_ahead = {}, sum(sum(ledger.prefills_left()) for ledger in ledgers)
    for num_ahead, job in enumerate(jobs):
        start_s = tokens_ahead / rate if ledgers else None
        tokens_ahead += job.uncached_tokens
        first_token_s = tokens_ahead / rate if ledgers else None
        told[job] = Waiting(
            num_ahead + 1, num_ahead, tokens_ahead - job.uncached_tokens, start_s, first_token_s
        )
    return told


def _in_order(lines: Mapping[str, Line]) -> list[Job]:
    """Return the requests of several tenants in the order of their accounts."""
    heap = [(line.account_work, tenant_id, 0) for tenant_id, line in lines.items()]
    heapq.heapify(heap)
    order = []
    while heap:
        work, tenant_id, position = heapq.heappop(heap)
        line = lines[tenant_id]
        job = line.jobs[position]
        order.append(job)
        if position + 1 < len(line.jobs):
            work += job.uncached_tokens / line.weight
            heapq.heappush(heap, (work, tenant_id, position + 1))
    return order


def _unknown(lines: Mapping[str, Line]) -> dict[Job, Waiting]:
    told, tokens_ahead = {}, 0
    for num_ahead, job in enumerate(_in_order(lines)):
        told[job] = Waiting(num_ahead + 1, num_ahead, tokens_ahead, None, None)
        tokens_ahead += job.uncached_tokens
    return told


def _play_short(
    lines: Mapping[str, Line], ledgers: Sequence[EngineLedger], settings: SchedulingSettings
) -> dict[Job, Waiting]:
    rates = [ledger.short_rate.tokens_per_s for ledger in ledgers]
    left = [float(ledger.short_left_tokens()) for ledger in ledgers]
    # one place becomes free after the other
    ends = [ledger.slots_free_in_s() for ledger in ledgers]
    tokens_ahead = int(sum(left))
    told = {}
    for num_ahead, job in enumerate(_in_order(lines)):
        each = min(range(len(ledgers)), key=lambda i: left[i] / rates[i] + ends[i][0])
        slot_s = heapq.heappop(ends[each])
        left[each] += job.uncached_tokens
        first_token_s = max(left[each], slot_s * rates[each] + job.uncached_tokens) / rates[each]
        too_much = (left[each] - settings.max_prefill_ahead_tokens) / rates[each]
        start_s = min(max(too_much, slot_s, 0.0), first_token_s)
        told[job] = Waiting(num_ahead + 1, num_ahead, tokens_ahead, start_s, first_token_s)
        tokens_ahead += job.uncached_tokens
        answer_tokens = ledgers[each].expected_output_tokens(job.work)
        answer_s = answer_tokens / ledgers[each].decode_rate.tokens_per_s
        heapq.heappush(ends[each], first_token_s + answer_s)
    return told


@dataclass(eq=False)
class _Lane:
    """Where one engine computes one long prefill after another."""

    rate: float
    tenant_id: str | None = None
    job: Job | None = None
    """None: a running one, or one of another gateway."""
    left_tokens: float = 0.0


def _play_long(
    lines: Mapping[str, Line],
    all_lines: Mapping[str, Line],
    ledgers: Sequence[EngineLedger],
    settings: SchedulingSettings,
) -> dict[Job, Waiting]:
    told: dict[Job, Waiting] = {}
    if not lines:
        return told
    waiting = {tenant_id: list(line.jobs) for tenant_id, line in lines.items()}
    accounts = {tenant_id: line.account_work for tenant_id, line in all_lines.items()}
    weights = {tenant_id: line.weight for tenant_id, line in all_lines.items()}
    places = {job: place for place, job in enumerate(_in_order(lines), 1)}
    left = {job: float(job.uncached_tokens) for job in places}
    starts: dict[Job, tuple[float, int]] = {}
    done_tokens, give_way = 0.0, settings.give_way_tokens
    quantum = give_way or float("inf")

    lanes: list[tuple[float, int, _Lane]] = []
    for ledger in ledgers:
        rate = ledger.long_rate.tokens_per_s / settings.max_long_prefills
        running = ledger.long_prefills()
        for position in range(settings.max_long_prefills):
            lane = _Lane(rate)
            if position < len(running):
                lane.tenant_id, lane.left_tokens = running[position]
            lanes.append((0.0, len(lanes), lane))
    heapq.heapify(lanes)

    def lowest() -> str | None:
        return min((t for t in waiting if waiting[t]), key=lambda t: accounts[t], default=None)

    while lanes:
        now_s, lane_idx, lane = heapq.heappop(lanes)
        if lane.left_tokens <= 0:
            tenant_id = lowest()
            if tenant_id is None:
                continue
            job = waiting[tenant_id].pop(0)
            lane.tenant_id, lane.job, lane.left_tokens = tenant_id, job, left[job]
            starts.setdefault(job, (now_s, int(done_tokens)))
        step = min(lane.left_tokens, quantum)
        now_s += step / lane.rate
        done_tokens += step
        lane.left_tokens -= step
        owner = lane.tenant_id
        if owner in accounts:
            accounts[owner] += step / weights[owner]
        if lane.left_tokens <= 0:
            if lane.job is not None:
                place, (start_s, tokens_ahead) = places[lane.job], starts[lane.job]
                told[lane.job] = Waiting(place, place - 1, tokens_ahead, start_s, now_s)
        elif give_way is not None and owner in accounts and lane.job is not None:
            other = lowest()
            if other is not None and accounts[owner] - accounts[other] > give_way:
                waiting[owner].insert(0, lane.job)
                left[lane.job], lane.left_tokens = lane.left_tokens, 0.0
        heapq.heappush(lanes, (now_s, lane_idx, lane))
    return told
