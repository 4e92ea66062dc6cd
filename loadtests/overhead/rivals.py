"""Other gateways, each in a virtual environment of its own with the versions of ``rivals/*.txt``."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import venv
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

from machine import ROOT

PINS = ROOT / "loadtests/overhead/rivals"
FOLDER = ROOT / "build/rivals"
INSTALL_TIMEOUT_S = 600.0
NAMES = ("litellm", "vllm-router", "smg")


class NotInstalled(Exception):  # noqa: N818 - named for what happened
    """A rival cannot be installed here; the message says why."""


def version(name: str) -> str:
    """Return the pinned version of a rival."""
    lines = (PINS / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    (found,) = [line.partition("==")[2] for line in lines if line.startswith(f"{name}==")]
    return found


def python_of(name: str, folder: Path = FOLDER) -> Path:
    """Return the Python that has a rival installed, installing it if that was not done before.

    Args:
        name: one of ``NAMES``.
        folder: where the environments are.

    Raises:
        NotInstalled: pip could not.
    """
    pins = PINS / f"{name}.txt"
    stamp = hashlib.sha256(pins.read_bytes() + sys.version.encode()).hexdigest()
    place = folder / name
    python, stamped = place / "bin/python", place / "stamp"
    if stamped.exists() and stamped.read_text() == stamp:
        return python
    try:
        venv.create(place, with_pip=True, clear=True)
        subprocess.run(
            # the pins are all of it; resolving them again finds conflicts that nobody meets
            [str(python), "-m", "pip", "install", "--quiet", "--no-deps", "-r", str(pins)],
            check=True,
            capture_output=True,
            text=True,
            timeout=INSTALL_TIMEOUT_S,
        )
    except subprocess.CalledProcessError as error:
        raise NotInstalled(_last_line(error.stderr or str(error))) from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NotInstalled(str(error)) from None
    stamped.write_text(stamp)
    return python


def _last_line(text: str) -> str:
    errors = [line for line in text.splitlines() if line.startswith("ERROR")]
    return (errors or text.strip().splitlines() or ["no reason given"])[-1]
