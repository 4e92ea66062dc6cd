"""vLLM's schedulers with room for short requests beside long prefills, and snapshots where they are reused.

Only decisions are overridden: how many tokens of a request a step computes, and whether a waiting request is
looked at. Everything else, allocation and output handling above all, stays vLLM's.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from vllm_ext.progress import ProgressFile

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.engine import EngineCoreOutputs
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.request import Request

OPTIONS_KEY = "sala_scheduler"
"""Where the options stand in vLLM's ``--additional-config``."""
MIN_SNAPSHOT_BLOCKS = 4
"""A snapshot takes the memory of 3 blocks; below 4 newly computed ones it is cheaper to compute them again."""


@dataclass(frozen=True)
class SchedulerOptions:
    """How long prefills share the engine; see docs/decisions/0008-long-prefills.md."""

    long_prefill_tokens: int = 16_384
    """A request is long while more prompt tokens than this are left to compute."""
    long_chunk_tokens: int = 1024
    """Most tokens of a long prefill in one step while short requests are about, to its end: behind a million
    tokens the last ones take the most time. vLLM's own ``long_prefill_token_threshold``, where set, still holds for
    every request."""
    quiet_s: float = 30.0
    """Time since a short request arrived after which long prefills take whole steps again."""
    long_steps_per_gap: int = 8
    """Steps a long prefill computes between two gaps, of one or two steps, for newly arrived short requests."""
    max_long_prefills: int = 1
    """Long prefills that run at the same time; the others wait in order of arrival."""
    max_overtakes: int = 64
    """Requests that may pass one that does not fit in memory; then they wait until it does."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value, minimum = getattr(self, field.name), 0 if field.name in _MAY_BE_ZERO else 1
            if isinstance(value, bool) or not isinstance(value, int | float) or value < minimum:
                raise ValueError(f"{field.name}: expected at least {minimum}, got {value!r}")

    @classmethod
    def from_config(cls, additional_config: Mapping[str, Any]) -> SchedulerOptions:
        """Read the options out of vLLM's ``additional_config``.

        Raises:
            ValueError: a name is unknown or a value out of range.
        """
        given = additional_config.get(OPTIONS_KEY, {})
        names = {field.name for field in fields(cls)}
        if unknown := set(given) - names:
            raise ValueError(f"{OPTIONS_KEY}: expected {sorted(names)}, got {sorted(unknown)}")
        return cls(**given)


_MAY_BE_ZERO = ("quiet_s", "max_overtakes")


@dataclass
class _Misfit:
    """A waiting request that was refused memory, and how things stood then."""

    request: Request
    num_free_blocks: int
    num_refusals: int = 0
    num_overtakes: int = 0


class _SharedSteps(Scheduler):
    """The overridden decisions, for either of vLLM's schedulers."""

    def __init__(self, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(vllm_config, *args, **kwargs)
        self._options = SchedulerOptions.from_config(vllm_config.additional_config)
        self._keeps_snapshots = self.cache_config.mamba_cache_mode == "align"
        # the hook that decides chunks is then asked whether or not states are cached
        self.need_mamba_block_aligned_split = True
        self._last_short_at_s = float("-inf")
        self._num_long_steps_since_gap = self._options.long_steps_per_gap
        self._num_uncached_tokens: dict[str, int] = {}
        self._began_long: set[str] = set()
        self._misfit: _Misfit | None = None
        self._progress = ProgressFile.of_engine(vllm_config)
        if self._progress is not None:
            self._progress.step_ended(self, num_tokens=0)
        # of the step being scheduled
        self._num_gap_steps = 0
        self._chunk_limit_tokens: int | None = None
        self._has_long_chunk = False
        self._tried: Request | None = None
        self._tried_tokens = 0

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        """Schedule one step; see the base class."""
        self._begin_step()
        output = super().schedule(throttle_prefills)
        self._end_step(num_admitted=len(output.scheduled_new_reqs))
        if self._progress is not None:
            self._progress.step_begins(self, output.total_num_scheduled_tokens)
        return output

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        """Take a step's results; see the base class."""
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        if self._progress is not None:
            self._progress.step_ended(self, scheduler_output.total_num_scheduled_tokens)
        return outputs

    def shutdown(self) -> None:
        """End; see the base class."""
        if self._progress is not None:
            self._progress.remove()
        super().shutdown()

    def _begin_step(self) -> None:
        options, now_s = self._options, time.monotonic()
        self._num_uncached_tokens = {
            request.request_id: self._num_uncached_tokens[request.request_id]
            for request in self.waiting
            if request.request_id in self._num_uncached_tokens
        }
        self._began_long &= {request.request_id for request in self.running}
        is_short_waiting = any(not self._is_long(request) for request in self.waiting)
        if is_short_waiting:
            self._last_short_at_s = now_s
        # who reads one document after another brings no short requests, only answers while they are written
        is_answering = any(
            not self._is_long(request) and not self._is_long_rest(request)
            for request in self.running
        )
        is_quiet = not is_answering and now_s - self._last_short_at_s > options.quiet_s
        self._chunk_limit_tokens = None if is_quiet else options.long_chunk_tokens
        if self._num_gap_steps == 1:
            # vLLM computes a prompt's last tokens in a step of their own, to keep the state before them
            is_gap = any(
                r.is_prefill_chunk and r.request_id not in self._began_long for r in self.running
            )
        else:
            is_gap = (
                is_short_waiting
                and len(self.running) < self.max_num_active_reqs
                and self._num_long_steps_since_gap >= options.long_steps_per_gap
            )
        self._num_gap_steps = self._num_gap_steps + 1 if is_gap else 0
        self._has_long_chunk, self._tried, self._tried_tokens = False, None, 0

    def _end_step(self, num_admitted: int) -> None:
        if self._num_gap_steps:
            self._num_long_steps_since_gap = 0
        elif self._has_long_chunk:
            self._num_long_steps_since_gap += 1

        # looked at, given tokens, and yet not running: there was no memory for it
        tried, misfit = self._tried, self._misfit
        if tried is not None and self._tried_tokens and tried not in self.running:
            if misfit is None or misfit.request is not tried:
                misfit = _Misfit(tried, 0)
            misfit.num_free_blocks = self.kv_cache_manager.block_pool.get_num_free_blocks()
            misfit.num_refusals += 1
        elif misfit is not None:
            misfit.num_overtakes += num_admitted
            if misfit.request not in self.waiting:
                misfit = None
        self._misfit = misfit

    def _is_long(self, request: Request) -> bool:
        num_left = request.num_tokens - request.num_computed_tokens
        if num_left <= self._options.long_prefill_tokens:
            return False
        if request.num_computed_tokens == 0:
            num_left = self._uncached(request)
        return num_left > self._options.long_prefill_tokens

    def _is_long_rest(self, request: Request) -> bool:
        """Tell whether this is the end of a prompt that began long."""
        is_prompt = request.num_computed_tokens < request.num_prompt_tokens
        return is_prompt and request.request_id in self._began_long

    def _uncached(self, request: Request) -> int:
        """Tokens that are not in the prefix cache; looked up once per wait, as a million take milliseconds."""
        known = self._num_uncached_tokens.get(request.request_id)
        if known is None:
            known = request.num_tokens - self.kv_cache_manager.get_computed_blocks(request)[1]
            self._num_uncached_tokens[request.request_id] = known
        return known

    def _handle_blocked_waiting_request(self, request: Request) -> bool:
        """Tell whether a waiting request may start in this step; if not, those behind it are looked at."""
        if not super()._handle_blocked_waiting_request(request):
            return False
        if not self._holds_kv_blocks(request):
            if self._is_long(request):
                num_long = sum(self._is_long(other) for other in self.running)
                if num_long >= self._options.max_long_prefills:
                    # by the time that the other one is done, this may have become a repetition of it
                    self._num_uncached_tokens.pop(request.request_id, None)
                    return False
            misfit = self._misfit
            if (
                misfit is not None
                and misfit.request is request
                # a request that shares a block with one of this very step is refused once, for one step
                and misfit.num_refusals > 1
                and misfit.num_overtakes < self._options.max_overtakes
                and self.kv_cache_manager.block_pool.get_num_free_blocks() <= misfit.num_free_blocks
            ):
                return False
        self._tried, self._tried_tokens = request, 0
        return True

    def _mamba_block_aligned_split(
        self,
        request: Request,
        num_new_tokens: int,
        num_new_local_computed_tokens: int = 0,
        num_external_computed_tokens: int = 0,
    ) -> int:
        """Cut a request's chunk; 0 leaves it out of this step.

        States are only kept where a chunk ends, so chunks end where the policy wants a snapshot
        (docs/decisions/0007-prefix-cache-policy.md).
        """
        start = (
            request.num_computed_tokens
            + num_new_local_computed_tokens
            + num_external_computed_tokens
        )
        block = self.block_size
        num_tokens = num_new_tokens
        if self._keeps_snapshots:
            self._place_snapshot(request, start)
            num_tokens = super()._mamba_block_aligned_split(
                request, num_tokens, num_new_local_computed_tokens, num_external_computed_tokens
            )
            if interval := self.cache_config.prefix_cache_retention_interval:
                num_tokens = min(num_tokens, interval - start % interval)
        if request.num_tokens - start > self._options.long_prefill_tokens:
            self._began_long.add(request.request_id)
        if request.request_id in self._began_long and start < request.num_prompt_tokens:
            is_running = request is not self._tried
            if self._num_gap_steps and is_running:
                return 0
            if self._chunk_limit_tokens is not None and num_tokens > self._chunk_limit_tokens:
                end = start + self._chunk_limit_tokens
                # a state may be carried on inside a block, but not past its end
                boundary = end // block * block
                num_tokens = (boundary if boundary > start else end) - start
            self._has_long_chunk |= num_tokens > 0
        if request is self._tried:
            self._tried_tokens = num_tokens
        return num_tokens

    def _place_snapshot(self, request: Request, start: int) -> None:
        """Have the state kept one whole block before the prompt's last boundary.

        vLLM keeps it at the last boundary, which a question after a document may have crossed; then the next
        question would find nothing. A junction that vLLM observed comes first.
        """
        if request.shared_prefix_boundary > start:
            return
        boundary = ((request.num_prompt_tokens - 1) // self.block_size - 1) * self.block_size
        if boundary - start >= MIN_SNAPSHOT_BLOCKS * self.block_size:
            request.shared_prefix_boundary = boundary


class SalaScheduler(_SharedSteps):
    """For engines that wait for one step before scheduling the next."""


class SalaAsyncScheduler(_SharedSteps, AsyncScheduler):
    """For engines that schedule a step while the one before runs."""


def sala_scheduler(vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> Scheduler:
    """Make the scheduler that the engine's final settings call for (vLLM's ``--scheduler-cls``).

    A function, because whether scheduling is asynchronous is only decided after a model's defaults are.
    """
    is_async = vllm_config.scheduler_config.async_scheduling
    return (SalaAsyncScheduler if is_async else SalaScheduler)(vllm_config, *args, **kwargs)
