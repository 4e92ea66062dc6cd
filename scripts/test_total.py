"""Add up the JUnit files of several pytest processes and print pytest's closing line for all."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree


def main() -> int:
    """Print the total over the files; return 1 if anything failed or nothing passed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("seconds", type=float, help="wall-clock time of all parts")
    parser.add_argument(
        "broken", type=int, help="parts that did not run to their end; count as errors"
    )
    parser.add_argument("files", type=Path, nargs="*")
    arguments = parser.parse_args()

    counts = Counter(errors=arguments.broken)
    for path in arguments.files:
        for suite in ElementTree.fromstring(path.read_text(encoding="utf-8")).iter("testsuite"):
            counts.update(
                {key: int(suite.get(key, 0)) for key in ("failures", "errors", "skipped")}
            )
            counts["tests"] += int(suite.get("tests", 0))
    errors_of_tests = counts["errors"] - arguments.broken
    passed = counts["tests"] - counts["failures"] - counts["skipped"] - errors_of_tests
    parts = {
        "failed": counts["failures"],
        "passed": passed,
        "skipped": counts["skipped"],
        "errors": counts["errors"],
    }
    words = ", ".join(f"{count} {word}" for word, count in parts.items() if count)
    print(f" {words or 'no tests ran'} in {arguments.seconds:.2f}s ".center(80, "="))
    return int(passed < 1 or counts["failures"] + counts["errors"] > 0)


if __name__ == "__main__":
    sys.exit(main())
