"""Finds what runs on behalf of a folder: python janitor.py FOLDER lists it, with --reap ends it all.

With ``--reap`` it waits until standard input closes, on purpose or because the tests were killed, kills
every process whose working directory or HOME is inside the folder, and removes the folder.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

LIMIT_S = 30


def processes(folder: Path) -> dict[int, str]:
    """Return the command lines of all living processes of ``folder`` by process id."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it ended, or belongs to somebody else
            # engine processes write their title over their environment; their folder stays
            places = [(process / "cwd").readlink()]
            with suppress(OSError):
                variables = (process / "environ").read_bytes().split(b"\0")
                places += [Path(os.fsdecode(v[5:])) for v in variables if v.startswith(b"HOME=")]
            if any(place.is_relative_to(folder) for place in places):
                found[int(process.name)] = (process / "cmdline").read_text().replace("\0", " ")
    return found


def reap(folder: Path) -> dict[int, str]:
    """Kill until nothing is left; return what could not be ended."""
    end_at_s = time.monotonic() + LIMIT_S
    while (left := processes(folder)) and time.monotonic() < end_at_s:
        for pid in left:
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
    shutil.rmtree(folder, ignore_errors=True)
    return left


if __name__ == "__main__":
    of = Path(sys.argv[1])
    if "--reap" in sys.argv:
        sys.stdin.read()
        sys.exit(bool(reap(of)))
    print(json.dumps(processes(of)))  # noqa: T201
