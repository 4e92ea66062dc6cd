"""Soak a gateway: mixed traffic for some minutes, restarts in the middle, then count what is left behind."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from machine import facts
from soak.play import Result, play
from soak.report import report, table

RESULTS = Path(__file__).parent / "results"


def main() -> int:
    """Run it and return 0 if nothing has leaked."""
    parser = argparse.ArgumentParser(prog="scripts/soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--clients", type=int, default=24, help="at work at the same time")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--store", action="store_true", help="write loadtests/soak/results")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="leave logs there")
    options = parser.parse_args()
    machine = facts()
    with tempfile.TemporaryDirectory(prefix="sala-soak-") as temporary:
        folder = options.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        result = asyncio.run(
            play(
                folder,
                duration_s=60 * options.minutes,
                num_clients=options.clients,
                seed=options.seed,
            )
        )
    print("\n".join(table(result)))
    if options.store:
        _store(machine | {"clients": options.clients, "seed": options.seed}, result)
    return 0 if result.is_good else 1


def _store(machine: dict[str, object], result: Result) -> None:
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "soak.json").write_text(json.dumps(machine | asdict(result), indent=1) + "\n")
    (RESULTS / "report.md").write_text(report(machine, result))


if __name__ == "__main__":
    sys.exit(main())
