"""The ledger: what each engine has been given, in tokens of work, and how far it has got."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

from sala_serve.scheduling.prefixes import PrefixIndex, num_shared_blocks
from sala_serve.scheduling.rates import LaneRate, Rate
from sala_serve.tokens.prompt import PREFIX_BLOCK_TOKENS

if TYPE_CHECKING:
    from array import array

    from sala_serve.scheduling.routing import Placement
    from sala_serve.scheduling.settings import SchedulingSettings
    from sala_serve.scheduling.shares import Account, Beside
    from sala_serve.scheduling.work import EngineView, ProgressView, UsageView, Work


MANY_SLOTS = 1024
"""Taken for an engine that does not say how many requests it computes at once."""


@dataclass(eq=False)
class Job:
    """A request from its arrival to its end."""

    work: Work
    chain: array[int]
    """Its prompt's blocks; see :mod:`sala_serve.scheduling.prefixes`."""
    uncached_tokens: int
    """Prompt tokens to compute: predicted, then as the engine says."""
    engine_id: str | None = None
    """None while it waits."""
    kv_tokens: int = 0
    """Memory kept for it, of its engine's capacity: prompt and answer, less what it shares with running ones."""
    computed_tokens: int = 0
    """Of ``uncached_tokens``."""
    output_tokens: int = 0
    charged_tokens: float = 0.0
    """What its tenant has paid for it so far, in tokens of work."""
    is_long: bool = False
    """Whether it started as a long prefill."""
    has_first_token: bool = False
    is_settled: bool = False
    """Whether the engine has said what it took."""
    has_progress: bool = False
    """Whether the engine has told how far it is."""
    first_token_at_s: float | None = None
    placement: Placement | None = None
    """None while it waits."""
    has_started: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def left_tokens(self) -> int:
        """Prompt tokens that are still to be computed."""
        return 0 if self.has_first_token else max(self.uncached_tokens - self.computed_tokens, 0)

    def done_work(self, output_token_cost: float) -> float:
        """Return what the engine has done for it, in tokens of work."""
        done = self.uncached_tokens if self.has_first_token else self.computed_tokens
        return done + output_token_cost * self.output_tokens

    def due_work(self, output_token_cost: float, piece_tokens: int) -> float:
        """Return what its tenant should have paid by now: one piece ahead of what is done."""
        ahead = min(self.left_tokens, piece_tokens)
        return self.done_work(output_token_cost) + ahead

    def look(self, progress: ProgressView) -> None:
        """Take over what the engine says."""
        if progress.phase == "waiting":
            return
        self.has_progress = True
        self.uncached_tokens = progress.num_prompt_tokens - progress.num_cached_tokens
        computed = progress.num_computed_tokens - progress.num_cached_tokens
        self.computed_tokens = min(max(computed, self.computed_tokens), self.uncached_tokens)
        self.output_tokens = max(progress.num_output_tokens, self.output_tokens)

    def settle(self, usage: UsageView) -> None:
        """Take over the engine's account at the end."""
        self.uncached_tokens = max(usage.num_prompt_tokens - usage.num_cached_tokens, 0)
        self.computed_tokens = self.uncached_tokens
        self.output_tokens = usage.num_completion_tokens
        self.has_first_token = self.is_settled = True


class Blocked(StrEnum):
    """Why a request does not start on an engine now."""

    PREFIX = "prefix"
    """A running prefill will save it most of its own."""
    SLOTS = "slots"
    """As many requests run as the engine computes at once."""
    MEMORY = "memory"
    LONG = "long prefills"
    AHEAD = "prefill ahead"
    """The engine has enough short prompts to work on."""
    SHARE = "share"
    """Its tenant is too far ahead of the one whose long prefill runs there."""


@dataclass(eq=False)
class EngineLedger:
    """One engine's page of the ledger."""

    engine: EngineView
    settings: SchedulingSettings
    jobs: list[Job] = field(default_factory=list)
    """Running ones."""
    besides: list[Beside] = field(default_factory=list)
    """One for each long prefill of ours that runs here."""
    num_starts: int = 0
    prefixes: PrefixIndex = field(init=False)
    short_rate: LaneRate = field(init=False)
    long_rate: LaneRate = field(init=False)
    decode_rate: Rate = field(init=False)
    """One answer's."""
    mean_output_tokens: float = field(init=False, default=256.0)
    _left: set[str] = field(init=False, default_factory=set)
    """Ids of requests of ours that are over and that the last look still shows."""

    def __post_init__(self) -> None:
        self.num_starts = self.engine.num_starts
        self.prefixes = PrefixIndex(self.settings, self.engine.facts.kv_capacity_tokens)
        self.short_rate = LaneRate(self.settings.prefill_tokens_per_s)
        self.long_rate = LaneRate(self.settings.prefill_tokens_per_s)
        self.decode_rate = Rate(self.settings.decode_tokens_per_s)

    def check_restart(self) -> bool:
        """Forget the prefixes of an engine that has started anew; returns whether it has."""
        if self.engine.num_starts == self.num_starts:
            return False
        self.num_starts = self.engine.num_starts
        self.prefixes = PrefixIndex(self.settings, self.engine.facts.kv_capacity_tokens)
        return True

    def rate(self, uncached_tokens: int) -> LaneRate:
        """Return the rate of prompts of this size."""
        is_long = uncached_tokens > self.settings.long_prompt_tokens
        return self.long_rate if is_long else self.short_rate

    def foreign(self) -> list[ProgressView]:
        """Return what the engine does for others, for example for another replica of the gateway."""
        progress = self.engine.progress
        self._left &= progress.keys()
        ours = {job.work.request_id for job in self.jobs} | self._left
        return [each for key, each in progress.items() if key not in ours]

    def leave(self, job: Job) -> None:
        """Take a request off the page; the last look may go on to show it for a while."""
        self.jobs.remove(job)
        self._left.add(job.work.request_id)

    def prefills_left(self) -> list[int]:
        """Return the tokens that are left of each prefill it has been given."""
        ours = [job.left_tokens for job in self.jobs if not job.has_first_token]
        others = [
            each.num_prompt_tokens - each.num_computed_tokens
            for each in self.foreign()
            if each.phase != "decoding"
        ]
        return ours + others

    def short_left_tokens(self) -> int:
        """Return how many tokens of short prefills are left."""
        return sum(n for n in self.prefills_left() if n <= self.settings.long_prompt_tokens)

    def long_left_tokens(self) -> int:
        """Return how many tokens of long prefills are left."""
        return sum(n for n in self.prefills_left() if n > self.settings.long_prompt_tokens)

    def num_long(self) -> int:
        """Return how many long prefills run; one whose rest is short is none, so that the next overlaps it."""
        return sum(n > self.settings.long_prompt_tokens for n in self.prefills_left())

    def long_prefills(self) -> list[tuple[str | None, int]]:
        """Return tenant (None: not ours) and tokens left of each long prefill that runs."""
        limit = self.settings.long_prompt_tokens
        ours = [(j.work.tenant_id, j.left_tokens) for j in self.jobs if j.left_tokens > limit]
        others = [
            (None, left)
            for each in self.foreign()
            if (left := each.num_prompt_tokens - each.num_computed_tokens) > limit
        ]
        return [*ours, *others]

    def slots_free_in_s(self) -> list[float]:
        """Return when each place among the requests it computes at once is expected to be free, as a heap."""
        num_slots = self.engine.facts.max_num_seqs or MANY_SLOTS
        taken = [self._ends_in_s(job) for job in self.jobs][:num_slots]
        return sorted([*taken, *[0.0] * (num_slots - len(taken))])

    def next_end_s(self) -> float:
        """Return in how many seconds the first running request is expected to end."""
        return min((self._ends_in_s(job) for job in self.jobs), default=0.0)

    def expected_output_tokens(self, work: Work) -> float:
        """Return how long an answer is likely to be."""
        return min(self.mean_output_tokens, work.output_tokens)

    def ended(self, job: Job, now_s: float) -> None:
        """Learn from a request that came to its end."""
        self.mean_output_tokens += 0.05 * (job.output_tokens - self.mean_output_tokens)
        if job.first_token_at_s is not None and now_s > job.first_token_at_s:
            self.decode_rate.observe(job.output_tokens, now_s - job.first_token_at_s)

    def _ends_in_s(self, job: Job) -> float:
        prefill_s = job.left_tokens / self.rate(job.left_tokens).tokens_per_s
        left = self.expected_output_tokens(job.work) - job.output_tokens
        return prefill_s + max(left, 0.0) / self.decode_rate.tokens_per_s

    def num_running(self) -> int:
        """Return how many requests it has been given."""
        return len(self.jobs) + len(self.foreign())

    def kv_held_tokens(self) -> int:
        """Return the memory that is taken or promised."""
        promised = sum(job.kv_tokens for job in self.jobs)
        used = self.engine.kv_used_tokens
        if used is None:
            return promised
        filled = sum(
            min(job.computed_tokens + job.output_tokens, job.kv_tokens) for job in self.jobs
        )
        # what it holds for others counts, and what ours will still fill
        return max(promised, used + promised - filled)

    def kv_free_tokens(self) -> float:
        """Return the memory that nobody has been promised."""
        capacity = self.engine.facts.kv_capacity_tokens
        return float("inf") if capacity is None else capacity - self.kv_held_tokens()

    def kv_need_tokens(self, job: Job) -> int:
        """Return the memory that a request would take: what it shares with running ones is held already."""
        work = job.work
        shared = max((num_shared_blocks(job.chain, each.chain) for each in self.jobs), default=0)
        need = work.prompt.num_tokens - shared * PREFIX_BLOCK_TOKENS + work.output_tokens
        # vLLM puts a request back that outgrows memory; one that could never start is refused at the door
        return min(need, self.engine.facts.kv_capacity_tokens or need)

    def blocked(
        self, job: Job, account: Account, uncached_tokens: int, reserved_for: Job | None
    ) -> Blocked | None:
        """Tell why ``job`` cannot start here now.

        Args:
            job: a waiting one.
            account: its tenant's.
            uncached_tokens: what it would have to compute here.
            reserved_for: the request for which memory is kept free here.
        """
        settings, facts = self.settings, self.engine.facts
        if facts.max_num_seqs is not None and self.num_running() >= facts.max_num_seqs:
            return Blocked.SLOTS
        if uncached_tokens > settings.long_prompt_tokens:
            if self.num_long() >= settings.max_long_prefills:
                return Blocked.LONG
        else:
            ahead = self.short_left_tokens()
            if ahead and ahead + uncached_tokens > settings.max_prefill_ahead_tokens:
                return Blocked.AHEAD
            if any(beside.lead(account) > settings.lead_tokens for beside in self.besides):
                return Blocked.SHARE
        need, free = self.kv_need_tokens(job), self.kv_free_tokens()
        if reserved_for is not None and reserved_for is not job:
            reserved = self.kv_need_tokens(reserved_for)
            # small ones end soon; they are held back only if they alone would keep the other out
            small = [each.kv_tokens for each in self.jobs if self._is_small(each.kv_tokens)]
            if not self._is_small(need) or sum(small) + need + reserved > (
                facts.kv_capacity_tokens or 0
            ):
                free -= reserved
        return Blocked.MEMORY if need > free else None

    def _is_small(self, kv_tokens: int) -> bool:
        return kv_tokens <= self.settings.long_prompt_tokens

    def leader(self, job: Job) -> Job | None:
        """Return the running prefill that will save ``job`` much, once it has got as far as they agree."""
        held = self.prefixes.held_tokens(job.chain)
        for each in self.jobs:
            if each.has_first_token:
                continue
            shared = num_shared_blocks(job.chain, each.chain) * PREFIX_BLOCK_TOKENS
            if shared - held < self.settings.min_shared_tokens:
                continue
            num_tokens = each.work.prompt.num_tokens
            # what is kept near its end is only kept once it is through
            is_to_end = shared + 2 * self.settings.engine_block_tokens >= num_tokens
            if is_to_end or num_tokens - each.left_tokens < shared:
                return each
        return None
