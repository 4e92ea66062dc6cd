"""`make bench-gpu`: run the stages, each in a process with a time limit, then report.

A stage appends to OUT/results.jsonl as it measures, so what was measured before a failure or the limit stays. Stages
can be run in separate commands on the same OUT; --resume leaves out those that ended well.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from gpu import report
from gpu.environment import ROOT, child_environment, conditions
from gpu.results import FAILED, OK, TIMEOUT, Recorder, Results
from gpu.settings import OPTIONAL_STAGES, SCALES, STAGE_LIMIT_S, Scale

if TYPE_CHECKING:
    from collections.abc import Sequence

WORKER = "--worker"
KILL_AFTER_S = 10


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="bench-gpu", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--stages",
        type=lambda text: text.split(","),
        default=[*(name for name in STAGE_LIMIT_S if name not in OPTIONAL_STAGES), "report"],
        help=f"comma-separated, of {','.join(STAGE_LIMIT_S)},report",
    )
    parser.add_argument("--out", type=Path, default=ROOT / "build/bench-gpu")
    parser.add_argument("--resume", action="store_true", help="leave out stages that ended well")
    parser.add_argument("--limit-s", type=float, help="time limit of each stage")
    parser.add_argument("--scale", choices=SCALES, default="h200")
    parser.add_argument(
        "--lengths", type=_lengths, help="prompt tokens, of both models: 16384,65536"
    )
    parser.add_argument(
        "--engine", type=json.loads, default={}, help="JSON, more engine arguments of SALA"
    )
    parser.add_argument("--only", default="", help="a part of the names of the operators to time")
    parser.add_argument(
        "--tune", action="append", default=[], help="FOLDER.MODULE:NAME=1,2;OTHER=3"
    )
    parser.add_argument(WORKER, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if unknown := set(options.stages) - {*STAGE_LIMIT_S, "report"}:
        parser.error(f"--stages: unknown {', '.join(sorted(unknown))}")
    return options


def _lengths(text: str) -> set[int]:
    return {int(part) for part in text.split(",")}


def _picked(repeats: dict[int, int], lengths: set[int]) -> dict[int, int]:
    return {length: count for length, count in repeats.items() if length in lengths}


def scale_of(options: argparse.Namespace) -> Scale:
    """Return the chosen scale with the command line's changes."""
    scale = SCALES[options.scale]
    scale = replace(
        scale,
        sala_engine=scale.sala_engine | options.engine,
        one_request_engine=scale.one_request_engine | options.engine,
    )
    if options.lengths:
        scale = replace(
            scale,
            lengths=_picked(scale.lengths, options.lengths),
            full_attention_lengths=_picked(scale.full_attention_lengths, options.lengths),
        )
    return scale


def run_stage(stage: str, arguments: Sequence[str], out: Path, limit_s: float) -> str:
    """Run one stage in a process group of its own; return its outcome, which is also recorded."""
    out.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "gpu", *arguments, "--out", str(out), WORKER, stage]
    record = Recorder(out / report.RESULTS, stage)
    record.start({"arguments": list(arguments)}, conditions())
    start_s = time.perf_counter()
    log = out / f"{stage}.log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=child_environment(out),
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            outcome = OK if process.wait(limit_s) == 0 else FAILED
        except subprocess.TimeoutExpired:
            outcome = TIMEOUT
        finally:
            _end_group(process)
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    detail = "" if outcome == OK else "\n".join(lines[-15:])
    record.end(outcome, time.perf_counter() - start_s, detail)
    return outcome


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """End the stage and the engine processes it left."""
    for how in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, how)
        except ProcessLookupError:
            return
        try:
            process.wait(KILL_AFTER_S)
        except subprocess.TimeoutExpired:
            continue


def work(stage: str, options: argparse.Namespace) -> int:
    """Be the process of one stage."""
    from gpu import correctness, device_tests, kernel_stage, needle, ngram, offload, served

    scale, out = scale_of(options), options.out
    record = Recorder(out / report.RESULTS, stage)
    if stage == "kernels":
        grids = [kernel_stage.Grid.parse(text) for text in options.tune]
        return int(kernel_stage.run(record, scale, grids, options.only) > 0)
    if stage == "correctness":
        return int(correctness.run(record, scale, out) > 0)
    if stage == "tests":
        # on a CPU they are what `make test` runs
        return int(scale.device == "cuda" and device_tests.run(record, out) > 0)
    if stage == "sala":
        asyncio.run(served.sala(record, scale, out, out / f"{stage}.log"))
    elif stage == "full-attention":
        asyncio.run(served.full_attention(record, scale, out))
    elif stage == "serving":
        asyncio.run(served.serving(record, scale, out))
    elif stage == "ngram":
        ngram.run(record, scale)
    elif stage == "needle":
        asyncio.run(needle.run(record, scale))
    elif stage == "offload":
        offload.run(record, scale, out)
    return 0


def main(arguments: Sequence[str]) -> int:
    """Run the command line; 1 if a stage did not end well."""
    options = parse(arguments)
    options.out = options.out.resolve()
    if options.worker:
        return work(options.worker, options)
    done = Results.read(options.out / report.RESULTS)
    num_bad = 0
    for stage in (name for name in STAGE_LIMIT_S if name in options.stages):
        if options.resume and done.is_done(stage):
            sys.stderr.write(f"bench-gpu: {stage}: done before\n")
            continue
        limit_s = options.limit_s or STAGE_LIMIT_S[stage]
        sys.stderr.write(f"bench-gpu: {stage}: at most {limit_s:.0f} s\n")
        outcome = run_stage(stage, arguments, options.out, limit_s)
        sys.stderr.write(f"bench-gpu: {stage}: {outcome}, see {options.out / stage}.log\n")
        num_bad += outcome != OK
    if "report" in options.stages:
        sys.stdout.write(report.write(options.out))
    return int(num_bad > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
