"""After the warm-up no prompt compiles a kernel; compiled for Hopper, launched nowhere."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PROMPTS = Path(__file__).with_name("compile_prompts.py")


def test_prompts_compile_nothing_new() -> None:
    # a process without Triton's interpreter
    run = subprocess.run([sys.executable, PROMPTS], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    warmed, *late = run.stdout.splitlines()
    assert int(warmed) >= 9
    assert late == []
