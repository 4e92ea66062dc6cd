"""Run the parts of the test suite in processes of their own, some at a time, and print pytest's closing line for all."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

# the longest first; the engine's tests are real vLLM: no other test's environment variables or imports
PARTS = {
    "engine": ["tests/engine"],
    "serve": ["tests/serve"],
    "rest": ["tests", *(f"--ignore=tests/{name}" for name in ("engine", "serve", "install"))],
    "install": ["tests/install"],
}
ENVIRONMENT = {"rest": {"OMP_NUM_THREADS": "1"}}
"""Small matrices on several threads would only be in the way of the part beside them."""
NUM_AT_A_TIME = 3
"""On two cores: half of what the gateway's tests do is wait."""
KILL_AFTER_S = 30
MAX_AGAIN = 5
"""Failed tests that are run again alone, once all else has ended: the parts take time from each other, and some
tests are about time. With more of them, it is not the machine."""
ENDED_BY_ITSELF = (0, 1)
"""pytest's exit codes for "all tests ran": all passed, some failed."""


async def run(
    name: str,
    options: list[str],
    folder: Path,
    ends_at_s: float,
    tests: list[str] | None = None,
) -> bool:
    """Run a part, or ``tests`` of it again, then print all it said; return whether all of its tests ran."""
    began_at_s = time.monotonic()
    title = name if tests is None else f"{name} again"
    command = [sys.executable, "-m", "pytest", *options, f"--junitxml={folder / title}.xml"]
    log = folder / f"{title}.log"
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            *command,
            *(PARTS[name] if tests is None else tests),
            env=os.environ | ENVIRONMENT.get(name, {}),
            stdout=output,
            stderr=output,
        )
    ending = asyncio.create_task(process.wait())
    is_late = False
    for number, limit_s in (
        (signal.SIGINT, max(ends_at_s - began_at_s, 1)),
        (signal.SIGKILL, KILL_AFTER_S),
    ):
        if not (await asyncio.wait([ending], timeout=limit_s))[0]:
            is_late = True
            process.send_signal(number)
    await ending
    print(f"== {title}, {time.monotonic() - began_at_s:.0f} s")
    print(log.read_text(encoding="utf-8", errors="replace"), end="", flush=True)
    if is_late:
        print(f"scripts/test: {title}: over the budget of all parts together")
    elif process.returncode not in ENDED_BY_ITSELF:
        print(f"scripts/test: {title}: pytest ended with {process.returncode}")
    return not is_late and process.returncode in ENDED_BY_ITSELF


async def run_all(options: list[str], folder: Path, budget_s: float) -> int:
    """Run every part; return how many did not run to their end."""
    ends_at_s = time.monotonic() + budget_s
    places = asyncio.Semaphore(NUM_AT_A_TIME)

    async def take_turn(name: str) -> bool:
        async with places:
            return await run(name, options, folder, ends_at_s)

    num_broken = (await asyncio.gather(*map(take_turn, PARTS))).count(False)
    failed = {name: failed_tests(folder / f"{name}.xml") for name in PARTS}
    if num_broken == 0 and sum(map(len, failed.values())) <= MAX_AGAIN:
        for name, tests in failed.items():
            if tests and not await run(name, options, folder, ends_at_s, tests):
                num_broken += 1
    return num_broken


def failed_tests(path: Path) -> list[str]:
    """Return pytest's names of what failed in a part, from its JUnit file."""
    if not path.exists():
        return []
    cases = ElementTree.fromstring(path.read_text(encoding="utf-8")).iter("testcase")
    return [
        f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name')}"
        for case in cases
        if case.find("failure") is not None or case.find("error") is not None
    ]


def total(files: list[Path], num_broken: int, seconds: float) -> tuple[str, bool]:
    """Add up JUnit files; return pytest's closing line and whether all is well.

    A part that did not run to its end counts as an error. What was run again counts as it ended then.
    """
    counts = Counter(errors=num_broken)
    for path in files:
        is_again = path.stem.endswith(" again")
        has_again = path.with_stem(f"{path.stem} again").exists()
        keys = {"failures", "errors"} if is_again else {"skipped", "tests"}
        if not is_again and not has_again:
            keys |= {"failures", "errors"}
        for suite in ElementTree.fromstring(path.read_text(encoding="utf-8")).iter("testsuite"):
            for key in keys:
                counts[key] += int(suite.get(key, 0))
    errors_of_tests = counts["errors"] - num_broken
    passed = counts["tests"] - counts["failures"] - counts["skipped"] - errors_of_tests
    parts = {
        "failed": counts["failures"],
        "passed": passed,
        "skipped": counts["skipped"],
        "errors": counts["errors"],
    }
    words = ", ".join(f"{count} {word}" for word, count in parts.items() if count)
    line = f" {words or 'no tests ran'} in {seconds:.2f}s ".center(80, "=")
    return line, passed > 0 and not counts["failures"] + counts["errors"]


def main() -> int:
    """Return 0 if every test of every part ran and none failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--budget-s", type=float, required=True, help="limit on all parts together, in seconds"
    )
    parser.add_argument("options", nargs="*", help="for each pytest")
    arguments = parser.parse_args()
    began_at_s = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        num_broken = asyncio.run(run_all(arguments.options, Path(folder), arguments.budget_s))
        files = sorted(Path(folder).glob("*.xml"))
        line, is_well = total(files, num_broken, time.monotonic() - began_at_s)
    print(line)
    return 0 if is_well else 1


if __name__ == "__main__":
    sys.exit(main())
