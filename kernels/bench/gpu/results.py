"""The results file: one JSON line a measurement, appended as soon as it is known.

A stage's lines stand between a ``start`` line with the conditions and an ``end`` line with the outcome. A stage that ran again
replaces its older lines when the file is read.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from statistics import median, quantiles
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

START, END = "start", "end"
OK, FAILED, TIMEOUT = "ok", "failed", "timeout"


def spread(values: Sequence[float], digits: int = 4) -> dict[str, float | int]:
    """Return median, p10, p90 and count; ``digits`` significant ones."""
    if len(values) == 1:
        points = (values[0],) * 3
    else:
        deciles = quantiles(values, n=10, method="inclusive")
        points = (median(values), deciles[0], deciles[-1])
    rounded = (float(f"{value:.{digits}g}") for value in points)
    return dict(zip(("median", "p10", "p90"), rounded, strict=True)) | {"repeats": len(values)}


@dataclass(frozen=True)
class Recorder:
    """Appends the lines of one stage."""

    path: Path
    stage: str

    def write(self, name: str, **fields: Any) -> None:
        """Append one line; it is on disk when this returns."""
        line = {"stage": self.stage, "name": name, "unix_s": round(time.time(), 1), **fields}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def start(self, settings: dict[str, Any], conditions: dict[str, Any]) -> None:
        """Begin the stage."""
        self.write(START, settings=settings, **conditions)

    def end(self, outcome: str, wall_s: float, detail: str = "") -> None:
        """Close the stage with ``OK``, ``FAILED`` or ``TIMEOUT``."""
        self.write(END, outcome=outcome, wall_s=round(wall_s, 1), detail=detail)


class Results:
    """The lines of each stage's latest attempt."""

    def __init__(self, lines: list[dict[str, Any]]) -> None:
        self.stages: dict[str, list[dict[str, Any]]] = {}
        for line in lines:
            if line["name"] == START:
                self.stages[line["stage"]] = []
            self.stages.setdefault(line["stage"], []).append(line)

    @classmethod
    def read(cls, path: Path) -> Results:
        """Read the file; a line cut off by a kill is skipped, a missing file is empty."""
        lines = []
        for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError:
                continue
        return cls(lines)

    def find(self, stage: str, name: str, **fields: Any) -> list[dict[str, Any]]:
        """Return the lines of ``stage`` called ``name`` whose fields are ``fields``."""
        return [
            line
            for line in self.stages.get(stage, ())
            if line["name"] == name and all(line.get(k) == v for k, v in fields.items())
        ]

    def one(self, stage: str, name: str, **fields: Any) -> dict[str, Any] | None:
        """Return the last such line, None if there is none."""
        found = self.find(stage, name, **fields)
        return found[-1] if found else None

    def is_done(self, stage: str) -> bool:
        """Tell whether the stage's latest attempt ended well."""
        return bool(self.find(stage, END, outcome=OK))
