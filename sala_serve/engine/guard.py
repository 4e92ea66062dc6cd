"""Runs a command for as long as somebody holds the other end of standard input.

The gateway starts the engine through this program (``python guard.py GRACE_S COMMAND...``) in a session of
its own. When the pipe on standard input closes, on purpose or because the gateway was killed, the whole
process group gets SIGTERM and, ``GRACE_S`` later or as soon as the command has ended, SIGKILL. So no engine
process outlives its gateway, nor holds memory when the next engine starts. Standard library only: it is run
as a file and must start fast.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys

POLL_S = 0.1


def main(grace_s: float, command: list[str]) -> int:
    """Run ``command``; return its exit status, or kill this group when standard input closes."""
    # the group's SIGTERM also comes here; a handler, unlike SIG_IGN, is not inherited by the command
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.signal(signal.SIGINT, lambda *_: None)
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    while (status := child.poll()) is None:
        readable, _, _ = select.select([sys.stdin.fileno()], [], [], POLL_S)
        if readable and not os.read(sys.stdin.fileno(), 1):
            os.killpg(0, signal.SIGTERM)
            try:
                child.wait(timeout=grace_s)
            finally:
                os.killpg(0, signal.SIGKILL)
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]), sys.argv[2:]))
