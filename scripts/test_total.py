"""Add up the JUnit files of several pytest processes and print pytest's closing line for all."""

from __future__ import annotations

import sys
from pathlib import Path
from xml.etree import ElementTree


def main(paths: list[str]) -> int:
    """Print the total over the files; return 1 if anything failed or nothing ran."""
    counts = dict.fromkeys(("failures", "errors", "skipped", "tests"), 0)
    seconds = 0.0
    for path in paths:
        root = ElementTree.fromstring(Path(path).read_text(encoding="utf-8"))
        for suite in root.iter("testsuite"):
            seconds += float(suite.get("time", "0"))
            for name in counts:
                counts[name] += int(suite.get(name, "0"))
    passed = counts["tests"] - counts["failures"] - counts["errors"] - counts["skipped"]
    parts = {
        "failed": counts["failures"],
        "passed": passed,
        "skipped": counts["skipped"],
        "errors": counts["errors"],
    }
    words = ", ".join(f"{count} {word}" for word, count in parts.items() if count)
    print(f" {words or 'no tests ran'} in {seconds:.2f}s ".center(80, "="))
    return int(passed == 0 or counts["failures"] > 0 or counts["errors"] > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
