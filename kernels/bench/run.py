"""Measure the operators and the engine against references, in one run: `make bench`.

Prints one JSON line a measurement and a summary line; nothing but the failure if an operator's output is
wrong. `run.py --table FILE` prints stored lines as the table of kernels/README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import re
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from statistics import median, quantiles
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sala_kernels.cache_write.op import write_cache
from sala_kernels.lightning.op import StateBatch, lightning_attention
from sala_kernels.lightning.reference import lightning_recurrent
from sala_kernels.sparse_attend import reference as attend_reference
from sala_kernels.sparse_attend.op import attend_blocks
from sala_kernels.sparse_index import reference as index_reference
from sala_kernels.sparse_index.op import select_blocks
from sala_kernels.spec import (
    BLOCK_TOKENS,
    K1_STRIDE_TOKENS,
    K1_WINDOW_TOKENS,
    K2_STRIDE_TOKENS,
    K2_WINDOW_TOKENS,
    SalaSpec,
    decay_slopes,
)
from sala_kernels.testing import paged_batch, poisoned_cache, relative_rms, shuffled_block_table

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).parents[2]
CHECKPOINT = ROOT / "training/demo/checkpoint"
SEED = 0
REPEATS = 5
ENGINE_REPEATS = {1024: 7, 4096: 5, 16384: 3}
"""Prompt tokens and how often they are served."""
STEP_TOKENS = 2048
"""New tokens of a prefill step, the last of a prompt."""
THREADS = 1
"""More would wait for each other wherever the machine does anything else."""
MIN_TIMED_S = 0.005
"""An operator faster than this is repeated within one measurement."""
BOUND = 2e-6
"""Relative RMS error at which a gate is red; the kernel tests' bound."""
ELEMENT_BYTES = 4
DENSE_LEN = 1 << 30
WINDOWS = ((K1_WINDOW_TOKENS, K1_STRIDE_TOKENS), (K2_WINDOW_TOKENS, K2_STRIDE_TOKENS))


class GateError(Exception):
    """An operator's output is not its reference's; no time of it means anything."""


@dataclass
class Case:
    """One operator on one input: ours, what it is compared with, and what it has to move and compute."""

    op: str
    shape: str
    reference: str
    ours: Callable[[], object]
    theirs: Callable[[], object]
    gate: Callable[[], None]
    num_bytes: int
    """Every input and output once."""
    num_flops: int


def check(op: str, error: float, bound: float = BOUND) -> None:
    """Raise GateError unless ``error`` is within ``bound``."""
    if not error <= bound:
        raise GateError(
            f"{op}: error {error:.3g} against the reference, expected at most {bound:.3g}"
        )


def lightning_case(spec: SalaSpec, seqs: int, tokens: int) -> Case:
    """A prompt from a zero state, or one token each of a batch."""
    heads, dim, scale = spec.lightning_num_heads, spec.lightning_head_dim, spec.lightning_scale
    slopes = torch.tensor(decay_slopes(heads))
    is_decode = tokens == 1
    q, k, v = torch.randn(3, seqs * tokens, heads, dim).unbind()
    before = torch.randn(seqs, heads, dim, dim) * is_decode
    state = before.clone()
    batch = StateBatch(
        torch.arange(seqs + 1, dtype=torch.int32) * tokens,
        torch.arange(seqs, dtype=torch.int32)[:, None],
        torch.full((seqs,), is_decode),
        tokens,
    )

    def ours() -> Tensor:
        return lightning_attention(q, k, v, slopes, scale, state, batch)

    def theirs() -> tuple[Tensor, Tensor]:
        packed = [x.unflatten(0, (seqs, tokens)) for x in (q, k, v)]
        return lightning_recurrent(packed[0], packed[1], packed[2], slopes, scale, before)

    def gate() -> None:
        expected, after = theirs()
        check("lightning_attention", relative_rms(ours(), expected.flatten(0, 1)))
        check("lightning_attention state", relative_rms(state, after))

    num_bytes = ELEMENT_BYTES * (4 * q.numel() + (2 if is_decode else 1) * state.numel())
    per_head = 5 * dim * dim if is_decode else 4 * dim * (dim + 64)
    op = "lightning decode" if is_decode else "lightning prefill"
    shape = f"{seqs} sequences" if is_decode else f"{tokens} tokens"
    num_flops = seqs * tokens * heads * per_head
    return Case(op, shape, "recurrence", ours, theirs, gate, num_bytes, num_flops)


def sparse_cases(spec: SalaSpec, length: int, new: int) -> Iterator[Case]:
    """The three operators of a sparse layer, for the last ``new`` tokens of a sequence."""
    sparse = replace(spec.sparse, dense_len=0)
    heads, kv_heads, dim = spec.num_heads, spec.num_kv_heads, spec.head_dim
    keys, values = torch.randn(2, length, kv_heads, dim).unbind()
    q = 2 * torch.randn(new, heads, dim)
    positions = torch.arange(length - new, length)
    table = shuffled_block_table([length], SEED)
    cache = poisoned_cache(table.numel(), kv_heads, dim, q.dtype)
    batch = paged_batch([new], [length], table)
    if new < length:
        history = paged_batch([length - new], [length - new], table)
        write_cache(keys[:-new], values[:-new], cache, history)
    shape = f"{new} of {length} tokens"

    def write() -> None:
        write_cache(keys[-new:], values[-new:], cache, batch)

    contiguous = torch.empty_like(keys), torch.empty_like(values)

    def recompute() -> list[Tensor]:
        contiguous[0][-new:].copy_(keys[-new:])
        contiguous[1][-new:].copy_(values[-new:])
        return [index_reference.compress_keys(keys, *window) for window in WINDOWS]

    def write_gate() -> None:
        write()
        page = table[0].long()
        for part, packed in ((cache.keys, keys), (cache.values, values)):
            stored = part[page].transpose(1, 2).flatten(0, 1)[:length]
            check("cache_write", 0.0 if torch.equal(stored, packed) else torch.inf)
        for part, means in zip((cache.fine_means, cache.coarse_means), recompute(), strict=True):
            stored = part[page].transpose(1, 2).flatten(0, 1)[1 : len(means) + 1]
            check("cache_write means", relative_rms(stored, means))

    # new K and V are read and written, their keys read back for both kinds of windows
    new_elements = new * kv_heads * dim
    num_bytes = int(ELEMENT_BYTES * new_elements * (4 + 2 + 2 + 5 / 64))
    yield Case(
        "cache_write",
        shape,
        "contiguous, all means anew",
        write,
        recompute,
        write_gate,
        num_bytes,
        4 * new_elements,
    )

    def select() -> Tensor:
        return select_blocks(q, cache, batch, sparse)

    def brute_force() -> Tensor:
        return index_reference.select_blocks(q, keys, positions, sparse)

    def select_gate() -> None:
        chosen = torch.zeros(new, kv_heads, -(-length // BLOCK_TOKENS) + 1, dtype=torch.bool)
        chosen.scatter_(-1, select().long() % chosen.shape[-1], True)
        same = (chosen[..., :-1] == brute_force()).all(-1)
        # sums in another order may exchange two blocks of nearly equal score
        check("select_blocks", 1 - float(same.float().mean()), 1e-3)

    windows = sum((length - window) // stride + 1 for window, stride in WINDOWS)
    scored = int((positions >= sparse.num_selected_blocks * BLOCK_TOKENS).sum())
    num_bytes = ELEMENT_BYTES * (
        q.numel() + windows * kv_heads * dim + new * kv_heads * sparse.num_selected_blocks
    )
    num_flops = 2 * scored * heads * dim * windows
    yield Case(
        "select_blocks",
        shape,
        "brute force",
        select,
        brute_force,
        select_gate,
        num_bytes,
        num_flops,
    )

    write()
    blocks = select()

    def attend() -> Tensor:
        return attend_blocks(q, cache, batch, blocks, sparse)

    def attend_all() -> Tensor:
        return attend_blocks(q, cache, batch, blocks, replace(sparse, dense_len=DENSE_LEN))

    def attend_gate() -> None:
        last = slice(-min(new, 128), None)
        block = torch.arange(-(-length // BLOCK_TOKENS))
        for output, selected in (
            (attend(), (blocks[last, ..., None] == block).any(-2)),
            (attend_all(), None),
        ):
            expected = attend_reference.attend_blocks(
                q[last], keys, values, positions[last], selected
            )
            check("attend_blocks", relative_rms(output[last], expected))

    # tokens attended, the own block in part
    own = positions % BLOCK_TOKENS - (BLOCK_TOKENS - 1)
    attended = int(((blocks >= 0).sum(-1) * BLOCK_TOKENS + own[:, None]).sum())
    pages = sum(len(blocks[:, head][blocks[:, head] >= 0].unique()) for head in range(kv_heads))
    num_bytes = ELEMENT_BYTES * (2 * q.numel() + 2 * pages * BLOCK_TOKENS * dim)
    num_flops = 4 * attended * (heads // kv_heads) * dim
    yield Case(
        "attend_blocks",
        shape,
        "dense, same operator",
        attend,
        attend_all,
        attend_gate,
        num_bytes,
        num_flops,
    )


def all_cases() -> list[Case]:
    """Every operator at every length, at the demo checkpoint's shapes."""
    spec = SalaSpec.from_file(CHECKPOINT)
    shapes = [(1, 1024), (1, 4096), (1, 16384), (1, 1), (16, 1)]
    cases = [lightning_case(spec, *shape) for shape in shapes]
    for length, new in (
        (1024, 1024),
        (4096, STEP_TOKENS),
        (16384, STEP_TOKENS),
        (16384, 1),
        (65536, 1),
    ):
        cases += sparse_cases(spec, length, new)
    return cases


def measure(cases: list[Case]) -> Iterator[dict[str, Any]]:
    """Time both arms of all cases in shuffled order; yield a line a case."""
    arms = [(case, arm) for case in cases for arm in (case.ours, case.theirs)]
    times: dict[int, list[float]] = {id(arm): [] for _, arm in arms}
    loops = {}
    for _, arm in arms:  # also warms up
        start_s = time.perf_counter()
        arm()
        loops[id(arm)] = max(1, int(MIN_TIMED_S / (time.perf_counter() - start_s)))
    order = arms * REPEATS
    random.Random(SEED).shuffle(order)
    for _, arm in order:
        start_s = time.perf_counter()
        for _ in range(loops[id(arm)]):
            arm()
        times[id(arm)].append((time.perf_counter() - start_s) / loops[id(arm)] * 1e6)
    for case in cases:
        counted = {"bytes": case.num_bytes, "flops": case.num_flops}
        ours, theirs = times[id(case.ours)], times[id(case.theirs)]
        yield line(case.op, case.shape, "float32", case.reference, ours, theirs) | counted


def line(
    op: str, shape: str, dtype: str, reference: str, ours_us: list[float], reference_us: list[float]
) -> dict[str, Any]:
    """Sum up two series of times, microseconds."""
    return {
        "op": op,
        "shape": shape,
        "dtype": dtype,
        "reference": reference,
        "ours_us": spread(ours_us),
        "reference_us": spread(reference_us),
        "ratio": round(median(reference_us) / median(ours_us), 2),
        "repeats": len(ours_us),
    }


def spread(times_us: list[float]) -> dict[str, float]:
    """Return median, p10 and p90."""
    deciles = quantiles(times_us, n=10, method="inclusive")
    values = {"median": median(times_us), "p10": deciles[0], "p90": deciles[-1]}
    return {name: round(value, 1) for name, value in values.items()}


class EngineProcess:
    """vLLM with the demo checkpoint in a process of its own, idle while another is measured."""

    def __init__(self, overrides: dict[str, Any]) -> None:
        environment = os.environ | {
            "OMP_NUM_THREADS": str(THREADS),
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_LOGGING_LEVEL": "ERROR",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--engine", json.dumps(overrides)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.generate(200)  # waits for the start, warms up

    def generate(self, num_prompt_tokens: int) -> tuple[float, float]:
        """Return time to first token and mean time a further token, microseconds."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{num_prompt_tokens}\n")
        self.process.stdin.flush()
        # vLLM prints on stdout too
        for text in self.process.stdout:
            if text.startswith("measured "):
                _, ttft_us, tpot_us = text.split()
                return float(ttft_us), float(tpot_us)
        raise RuntimeError(f"the engine ended with {self.process.wait()}")

    def stop(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()


def measure_engine() -> Iterator[dict[str, Any]]:
    """Serve the demo checkpoint as it is, and always dense; yield lines for TTFT and TPOT."""
    sparse_config = json.loads((CHECKPOINT / "config.json").read_text())["sparse_config"]
    dense = {"sparse_config": sparse_config | {"dense_len": DENSE_LEN}}
    engines: list[EngineProcess] = []
    try:
        for overrides in ({}, dense):
            engines.append(EngineProcess(overrides))
        order = [
            (n, arm)
            for n, repeats in ENGINE_REPEATS.items()
            for arm in (0, 1)
            for _ in range(repeats)
        ]
        random.Random(SEED).shuffle(order)
        times: dict[tuple[int, int], list[tuple[float, float]]] = {key: [] for key in order}
        for num_tokens, arm in order:
            times[num_tokens, arm].append(engines[arm].generate(num_tokens))
    finally:
        for engine in engines:
            engine.stop()
    for index, name in enumerate(("engine TTFT", "engine TPOT")):
        for n in ENGINE_REPEATS:
            ours, theirs = ([pair[index] for pair in times[n, arm]] for arm in (0, 1))
            yield line(name, f"{n} tokens", "bfloat16", "same weights, always dense", ours, theirs)


def serve_measurements(overrides: dict[str, Any]) -> None:
    """Be an EngineProcess: read prompt lengths, write times."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        str(CHECKPOINT),
        hf_overrides=overrides,
        skip_tokenizer_init=True,
        enforce_eager=True,
        enable_prefix_caching=False,
        max_model_len=32768,
        max_num_batched_tokens=STEP_TOKENS,
        kv_cache_memory_bytes=256 << 20,
    )
    engine = llm.llm_engine
    params = SamplingParams(temperature=0, max_tokens=33, ignore_eos=True, detokenize=False)
    generator = torch.Generator().manual_seed(SEED)
    for request, text in enumerate(sys.stdin):
        prompt = torch.randint(5, 4000, (int(text),), generator=generator).tolist()
        start_s = time.perf_counter()
        engine.add_request(str(request), {"prompt_token_ids": prompt}, params)
        first_s = None
        while engine.has_unfinished_requests():
            if engine.step() and first_s is None:
                first_s = time.perf_counter()
        assert first_s is not None
        tpot_s = (time.perf_counter() - first_s) / (params.max_tokens - 1)
        sys.stdout.write(f"measured {(first_s - start_s) * 1e6} {tpot_s * 1e6}\n")
        sys.stdout.flush()


def conditions() -> dict[str, Any]:
    """Return what the times depend on besides the code's arguments."""
    git = ["git", "-c", f"safe.directory={ROOT}", "-C", str(ROOT)]
    read = subprocess.run(
        [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    changed = subprocess.run(
        [*git, "diff", "--quiet", "HEAD", "--", "kernels", "vllm_ext"], check=False
    )
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    cpu = found[1] if found else platform.machine()
    return {
        "device": f"{cpu}, {len(os.sched_getaffinity(0))} cores, {THREADS} thread",
        "versions": {"torch": torch.__version__, "vllm": version("vllm")},
        "commit": (read.stdout.strip() or "unknown") + ("+changes" if changed.returncode else ""),
        "seed": SEED,
    }


def run(cases: list[Case], with_engine: bool) -> Iterator[dict[str, Any]]:
    """Check every operator, then measure; the last line is the summary.

    Raises:
        GateError: an operator's output is wrong.
    """
    for case in cases:
        case.gate()
    where, ratios, start_s = conditions(), {}, time.perf_counter()
    engine_lines = measure_engine() if with_engine else ()
    for measured in chain(measure(cases), engine_lines):
        ratios[f"{measured['op']}, {measured['shape']}"] = measured["ratio"]
        yield measured | where
    yield {"summary": ratios, "wall_s": round(time.perf_counter() - start_s), **where}


def table(lines: list[dict[str, Any]]) -> str:
    """Format stored lines as Markdown."""
    rows = [
        "| operator | shape | ours, ms (p10 to p90) | compared with | theirs, ms (p10 to p90) | ratio |"
    ]
    rows.append("| --- | --- | --- | --- | --- | --- |")
    for entry in lines:
        if "op" in entry:
            ours, theirs = (
                "{median:.3g} ({p10:.3g} to {p90:.3g})".format(
                    **{name: value / 1e3 for name, value in entry[arm].items()}
                )
                for arm in ("ours_us", "reference_us")
            )
            rows.append(
                f"| {entry['op']} | {entry['shape']} | {ours} | {entry['reference']} | {theirs} | {entry['ratio']} |"
            )
    return "\n".join(rows) + "\n"


def main(arguments: list[str]) -> int:
    """Run the command line; 1 if an operator's output is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", type=Path, metavar="FILE", help="print stored lines as a table")
    parser.add_argument("--engine", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.table:
        stored = options.table.read_text(encoding="utf-8").splitlines()
        sys.stdout.write(table([json.loads(text) for text in stored]))
        return 0
    if options.engine is not None:
        serve_measurements(options.engine)
        return 0
    torch.manual_seed(SEED)
    torch.set_num_threads(THREADS)
    try:
        with torch.inference_mode():
            for measured in run(all_cases(), with_engine=True):
                sys.stdout.write(json.dumps(measured) + "\n")
                sys.stdout.flush()
    except GateError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
