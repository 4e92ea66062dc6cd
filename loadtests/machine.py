"""What a load test ran on, and what processes used, as the kernel tells in ``/proc``."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
QUIET_LOAD = 1.0
"""A load average above this, before a test starts, is somebody else's work."""
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def facts() -> dict[str, Any]:
    """Return machine, commit and date, to be stored beside every figure."""
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    load = os.getloadavg()[0]
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "--short=12", "HEAD"),
        "has_local_changes": bool(_git("status", "--porcelain", "--", "sala_serve")),
        "cpu": model,
        "num_cores": os.cpu_count(),
        "python": platform.python_version(),
        "load_before": round(load, 2),
        "was_busy": load > QUIET_LOAD,
    }


def _git(*arguments: str) -> str:
    command = ["git", "-c", f"safe.directory={ROOT}", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip()


@dataclass(frozen=True)
class Usage:
    """What a process and those below it have used and hold."""

    at_s: float
    cpu_s: float
    rss_mib: float
    num_sockets: int
    num_threads: int

    def cores_since(self, before: Usage) -> float:
        """Return the cores kept busy since ``before``."""
        return (self.cpu_s - before.cpu_s) / (self.at_s - before.at_s)


def usage(pid: int) -> Usage:
    """Look at a process and all that it has started."""
    pids = [pid, *_below(pid)]
    return Usage(
        at_s=time.monotonic(),
        cpu_s=sum(map(_cpu_s, pids)),
        rss_mib=sum(map(_rss_mib, pids)),
        num_sockets=sum(map(_num_sockets, pids)),
        num_threads=sum(int(_status(each).get("Threads", 0)) for each in pids),
    )


def _below(pid: int) -> list[int]:
    found = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in _read(path).split():
            found += [int(child), *_below(int(child))]
    return found


def _cpu_s(pid: int) -> float:
    fields = _read(Path(f"/proc/{pid}/stat")).rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / _TICKS_PER_S


def _rss_mib(pid: int) -> float:
    return int(_status(pid).get("VmRSS", "0 kB").split()[0]) / 1024


def _status(pid: int) -> dict[str, str]:
    lines = _read(Path(f"/proc/{pid}/status")).splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def _num_sockets(pid: int) -> int:
    num_sockets = 0
    for path in Path(f"/proc/{pid}/fd").glob("*"):
        try:
            num_sockets += str(path.readlink()).startswith("socket:")
        except OSError:  # closed since
            continue
    return num_sockets


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # ended since
        return ""
