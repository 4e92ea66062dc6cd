"""The scheduler: requests ask it for their turn."""

from __future__ import annotations

import asyncio
import time
import weakref
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Generic

from sala_serve.errors import (
    EngineUnavailable,
    PromptDoesNotFit,
    QueueFull,
    QueueTimeout,
    wait_headers,
)
from sala_serve.scheduling.chooser import Chooser
from sala_serve.scheduling.forecast import Line, play_forward, play_in_sequence
from sala_serve.scheduling.ledger import EngineLedger, Job
from sala_serve.scheduling.prefixes import chain_of
from sala_serve.scheduling.queue import FairQueue
from sala_serve.scheduling.salt import cache_salt, prefix_key
from sala_serve.scheduling.shares import Beside, gap_bound_tokens
from sala_serve.scheduling.snapshot import (
    SchedulerSnapshot,
    engine_snapshot,
    queue_snapshots,
    tenant_snapshot,
)
from sala_serve.scheduling.work import AnyEngine, Waiting, Work

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from sala_serve.scheduling.rates import LaneRate
    from sala_serve.scheduling.routing import Placement
    from sala_serve.scheduling.settings import SchedulingSettings
    from sala_serve.scheduling.work import PoolView, ProgressView, UsageView

REPORT_S = 1.0
"""Between two words to a waiting caller."""
LENGTH_CLASSES = 16
LOOK_S = 0.5
"""Between two looks at what can start, where nothing is known to have changed."""
FORECAST_S = 0.5
"""For which a forecast is good."""


class Turn(Generic[AnyEngine]):
    """A request that may run now; what becomes of it is reported here.

    Attributes:
        engine: where it runs.
        cache_salt: for the engine's prefix cache.
        vllm_priority: smaller is earlier.
        predicted_cached_tokens: prompt tokens that the engine should find in its prefix cache.
        must_give_way: set by :meth:`prefill_progress`: close the engine's answer, leave the block and ask for
            another turn with the same work; what was computed is kept.
    """

    def __init__(self, scheduler: Scheduler[AnyEngine], job: Job, placement: Placement) -> None:
        self._scheduler = scheduler
        self._job = job
        self.engine = scheduler.engine(placement)
        self.cache_salt = scheduler.salt(job.work)
        self.vllm_priority = _vllm_priority(job)
        self.predicted_cached_tokens = placement.cached_tokens
        self.must_give_way = False

    def prefill_progress(self, progress: ProgressView) -> None:
        """Report how far the engine is; call it for each look, also while answers are generated."""
        self.must_give_way |= self._scheduler.looked(self._job, progress)

    def first_token(self) -> None:
        """Report that the prompt is computed."""
        self._scheduler.prefilled(self._job)

    def finished(self, usage: UsageView | None) -> None:
        """Report the end of the answer; None: the engine has not said what it took."""
        self._scheduler.ended(self._job, usage)


class Scheduler(Generic[AnyEngine]):
    """Decides which request goes to which engine, and when.

    There is no task of its own: everything that happens to a request lets the next ones start, and a waiting one
    looks again at least once a second.
    """

    def __init__(
        self,
        pool: PoolView[AnyEngine],
        settings: SchedulingSettings,
        *,
        secret: bytes,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._pool = pool
        self._settings = settings
        self._secret = secret
        self._clock = clock
        self._queue = FairQueue(settings)
        self._ledgers: dict[str, EngineLedger] = {}
        self._chooser = Chooser(settings, self._queue, self._ready, clock)
        self._gave_way: weakref.WeakSet[Work] = weakref.WeakSet()
        self._num_gave_way = 0
        self._returning: weakref.WeakSet[Work] = weakref.WeakSet()
        self._plan: dict[Job, Waiting] = {}
        self._planned_at_s = self._looked_at_s = float("-inf")
        self._largest_output_tokens = 0
        self._largest_prompt_tokens = 0
        self._most_running = 1

    @asynccontextmanager
    async def turn(
        self, work: Work, on_wait: Callable[[Waiting], None]
    ) -> AsyncIterator[Turn[AnyEngine]]:
        """Wait for the turn of ``work``; it lasts as long as the block.

        Args:
            work: the request.
            on_wait: called at once and then every second while it waits; never for one that need not.

        Raises:
            QueueFull: too much waits.
            QueueTimeout: its turn did not come by its deadline.
            PromptDoesNotFit: no engine of its model could ever hold it.
            EngineUnavailable: no engine that serves its model is ready.
        """
        job = self._admit(work)
        try:
            placement = await self._wait(job, on_wait)
            yield Turn(self, job, placement)
        finally:
            self._release(job)

    def keep_place(self, work: Work) -> None:
        """Let ``work``, whose turn came on an engine that was gone, wait again where it was.

        Its next :meth:`turn` is not refused because no engine is ready, nor because the queue is full.
        """
        self._returning.add(work)

    def forecast(self, work: Work) -> Waiting:
        """Return what ``work`` would be told if it came now."""
        job = self._job(work)
        return self._forecasts(job)[job]

    def predicted_cached_tokens(self, work: Work) -> int:
        """Return how many of its prompt's tokens an engine should find in its prefix cache."""
        return work.prompt.num_tokens - self._job(work).uncached_tokens

    # what a request goes through

    def _admit(self, work: Work) -> Job:
        ledgers = self._ready(work.model)
        if not ledgers and work not in self._returning:
            raise EngineUnavailable("No engine that serves this model is ready.")
        num_tokens = work.prompt.num_tokens
        capacities = [ledger.engine.facts.kv_capacity_tokens for ledger in ledgers]
        largest = max(
            (float("inf") if each is None else each for each in capacities), default=float("inf")
        )
        if num_tokens >= largest:
            raise PromptDoesNotFit(
                f"The prompt has {num_tokens} tokens; the engine's memory holds {largest:.0f}, answer included."
            )
        job = self._job(work)
        if self._queue.add(job, self._clock()):
            self._joined(work.tenant_id)
        self._start_what_can()
        # what can start needs no room, and one that had a turn has it already
        had_turn = work in self._gave_way or work in self._returning
        if job.placement is None and not had_turn:
            try:
                self._queue.check_room(job, self._told)
            except QueueFull:
                self._release(job)
                raise
        return job

    async def _wait(self, job: Job, on_wait: Callable[[Waiting], None]) -> Placement:
        work = job.work
        deadline_at_s = float("inf")
        if work.deadline_s is not None and work not in self._gave_way:
            deadline_at_s = work.arrived_at_s + work.deadline_s
        while job.placement is None:
            waiting = self._told(job)
            left_s = deadline_at_s - self._clock()
            if left_s <= 0:
                raise QueueTimeout(
                    f"No turn within {work.deadline_s:.0f} s.",
                    headers=wait_headers(waiting.expected_start_s, place=waiting.place),
                )
            on_wait(waiting)
            try:
                async with asyncio.timeout(min(REPORT_S, left_s)):
                    await job.has_started.wait()
            except TimeoutError:
                # nothing has happened, but an engine may have come back; one of all that wait looks
                if self._clock() - self._looked_at_s >= LOOK_S:
                    self._start_what_can()
        self._gave_way.discard(work)
        return job.placement

    def looked(self, job: Job, progress: ProgressView) -> bool:
        """Take over how far the engine is with a running request; returns whether it must give way."""
        if job.is_settled or job.engine_id is None:
            return False
        ledger = self._ledgers[job.engine_id]
        before_tokens, before_computed = self._prompt_done(job), job.computed_tokens
        job.look(progress)
        if not job.has_first_token:
            new_tokens = max(job.computed_tokens - before_computed, 0)
            self._lane(job, ledger).done(new_tokens, self._clock())
        for beside in ledger.besides:
            beside.has_progress |= beside.job is job and job.has_progress
        self._charge(job, ledger)
        # what is kept for others is kept at these
        interval = self._settings.state_interval_tokens
        now_tokens = self._prompt_done(job)
        has_passed_state = now_tokens // interval > before_tokens // interval
        if has_passed_state and not job.has_first_token:
            ledger.prefixes.add(job.chain, now_tokens, job.work.prompt.num_tokens)
        self._start_what_can()
        if has_passed_state and self._chooser.must_give_way(job, ledger):
            self._gave_way.add(job.work)
            self._num_gave_way += 1
            return True
        return False

    def prefilled(self, job: Job) -> None:
        """Take note of a request's first token."""
        if job.has_first_token or job.engine_id is None:
            return
        ledger, now_s = self._ledgers[job.engine_id], self._clock()
        self._leave_lane(job, ledger, job.left_tokens)
        job.has_first_token, job.first_token_at_s = True, now_s
        num_tokens = job.work.prompt.num_tokens
        ledger.prefixes.add(job.chain, num_tokens, num_tokens)
        self._charge(job, ledger)
        for other in self._queue.tenants[job.work.tenant_id].waiting:
            self._predict(other)
        self._start_what_can()

    def ended(self, job: Job, usage: UsageView | None) -> None:
        """Take note of a request's end, and of the engine's account of it."""
        if job.engine_id is None or job.is_settled:
            return
        self.prefilled(job)
        if usage is not None:
            job.settle(usage)
        job.is_settled = True
        ledger = self._ledgers[job.engine_id]
        ledger.ended(job, self._clock())
        self._largest_output_tokens = max(self._largest_output_tokens, job.output_tokens)
        self._charge(job, ledger)

    def _release(self, job: Job) -> None:
        """Forget a request; one that did not end is charged for what was computed."""
        if job.engine_id is not None:
            ledger = self._ledgers[job.engine_id]
            if not job.has_first_token:
                self._leave_lane(job, ledger, 0)
                done = self._prompt_done(job)
                ledger.prefixes.add(job.chain, done, job.work.prompt.num_tokens)
            job.is_settled = True
            self._charge(job, ledger)
            ledger.leave(job)
        self._chooser.forget(job)
        self._queue.remove(job)
        self._plan.pop(job, None)
        self._start_what_can()

    # the books

    def _start_what_can(self) -> None:
        self._looked_at_s = self._clock()
        for ledger in self._ledgers.values():
            if ledger.check_restart():
                for job in self._queue.waiting():
                    self._predict(job)
        while self._queue.num_queued:
            choice = self._chooser.choose()
            if choice is None:
                return
            self._start(*choice)

    def _start(self, job: Job, placement: Placement) -> None:
        ledger, work, now_s = placement.ledger, job.work, self._clock()
        job.engine_id = ledger.engine.engine_id
        job.uncached_tokens = work.prompt.num_tokens - placement.cached_tokens
        job.is_long = self._is_long(job)
        job.kv_tokens = ledger.kv_need_tokens(job)
        self._queue.start(job)
        self._largest_prompt_tokens = max(self._largest_prompt_tokens, work.prompt.num_tokens)
        tenant = self._queue.tenants[work.tenant_id]
        ledger.jobs.append(job)
        self._lane(job, ledger).started(now_s)
        if job.is_long:
            ledger.besides.append(Beside(job, tenant.account))
        self._charge(job, ledger)
        self._most_running = max(self._most_running, len(tenant.running))
        self._plan.pop(job, None)
        job.placement = placement
        job.has_started.set()

    def _charge(self, job: Job, ledger: EngineLedger) -> None:
        """Book what a running request owes by now: one piece ahead of what is done; at its end, what was done."""
        settings = self._settings
        piece_tokens = 0 if job.is_settled else settings.piece_tokens
        due = job.due_work(settings.output_token_cost, piece_tokens)
        tokens, job.charged_tokens = due - job.charged_tokens, due
        tenant = self._queue.tenants[job.work.tenant_id]
        if tokens:
            self._queue.shares.charge(tenant.account, tokens)
            for beside in ledger.besides:
                beside.charged(tenant.account, tokens)
        if self._queue.update(tenant):
            self._joined(tenant.tenant_id)

    def _joined(self, tenant_id: str) -> None:
        for ledger in self._ledgers.values():
            for beside in ledger.besides:
                beside.joined(tenant_id)

    def _lane(self, job: Job, ledger: EngineLedger) -> LaneRate:
        return ledger.long_rate if job.is_long else ledger.short_rate

    def _leave_lane(self, job: Job, ledger: EngineLedger, done_tokens: int) -> None:
        """Note that a prefill is through, or given up."""
        lane, now_s = self._lane(job, ledger), self._clock()
        lane.done(done_tokens, now_s)
        lane.stopped(now_s)
        ledger.besides = [beside for beside in ledger.besides if beside.job is not job]

    def _ready(self, model: str) -> list[EngineLedger]:
        ledgers = []
        for engine in self._pool.ready(model):
            ledger = self._ledgers.get(engine.engine_id)
            if ledger is None:
                ledger = self._ledgers[engine.engine_id] = EngineLedger(engine, self._settings)
            ledgers.append(ledger)
        return ledgers

    def _job(self, work: Work) -> Job:
        key = prefix_key(self._secret, work.tenant_id)
        job = Job(work, chain_of(work.prompt.block_hashes, key), work.prompt.num_tokens)
        self._predict(job)
        return job

    def _predict(self, job: Job) -> None:
        num_tokens = job.work.prompt.num_tokens
        cached = [
            ledger.prefixes.cached_tokens(job.chain, num_tokens)
            for ledger in self._ready(job.work.model)
        ]
        job.uncached_tokens = num_tokens - max(cached, default=0)

    @staticmethod
    def _prompt_done(job: Job) -> int:
        """Return how much of a prompt the engine holds."""
        return job.work.prompt.num_tokens - job.left_tokens

    def engine(self, placement: Placement) -> AnyEngine:
        """Return the engine of a placement."""
        return self._pool.engines[placement.ledger.engine.engine_id]

    def salt(self, work: Work) -> str:
        """Return the ``cache_salt`` of a request."""
        return cache_salt(self._secret, work.tenant_id)

    # what others are told

    def _told(self, job: Job) -> Waiting:
        if self._clock() - self._planned_at_s > FORECAST_S:
            self._plan, self._planned_at_s = self._forecasts(), self._clock()
        if job not in self._plan:
            # one that has just come is behind its tenant's others of its kind; where there are none, it is all new
            for other in reversed(self._queue.tenants[job.work.tenant_id].waiting):
                told = self._plan.get(other)
                if told is not None and self._is_long(other) is self._is_long(job):
                    self._plan[job] = told.behind(other.uncached_tokens, job.uncached_tokens)
                    break
            else:
                self._plan, self._planned_at_s = self._forecasts(), self._clock()
        return self._plan[job]

    def _is_long(self, job: Job) -> bool:
        return job.uncached_tokens > self._settings.long_prompt_tokens

    def _forecasts(self, extra: Job | None = None) -> dict[Job, Waiting]:
        """Play forward what waits, and ``extra`` as if it waited too."""
        now_s, queue = self._clock(), self._queue
        ledgers = [
            ledger
            for engine_id, ledger in self._ledgers.items()
            if any(engine.engine_id == engine_id for engine in self._pool.ready())
        ]
        if self._settings.order == "arrival":
            jobs = queue.by_arrival()
            return play_in_sequence([*jobs, extra] if extra else jobs, ledgers)
        lines = {}
        for tenant in queue.tenants.values():
            account = tenant.account
            jobs = queue.by_urgency(tenant, now_s)
            lines[tenant.tenant_id] = Line(account.work, account.weight, jobs)
        if extra is not None:
            tenant_id = extra.work.tenant_id
            line = lines.get(tenant_id)
            if line is None:
                work, weight = queue.shares.level(), extra.work.tier.weight
                known = queue.shares.accounts.get(tenant_id)
                line = Line(max(work, known.work) if known else work, weight, [])
            jobs = sorted([*line.jobs, extra], key=lambda job: queue.urgency(job, now_s))
            lines[tenant_id] = Line(line.account_work, line.weight, jobs)
        return play_forward(lines, ledgers, self._settings)

    def snapshot(self) -> SchedulerSnapshot:
        """Return everything that the admin page, metrics and autoscaling want to know."""
        queue, now_s = self._queue, self._clock()
        plan = self._forecasts()
        drains = [each.expected_first_token_s for each in plan.values()]
        return SchedulerSnapshot(
            num_queued=queue.num_queued,
            queued_tokens=queue.queued_tokens,
            queued_work_tokens=sum(job.uncached_tokens for job in queue.waiting()),
            expected_drain_s=None
            if None in drains
            else max((each for each in drains if each is not None), default=0.0),
            tenants=tuple(
                tenant_snapshot(each, queue.shares, now_s) for each in queue.tenants.values()
            ),
            engines=tuple(
                engine_snapshot(ledger, engine_id in {e.engine_id for e in self._pool.ready()})
                for engine_id, ledger in self._ledgers.items()
            ),
            service_gap_tokens=queue.shares.gap.largest,
            service_gap_now_tokens=queue.shares.gap.current,
            service_gap_bound_tokens=self._gap_bound(),
            num_gave_way=self._num_gave_way,
            num_refused=queue.num_refused,
            queues=queue_snapshots(queue.waiting()),
        )

    def _gap_bound(self) -> float:
        lightest = min((a.weight for a in self._queue.shares.accounts.values()), default=1.0)
        outputs = self._most_running * self._largest_output_tokens
        return gap_bound_tokens(self._settings, lightest, outputs, self._largest_prompt_tokens)


def _vllm_priority(job: Job) -> int:
    """Return tier first, then length: each doubling from 1,024 uncached tokens on comes later."""
    doublings = min((job.uncached_tokens // 1024).bit_length(), LENGTH_CLASSES - 1)
    return job.work.tier.priority * LENGTH_CLASSES + doublings
