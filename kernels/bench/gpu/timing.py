"""Times of device work: medians over replays, with inputs that cannot stay in the L2 cache."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

L2_BYTES = 64 << 20
ROTATED_BYTES = 2 * L2_BYTES
"""Inputs of a short kernel are rotated over at least this much."""
GRAPH_BELOW_US = 1000.0
"""A faster call is timed inside a CUDA graph, so that launching it from Python is not measured."""
LAUNCHES_PER_GRAPH = 32
GRAPH_REPLAYS = 10
LONG_REPEATS = 7
CPU_REPEATS = 3


@dataclass(frozen=True)
class Ceilings:
    """What the device reaches in this run."""

    bytes_per_s: float
    flops_per_s: float

    def bound_us(self, num_bytes: int, num_flops: int) -> tuple[float, str]:
        """Return the shortest possible time and what limits it."""
        memory_us = num_bytes / self.bytes_per_s * 1e6
        compute_us = num_flops / self.flops_per_s * 1e6
        return (memory_us, "memory") if memory_us > compute_us else (compute_us, "compute")


def copies_beyond_l2(touched_bytes: int, limit: int = 64) -> int:
    """Count the input sets that a short kernel has to rotate over."""
    return min(limit, -(-ROTATED_BYTES // max(touched_bytes, 1)))


def times_us(calls: Sequence[Callable[[], object]], device: str) -> list[float]:
    """Time a call; ``calls`` are the same work on different inputs.

    Returns:
        Microseconds of one call, several times: on a GPU the mean of a graph's launches for each replay, or single
        calls after the L2 cache was overwritten if they are long.
    """
    for call in calls:
        call()
    if device == "cpu":
        return [_wall_us(call) for call in islice(cycle(calls), CPU_REPEATS)]
    first_us = _event_us(calls[0])
    if first_us > GRAPH_BELOW_US:
        overwrite = torch.empty(4 * L2_BYTES, dtype=torch.uint8, device=device)
        times = []
        for call in islice(cycle(calls), LONG_REPEATS):
            overwrite.zero_()
            times.append(_event_us(call))
        return times
    num_launches = max(LAUNCHES_PER_GRAPH, len(calls))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in islice(cycle(calls), num_launches):
            call()
    graph.replay()
    return [_event_us(graph.replay) / num_launches for _ in range(GRAPH_REPLAYS)]


def _wall_us(call: Callable[[], object]) -> float:
    start_s = time.perf_counter()
    call()
    return (time.perf_counter() - start_s) * 1e6


def _event_us(call: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    elapsed_ms: float = start.elapsed_time(end)
    return elapsed_ms * 1e3


def measure_ceilings(device: str) -> Ceilings:
    """Measure a large copy and a large matrix product."""
    is_cpu = device == "cpu"
    dtype = torch.float32 if is_cpu else torch.bfloat16
    source = torch.empty((16 << 20) if is_cpu else (2 << 30), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy_us = min(times_us([partial(target.copy_, source)], device))
    size = 256 if is_cpu else 8192
    # normal values: a GPU multiplies zeros faster than it can multiply anything else
    a, b = torch.randn(2, size, size, device=device, dtype=dtype).unbind()
    product_us = min(times_us([lambda: a @ b], device))
    return Ceilings(2 * source.numel() / copy_us * 1e6, 2 * size**3 / product_us * 1e6)
