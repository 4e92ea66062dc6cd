"""An engine in virtual time, to play hours of million-token prompts against the scheduler in seconds.

It computes what vLLM with our scheduler would: chunks of prompts and one token of each answer in steps, long
prefills in small chunks while short requests are about, states kept for reuse at the same places. How long a step
takes comes from measured times (:mod:`fairness.speeds`).
"""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sala_serve.tokens.prompt import PREFIX_BLOCK_TOKENS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from fairness.speeds import Speeds


@dataclass(frozen=True)
class Facts:
    """See :class:`sala_serve.scheduling.work.FactsView`."""

    max_model_len: int | None = 1_050_624
    kv_capacity_tokens: int | None = 13_490_000
    max_num_seqs: int | None = 64


@dataclass(frozen=True)
class SimulatedPrompt:
    """See :class:`sala_serve.scheduling.work.PromptView`."""

    num_tokens: int
    block_hashes: tuple[bytes, ...] = ()


@dataclass(frozen=True)
class SimulatedUsage:
    """See :class:`sala_serve.scheduling.work.UsageView`."""

    num_prompt_tokens: int
    num_cached_tokens: int
    num_completion_tokens: int


@dataclass(eq=False)
class SimulatedRequest:
    """A request inside the engine; also its progress."""

    prompt: SimulatedPrompt
    salt: str
    wanted_output_tokens: int
    submitted_at_s: float
    priority: int = 0
    began_long: bool = False
    phase: str = "waiting"
    num_computed_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    has_first_token: asyncio.Event = field(default_factory=asyncio.Event)
    is_done: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def num_prompt_tokens(self) -> int:
        """Cached ones included."""
        return self.prompt.num_tokens

    @property
    def num_left(self) -> int:
        """Prompt tokens to compute."""
        return self.num_prompt_tokens - self.num_computed_tokens

    @property
    def usage(self) -> SimulatedUsage:
        """As at the end of an answer."""
        return SimulatedUsage(
            self.num_prompt_tokens, self.num_cached_tokens, self.num_output_tokens
        )


@dataclass(frozen=True)
class EngineOptions:
    """As in ``vllm_ext.scheduler.SchedulerOptions``; without ``has_long_rule`` it is vLLM's own scheduler."""

    step_tokens: int = 8448
    long_prefill_tokens: int = 16_384
    long_chunk_tokens: int = 1024
    quiet_s: float = 30.0
    long_steps_per_gap: int = 8
    max_long_prefills: int = 1
    has_long_rule: bool = True
    state_interval_tokens: int = 65_536
    engine_block_tokens: int = 2048
    match_unit_tokens: int = 64


class SimulatedEngine:
    """See :class:`sala_serve.scheduling.work.EngineView`; ``run`` computes."""

    def __init__(
        self,
        engine_id: str,
        speeds: Speeds,
        clock: Callable[[], float],
        *,
        facts: Facts | None = None,
        options: EngineOptions | None = None,
    ) -> None:
        self.engine_id = engine_id
        self.facts = facts or Facts()
        self.num_starts = 1
        self.is_ready = True
        self.requests: dict[str, SimulatedRequest] = {}
        self.prefilled: Counter[str] = Counter()
        """Prompt tokens computed so far, by cache salt, that is by tenant."""
        self._speeds = speeds
        self._clock = clock
        self._options = options or EngineOptions()
        self._running: list[SimulatedRequest] = []
        self._waiting: list[SimulatedRequest] = []
        self._has_work = asyncio.Event()
        self._kept: OrderedDict[tuple[str, bytes], bool] = OrderedDict()
        self._last_short_at_s = float("-inf")
        self._num_long_steps = self._options.long_steps_per_gap
        self._num_gap_steps = 0
        self._step_began_at_s = 0.0

    @property
    def progress(self) -> Mapping[str, SimulatedRequest]:
        """By request id."""
        return self.requests

    @property
    def prefilled_tokens(self) -> int:
        """Prompt tokens computed so far."""
        return self.prefilled.total()

    @property
    def kv_used_tokens(self) -> int:
        """Held by running requests; shared ones counted for each."""
        return sum(each.num_computed_tokens + each.num_output_tokens for each in self._running)

    def submit(
        self,
        request_id: str,
        prompt: SimulatedPrompt,
        salt: str,
        output_tokens: int,
        priority: int = 0,
    ) -> SimulatedRequest:
        """Send a request; of those that wait, a smaller priority is looked at earlier."""
        request = SimulatedRequest(prompt, salt, output_tokens, self._clock(), priority)
        self.requests[request_id] = request
        self._waiting.append(request)
        self._has_work.set()
        return request

    def close(self, request_id: str) -> None:
        """Stop a request, wherever it is."""
        request = self.requests.pop(request_id)
        for each in (self._waiting, self._running):
            if request in each:
                each.remove(request)

    def restart(self) -> None:
        """Lose the prefix cache."""
        self._kept.clear()
        self.num_starts += 1

    async def run(self) -> None:
        """Compute for ever; cancel to stop."""
        while True:
            if not self._running and not self._waiting:
                self._has_work.clear()
                await self._has_work.wait()
                self._step_began_at_s = self._clock()
            began_at_s = self._clock()
            chunks = self._schedule(began_at_s)
            # with asynchronous scheduling a step is decided while the one before runs
            self._step_began_at_s = began_at_s
            await asyncio.sleep(
                self._speeds.step_s(
                    (request.num_computed_tokens, num_tokens)
                    for request, num_tokens in chunks.items()
                    if request.num_left
                )
            )
            self._apply(chunks)

    def _is_long(self, request: SimulatedRequest) -> bool:
        return self._options.has_long_rule and request.num_left > self._options.long_prefill_tokens

    def _takes_small_steps(self, request: SimulatedRequest) -> bool:
        return self._is_long(request) or (request.began_long and request.num_left > 0)

    def _schedule(self, now_s: float) -> dict[SimulatedRequest, int]:
        options = self._options
        seen = [each for each in self._waiting if each.submitted_at_s <= self._step_began_at_s]
        seen.sort(key=lambda each: each.priority)
        for request in seen:
            if not request.num_computed_tokens:
                request.num_computed_tokens = self._hit(request)
        is_short_waiting = any(not self._is_long(each) for each in seen)
        if is_short_waiting:
            self._last_short_at_s = now_s
        is_answering = any(not self._takes_small_steps(each) for each in self._running)
        is_quiet = not is_answering and now_s - self._last_short_at_s > options.quiet_s
        if self._num_gap_steps == 1:
            is_gap = any(r.num_left and not self._takes_small_steps(r) for r in self._running)
        else:
            is_gap = is_short_waiting and self._num_long_steps >= options.long_steps_per_gap
        self._num_gap_steps = self._num_gap_steps + 1 if is_gap else 0
        budget, chunks, has_long = options.step_tokens, {}, False

        for request in self._running:
            is_small = self._takes_small_steps(request)
            if is_gap and is_small:
                continue
            if num_tokens := self._chunk(request, budget, is_quiet):
                has_long |= is_small
                chunks[request] = num_tokens
                budget -= num_tokens
        for request in seen:
            if not budget or len(self._running) >= (self.facts.max_num_seqs or len(self._running)):
                break
            if self._is_long(request):
                if sum(map(self._is_long, self._running)) >= options.max_long_prefills:
                    continue
                has_long = request.began_long = True
            request.phase = "prefilling"
            request.num_cached_tokens = request.num_computed_tokens
            self._waiting.remove(request)
            self._running.append(request)
            chunks[request] = self._chunk(request, budget, is_quiet)
            budget -= chunks[request]
        self._num_long_steps = 0 if is_gap else self._num_long_steps + has_long
        return chunks

    def _chunk(self, request: SimulatedRequest, budget: int, is_quiet: bool) -> int:
        options, done = self._options, request.num_computed_tokens
        if not request.num_left:
            return min(1, budget)
        num_tokens = min(request.num_left, budget)
        if self._takes_small_steps(request) and not is_quiet:
            num_tokens = min(num_tokens, options.long_chunk_tokens)
        # states are kept where a step ends
        interval, unit = options.state_interval_tokens, options.match_unit_tokens
        num_tokens = min(num_tokens, interval - done % interval)
        # the one before a prompt's last tokens is kept, so these are a step of their own
        before_tail = (request.num_prompt_tokens - 1) // unit * unit - done
        return min(num_tokens, before_tail) if before_tail > 0 else num_tokens

    def _apply(self, chunks: Mapping[SimulatedRequest, int]) -> None:
        for request, num_tokens in chunks.items():
            if request not in self._running:
                continue
            if request.num_left:
                request.num_computed_tokens += num_tokens
                self.prefilled[request.salt] += num_tokens
                self._keep(request)
                if request.num_left:
                    continue
                request.phase = "decoding"
                request.has_first_token.set()
            request.num_output_tokens += 1
            if request.num_output_tokens >= request.wanted_output_tokens:
                request.is_done.set()
                self._running.remove(request)

    def _hit(self, request: SimulatedRequest) -> int:
        """Return how many tokens need not be computed: up to the last kept state."""
        best = 0
        for position, block in enumerate(request.prompt.block_hashes, 1):
            has_state = self._kept.get((request.salt, block))
            if has_state is None:
                break
            if has_state:
                best = position
        return min(best * PREFIX_BLOCK_TOKENS, request.num_prompt_tokens - 1)

    def _keep(self, request: SimulatedRequest) -> None:
        options, done = self._options, request.num_computed_tokens
        num_tokens, block_tokens = request.num_prompt_tokens, PREFIX_BLOCK_TOKENS
        if done % options.state_interval_tokens and request.num_left:
            return
        states = {done // block_tokens}
        if not request.num_left:
            before = (num_tokens - 1) // options.engine_block_tokens - 1
            states.add(before * options.engine_block_tokens // block_tokens)
        blocks = request.prompt.block_hashes[: done // block_tokens]
        for position in range(len(blocks), 0, -1):
            key = request.salt, blocks[position - 1]
            self._kept[key] = self._kept.pop(key, False) or position in states
        capacity = (self.facts.kv_capacity_tokens or 1 << 40) // block_tokens
        while len(self._kept) > capacity:
            self._kept.popitem(last=False)


class SimulatedPool:
    """See :class:`sala_serve.scheduling.work.PoolView`."""

    def __init__(self, engines: Sequence[SimulatedEngine]) -> None:
        self.engines = {engine.engine_id: engine for engine in engines}

    def ready(self, model: str | None = None) -> list[SimulatedEngine]:
        """Return those that are up; all serve every model."""
        return [engine for engine in self.engines.values() if engine.is_ready]
