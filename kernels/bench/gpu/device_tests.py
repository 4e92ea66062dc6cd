"""The project's own tests of kernels and engine, run on this GPU, where they also cover bfloat16."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections import Counter
from typing import TYPE_CHECKING

from gpu.environment import ROOT

if TYPE_CHECKING:
    from pathlib import Path

    from gpu.results import Recorder

KERNEL_TESTS = ("lightning", "cache_write", "sparse_index", "sparse_attend", "elementwise")
ENGINE_TESTS = ("equals_oracle", "prefix_cache")
NEEDS_MORE_GPUS = "test_on_two_ranks"
MAX_PROCESSES = 12


def run(record: Recorder, folder: Path) -> int:
    """Run the tests, in several processes where pytest-xdist is installed; return how many failed."""
    report = folder / "device-tests.xml"
    report.unlink(missing_ok=True)
    # one line a test, so that the log tells which were running when the time is over
    command = [sys.executable, "-m", "pytest", "-c", "/dev/null", "--rootdir", ".", "-v"]
    command += [
        "-p",
        "no:cacheprovider",
        "-p",
        "no:benchmark",
        "--import-mode=importlib",
        f"--junitxml={report}",
    ]
    command += ["--deselect", f"tests/engine/test_equals_oracle.py::{NEEDS_MORE_GPUS}"]
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(min(MAX_PROCESSES, os.cpu_count() or 1))]
    command += [f"tests/kernels/test_{name}.py" for name in KERNEL_TESTS]
    command += [f"tests/engine/test_{name}.py" for name in ENGINE_TESTS]
    code = subprocess.run(command, cwd=ROOT, check=False).returncode
    cases = list(ET.parse(report).getroot().iter("testcase")) if report.exists() else []
    failures = [
        f"{case.get('classname')}.{case.get('name')}"
        for case in cases
        if case.find("failure") is not None or case.find("error") is not None
    ]
    record.write(
        "tests",
        exit=code,
        tests=len(cases),
        skipped=sum(case.find("skipped") is not None for case in cases),
        failed=len(failures),
        failed_tests=failures[:50],
        tests_by_file=Counter(case.get("classname") for case in cases),
    )
    return len(failures) or int(code != 0)
