"""One vLLM engine in processes of its own, and what a request to it is timed by."""

from __future__ import annotations

import asyncio
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING, Any

import torch

from gpu.environment import gpu_field
from gpu.settings import TPOT_TOKENS

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from vllm.v1.engine.async_llm import AsyncLLM


@dataclass
class Timed:
    """One request: when it was handed over, and when each output came."""

    sent_at_s: float
    cached_tokens: int = 0
    arrivals: list[tuple[float, int]] = field(default_factory=list)
    """Instant and number of tokens of each output."""
    tokens: list[int] = field(default_factory=list)
    """Everything generated."""

    @property
    def ttft_s(self) -> float:
        """From handing the ids to the engine until the first output; includes sending them."""
        return self.arrivals[0][0] - self.sent_at_s

    @property
    def tpot_s(self) -> float:
        """Mean over the tokens after the first output."""
        (first_s, _), *rest = self.arrivals
        return (rest[-1][0] - first_s) / sum(tokens for _, tokens in rest)

    def num_tokens(self, from_s: float, to_s: float) -> int:
        """Count the tokens that came in (from_s, to_s]."""
        return sum(tokens for at_s, tokens in self.arrivals if from_s < at_s <= to_s)


@dataclass
class Stats:
    """What a vLLM stat logger of ours keeps; may be reset at any time."""

    max_kv_cache_usage_frac: float = 0.0
    """Of all blocks."""
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0

    def factory(self) -> Any:
        """Return the class that vLLM instantiates."""
        from vllm.v1.metrics.loggers import StatLoggerBase

        stats = self

        class Logger(StatLoggerBase):
            def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
                pass

            def record(self, scheduler_stats: Any, *args: Any, **kwargs: Any) -> None:
                if scheduler_stats is None:
                    return
                usage_frac = scheduler_stats.kv_cache_usage
                stats.max_kv_cache_usage_frac = max(stats.max_kv_cache_usage_frac, usage_frac)
                if drafts := scheduler_stats.spec_decoding_stats:
                    stats.num_draft_tokens += drafts.num_draft_tokens
                    stats.num_accepted_tokens += drafts.num_accepted_tokens

            def log_engine_initialized(self) -> None:
                pass

        return Logger


class Engine:
    """Sends requests of random ids to a running engine."""

    def __init__(self, llm: AsyncLLM, start_s: float, stats: Stats) -> None:
        self.llm = llm
        self.start_s = start_s
        self.stats = stats
        self._ids = count()
        self._generator = torch.Generator().manual_seed(0)

    @property
    def config(self) -> Any:
        """VLLM's configuration, as the running engine completed it."""
        return self.llm.vllm_config

    def random_ids(self, num_tokens: int) -> list[int]:
        """Return ids that no earlier call returned in this order."""
        high = self.config.model_config.get_vocab_size()
        ids: list[int] = torch.randint(3, high, (num_tokens,), generator=self._generator).tolist()
        return ids

    async def stream(self, ids: list[int], max_tokens: int, timed: Timed) -> None:
        """Run one request greedily to ``max_tokens``, filling ``timed`` as outputs come."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            temperature=0,
            max_tokens=max_tokens,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        prompt = {"prompt_token_ids": ids}
        async for output in self.llm.generate(prompt, params, f"bench-{next(self._ids)}"):
            if output.outputs and (tokens := output.outputs[0].token_ids):
                timed.arrivals.append((time.perf_counter(), len(tokens)))
                timed.tokens += tokens
                timed.cached_tokens = output.num_cached_tokens or 0

    async def timed(self, ids: list[int], max_tokens: int = TPOT_TOKENS + 1) -> Timed:
        """Run one request to its end."""
        timed = Timed(time.perf_counter())
        await self.stream(ids, max_tokens, timed)
        return timed

    def describe(self) -> dict[str, Any]:
        """Return the settings that decide speed and memory, as resolved by vLLM and the plugin."""
        scheduler, cache = self.config.scheduler_config, self.config.cache_config
        compilation = self.config.compilation_config
        scheduler_class = scheduler.get_scheduler_cls()
        return {
            "start_s": round(self.start_s, 1),
            "dtype": str(self.config.model_config.dtype),
            "load_format": self.config.load_config.load_format,
            "max_model_len": self.config.model_config.max_model_len,
            "max_num_batched_tokens": scheduler.max_num_batched_tokens,
            "max_num_seqs": scheduler.max_num_seqs,
            "long_prefill_token_threshold": scheduler.long_prefill_token_threshold,
            "scheduler": f"{scheduler_class.__module__}.{scheduler_class.__name__}",
            "additional_config": self.config.additional_config,
            "async_scheduling": scheduler.async_scheduling,
            "compilation_mode": getattr(compilation.mode, "name", None),
            "cudagraph_mode": getattr(compilation.cudagraph_mode, "name", None),
            "prefix_caching": cache.enable_prefix_caching,
            "prefix_match_unit": getattr(cache, "prefix_match_unit", None),
            "prefix_cache_retention_interval": getattr(
                cache, "prefix_cache_retention_interval", None
            ),
            "block_tokens": cache.block_size,
            "num_blocks": cache.num_gpu_blocks,
            "max_concurrency": getattr(cache, "kv_cache_max_concurrency", None),
            "gpu_memory_used_mib": gpu_field("memory.used"),
        }


@asynccontextmanager
async def running(arguments: dict[str, Any]) -> AsyncIterator[Engine]:
    """Start an engine with ``arguments`` of vLLM's AsyncEngineArgs; shut it down at the end."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    start_s = time.perf_counter()
    stats = Stats()
    llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments), stat_loggers=[stats.factory()])
    try:
        yield Engine(llm, time.perf_counter() - start_s, stats)
    finally:
        llm.shutdown()


async def decode_together(
    engine: Engine, prompts: list[list[int]], window_tokens: int
) -> tuple[float, dict[str, Any]]:
    """Decode all prompts at once; measure while every one of them is generating.

    Returns:
        Tokens a second of all requests together, and what was counted. The window opens with the first token of the last
        request to start and closes ``window_tokens`` tokens later.
    """
    # more tokens than the first request can generate while the others' prompts are computed
    max_tokens = engine.config.model_config.max_model_len - max(map(len, prompts))
    requests = [Timed(time.perf_counter()) for _ in prompts]
    async with asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(engine.stream(ids, max_tokens, timed))
            for ids, timed in zip(prompts, requests, strict=True)
        ]
        while not all(timed.arrivals for timed in requests):
            _require_unfinished(tasks)
            await asyncio.sleep(0.01)
        last = max(requests, key=lambda timed: timed.arrivals[0][0])
        opened_s = last.arrivals[0][0]
        while sum(tokens for _, tokens in last.arrivals) <= window_tokens:
            _require_unfinished(tasks)
            await asyncio.sleep(0.01)
        closed_s = last.arrivals[-1][0]
        for task in tasks:
            task.cancel()
    tokens = sum(timed.num_tokens(opened_s, closed_s) for timed in requests)
    window_s = closed_s - opened_s
    counted = {"window_s": round(window_s, 3), "tokens": tokens}
    counted["all_generating_after_s"] = round(opened_s - requests[0].sent_at_s, 2)
    return tokens / window_s, counted


def _require_unfinished(tasks: list[asyncio.Task[None]]) -> None:
    if any(task.done() for task in tasks):
        raise RuntimeError("a request ended before all were generating: raise max_model_len")
