"""`scripts/bench-fairness`: play every scene under every rule, then report."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fairness import report
from fairness.calibration import compare
from fairness.scenes import RULES, Scene, play
from fairness.speeds import Measured, Speeds

ROOT = Path(__file__).parents[2]
SPEEDS = "kernels/bench/results/h200/results.jsonl"
OUT = Path(__file__).parent / "results"
RATES = (0.05, 0.25, 1.0, 2.0)
"""Short requests a second of each of the two tenants that send them."""

Job = tuple[str, str, Scene]
"""Part of the benchmark, rule, scene."""


def jobs(num_seeds: int) -> list[Job]:
    """Return what is to be played, the side-by-side runs first."""
    # one tenant has 16 prompts under way, the other 2
    uneven, seeds = Scene(flood=(16, 2)), range(num_seeds)
    rates = [Scene(short_per_s=rate) for rate in RATES]
    return [
        ("arrival", "arrival", Scene()),
        ("vllm", "vllm", Scene()),
        *(("fair", "fair", Scene(seed=seed)) for seed in seeds),
        *(("idle", "fair", Scene(seed=seed, flood=())) for seed in seeds),
        ("alone", "fair", Scene(short_per_s=0)),
        *(("uneven", rule, uneven) for rule in ("fair", "no give way", "arrival", "vllm")),
        *(("rate", "fair", scene) for scene in rates),
        *(("rate idle", "fair", replace(scene, flood=())) for scene in rates),
    ]


def run(job: Job, speeds: Speeds) -> dict[str, Any]:
    """Play one and return its line of the results."""
    part, rule, scene = job
    began_s, result = time.process_time(), play(scene, RULES[rule], speeds)
    line = {"name": "run", "part": part, "rule": rule, "scene": asdict(scene)}
    return line | {"result": result.document(), "cpu_s": round(time.process_time() - began_s, 1)}


def conditions(measured: Measured) -> dict[str, Any]:
    """Return the first line of the results: of what and where they are."""
    return {
        "name": "start",
        "unix_s": round(time.time()),
        "commit": _commit(),
        "versions": {"python": platform.python_version(), "sala_serve": version("sala-serve")},
        "machine": {"cpu": _processor(), "num_cpus": os.cpu_count(), "system": platform.platform()},
        "engine": {
            "is_simulated": True,
            "source": SPEEDS,
            "device": measured.device,
            "commit": measured.commit,
            "speeds": asdict(measured.speeds()),
        },
    }


def main(arguments: list[str]) -> int:
    """Run the benchmark; returns the exit status."""
    parser = argparse.ArgumentParser(prog="bench-fairness", description=__doc__)
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the results")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each random scene")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--report", action="store_true", help="only report what is stored")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "results.jsonl"
    if not options.report:
        measured = Measured.load(ROOT / SPEEDS)
        rows = [{"name": "calibration", **asdict(row)} for row in compare(measured)]
        if not all(row["is_close"] for row in rows):
            print("the simulated engine does not take the measured times:", file=sys.stderr)
            print(report.calibration_table(rows), file=sys.stderr)
            return 1
        path.write_text("", encoding="utf-8")
        _append(path, conditions(measured), *rows)
        with ProcessPoolExecutor(options.processes) as pool:
            todo = [pool.submit(run, job, measured.speeds()) for job in jobs(options.seeds)]
            for done in todo:
                _append(path, done.result())
    results = report.Results.load(path)
    (options.out / "report.md").write_text(report.page(results), encoding="utf-8")
    report.plot(results, options.out / "fairness.png")
    print(report.page(results))
    return 0 if report.bars_reached(results) else 1


def _append(path: Path, *lines: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _commit() -> str:
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
