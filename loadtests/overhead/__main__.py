"""Measure what sala-serve and other gateways add to one mock engine on loopback."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from contextlib import AbstractContextManager, ExitStack
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import uvloop

from machine import facts
from overhead import measure, rivals, targets
from overhead.report import bars, report
from processes import StartFailed

if TYPE_CHECKING:
    from overhead.targets import Target

RESULTS = Path(__file__).parent / "results"


def main() -> int:
    """Run it and return 0 if every bar that was measured is kept."""
    parser = argparse.ArgumentParser(prog="scripts/bench-overhead", description=__doc__)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each stretch of load")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--long-prompts", type=int, default=200, help="of ours")
    parser.add_argument("--long-prompts-of-rivals", type=int, default=10)
    parser.add_argument("--only", nargs="*", choices=["sala-serve", *rivals.NAMES])
    parser.add_argument(
        "--environments", type=Path, default=rivals.FOLDER, help="folder of the rivals' ones"
    )
    parser.add_argument(
        "--install", action="store_true", help="install the rivals, measure nothing"
    )
    parser.add_argument("--store", type=Path, default=RESULTS, metavar="FOLDER")
    options = parser.parse_args()
    names = options.only or ["sala-serve", *rivals.NAMES]
    if options.install:
        return _install(options.environments)
    machine = facts()
    machine["sala-serve"] = metadata.version("sala-serve")
    machine |= {name: rivals.version(name) for name in rivals.NAMES if name in names}
    machine["command"] = "scripts/bench-overhead " + " ".join(sys.argv[1:])
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="sala-overhead-") as folder, ExitStack() as stack:
        direct = stack.enter_context(targets.engine(Path(folder)))
        for name in names:
            try:
                with _started(name, Path(folder), direct.port, options.environments) as target:
                    for row in uvloop.run(_measured(target, direct, options)):
                        rows.append(row)
                        print(json.dumps(row), flush=True)
            except (rivals.NotInstalled, StartFailed) as error:
                why = str(error).splitlines()[-1] if str(error) else type(error).__name__
                rows.append({"what": "left out", "target": name, "why": why})
                print(f"{name} is left out: {error}", file=sys.stderr, flush=True)
    machine["load_after"] = round(os.getloadavg()[0], 2)
    options.store.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"what": "machine", **machine}), *map(json.dumps, rows)]
    (options.store / "overhead.jsonl").write_text("\n".join(lines) + "\n")
    (options.store / "report.md").write_text(report(machine, rows))
    print((options.store / "report.md").read_text())
    return int(any(is_kept is False for _, _, is_kept in bars(rows)))


def _started(
    name: str, folder: Path, engine_port: int, environments: Path
) -> AbstractContextManager[Target]:
    if name == "sala-serve":
        return targets.ours(folder, engine_port)
    return targets.rival(name, folder, engine_port, environments)


async def _measured(
    target: Target, direct: Target, options: argparse.Namespace
) -> list[dict[str, Any]]:
    await measure.warm_up(direct)
    await measure.warm_up(target)
    rows: list[dict[str, Any]] = []
    for repeat in range(options.repeats):
        rows += await measure.loads(target, direct, repeat=repeat, duration_s=options.seconds)
    is_ours = target.name == "sala-serve"
    num_prompts = options.long_prompts if is_ours else options.long_prompts_of_rivals
    if num_prompts:
        rows.append(await measure.long_prompts(target, direct, num_prompts=num_prompts))
    return rows


def _install(environments: Path) -> int:
    failed = 0
    for name in rivals.NAMES:
        try:
            print(f"{name} {rivals.version(name)}: {rivals.python_of(name, environments)}")
        except rivals.NotInstalled as error:
            failed += 1
            print(f"{name} {rivals.version(name)} cannot be installed: {error}", file=sys.stderr)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
