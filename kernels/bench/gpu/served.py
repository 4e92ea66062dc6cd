"""Stages that time requests: SALA, full attention, and short requests beside a long prefill."""

from __future__ import annotations

import asyncio
import re
import time
from typing import TYPE_CHECKING, Any

from gpu.engine import Engine, Timed, decode_together, running
from gpu.environment import gpu_field
from gpu.results import spread
from gpu.settings import (
    QUESTION_TOKENS,
    SHORT_OUTPUT_TOKENS,
    SHORT_TOKENS,
    TPOT_TOKENS,
    Scale,
)

if TYPE_CHECKING:
    from pathlib import Path

    from gpu.results import Recorder
    from sala_kernels.spec import SalaSpec

STATE_COPIES = 2
"""States a running request holds while its prefix is cached: the block it left and the one it is in."""
IDLE_REQUESTS = 10
NUM_FOLLOW_UPS = 3


async def measure_lengths(
    engine: Engine, record: Recorder, lengths: dict[int, int]
) -> dict[int, list[int]]:
    """Time prompts of random ids one at a time; return the last prompt of each length."""
    prompts = {}
    for num_tokens, repeats in sorted(lengths.items()):
        runs = []
        for _ in range(repeats):
            prompts[num_tokens] = engine.random_ids(num_tokens)
            runs.append(await engine.timed(prompts[num_tokens]))
        record.write(
            "latency",
            prompt_tokens=num_tokens,
            ttft_s=spread([run.ttft_s for run in runs]),
            tpot_s=spread([run.tpot_s for run in runs]),
            tpot_tokens=TPOT_TOKENS,
            cached_tokens=[run.cached_tokens for run in runs],
        )
    return prompts


async def warm_up(engine: Engine, scale: Scale) -> None:
    """Run what the first request would otherwise pay for: kernel compilation, first allocations."""
    for num_tokens in scale.warm_up_tokens:
        await engine.timed(engine.random_ids(num_tokens), max_tokens=8)


async def sala(record: Recorder, scale: Scale, folder: Path, log: Path) -> None:
    """Latency by length, follow-up questions on the longest prompt, decode throughput, memory."""
    arguments = scale.sala_arguments(folder, one_request=True)
    async with running(arguments) as engine:
        record.write("engine", **engine.describe())
        await warm_up(engine, scale)
        engine.stats.max_kv_cache_usage_frac = 0.0
        prompts = await measure_lengths(engine, record, scale.lengths)
        longest = max(prompts)
        record_memory(engine, record, arguments, longest, log)
        document = prompts[longest][:-QUESTION_TOKENS]
        for order in range(NUM_FOLLOW_UPS):
            run = await engine.timed(document + engine.random_ids(QUESTION_TOKENS))
            record.write(
                "follow_up",
                prompt_tokens=longest,
                order=order,
                ttft_s=spread([run.ttft_s]),
                tpot_s=spread([run.tpot_s]),
                cached_tokens=run.cached_tokens,
            )
        num_requests, num_tokens = scale.batch
        for together in (1, num_requests):
            documents = [engine.random_ids(num_tokens) for _ in range(together)]
            rate, counted = await decode_together(engine, documents, 2 * TPOT_TOKENS)
            record.write(
                "decode_throughput",
                requests=together,
                prompt_tokens=num_tokens,
                documents="distinct",
                tokens_per_s=round(rate, 2),
                **counted,
            )


def record_memory(
    engine: Engine,
    record: Recorder,
    arguments: dict[str, Any],
    num_tokens: int,
    log: Path,
) -> None:
    """Compare the most blocks ever held, by the request of ``num_tokens``, with the model's formula."""
    spec: SalaSpec = engine.config.model_config.hf_config.spec
    element_bytes = engine.config.model_config.dtype.itemsize
    cache = engine.config.cache_config
    pool_bytes = arguments.get("kv_cache_memory_bytes") or pool_bytes_in(log)
    formula = num_tokens * spec.kv_bytes_per_token(element_bytes)
    formula += STATE_COPIES * spec.state_bytes_per_request()
    # vLLM keeps one block as a null block and leaves it out of its usage
    held_blocks = round(engine.stats.max_kv_cache_usage_frac * (cache.num_gpu_blocks - 1))
    fields = {
        "formula_bytes": round(formula),
        "held_blocks": held_blocks,
        "contexts_resident": (cache.num_gpu_blocks - 1) // max(held_blocks, 1),
        "engine_concurrency": getattr(cache, "kv_cache_max_concurrency", None),
        "gpu_memory_used_mib": gpu_field("memory.used"),
    }
    if pool_bytes:
        held_bytes = held_blocks * pool_bytes / cache.num_gpu_blocks
        fields |= {"pool_bytes": pool_bytes, "held_bytes": round(held_bytes)}
        fields |= {"held_over_formula": round(held_bytes / formula, 4)}
    record.write("memory", prompt_tokens=num_tokens, **fields)


def pool_bytes_in(log: Path) -> int | None:
    """Read the size of the KV cache from vLLM's log of this stage."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    found = re.findall(r"Available KV cache memory: ([\d.]+) GiB", text)
    return round(float(found[-1]) * 2**30) if found else None


async def full_attention(record: Recorder, scale: Scale, folder: Path) -> None:
    """The yardstick: latency by length of a dense model of the same size, at its best settings."""
    async with running(scale.full_attention_arguments(folder)) as engine:
        record.write("engine", **engine.describe())
        await warm_up(engine, scale)
        await measure_lengths(engine, record, scale.full_attention_lengths)


async def serving(record: Recorder, scale: Scale, folder: Path) -> None:
    """Short requests alone and beside a long prefill, and what they cost it."""
    async with running(scale.sala_arguments(folder)) as engine:
        record.write("engine", **engine.describe())
        await warm_up(engine, scale)

        async def short() -> Timed:
            return await engine.timed(engine.random_ids(SHORT_TOKENS), SHORT_OUTPUT_TOKENS)

        # first: for a while after a short request the scheduler keeps long prefills to small steps
        alone = await engine.timed(engine.random_ids(scale.long_tokens), max_tokens=1)
        await short()
        idle = [await short() for _ in range(IDLE_REQUESTS)]
        record.write("short_idle", **latencies(idle), prompt_tokens=SHORT_TOKENS)
        interval_s = alone.ttft_s / (scale.num_arrivals + 1)
        long_ids = engine.random_ids(scale.long_tokens)
        async with asyncio.TaskGroup() as group:
            long_task = group.create_task(engine.timed(long_ids, max_tokens=1))
            started_s = time.perf_counter()
            arrivals = []
            for order in range(scale.num_arrivals):
                await asyncio.sleep(
                    max(0.0, started_s + (order + 1) * interval_s - time.perf_counter())
                )
                arrivals.append(group.create_task(short()))
        beside, long_run = [task.result() for task in arrivals], long_task.result()
        end_s = long_run.arrivals[0][0]
        during = [run for run in beside if run.sent_at_s < end_s]
        record.write(
            "short_beside",
            **latencies(during),
            max_ttft_s=round(max(run.ttft_s for run in during), 4),
            prompt_tokens=SHORT_TOKENS,
            interval_s=round(interval_s, 2),
        )
        record.write(
            "long_prefill",
            prompt_tokens=scale.long_tokens,
            alone_s=round(alone.ttft_s, 3),
            beside_s=round(long_run.ttft_s, 3),
            slowed_by_frac=round(long_run.ttft_s / alone.ttft_s - 1, 4),
        )


def latencies(runs: list[Timed]) -> dict[str, Any]:
    """Sum up requests of one kind."""
    return {
        "ttft_s": spread([run.ttft_s for run in runs]),
        "tpot_s": spread([run.tpot_s for run in runs]),
    }
