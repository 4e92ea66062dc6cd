"""What the terminal shows until the first token: place in the queue, then how far the prompt is read."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType

    from rich.console import Console
    from rich.progress import TaskID

_NOTE = re.compile(r": (counting|queued|prefill)((?: \w+=\d+)*)")


@dataclass(frozen=True)
class Note:
    """A comment of the gateway on a stream that has no token yet."""

    kind: str
    """``counting``, ``queued`` or ``prefill``."""
    fields: Mapping[str, int]


def parse_note(line: str) -> Note | None:
    """Return what a line of a stream says about waiting; ``None`` for any other line."""
    if (match := _NOTE.fullmatch(line)) is None:
        return None
    pairs = (pair.split("=") for pair in match[2].split())
    return Note(match[1], {name: int(value) for name, value in pairs})


class WaitingDisplay:
    """A line that tells what is waited for, gone once there is something to read; nothing in a pipe."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[figures]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        # one without a bar: there is nothing to fill while it waits
        self._plain = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}, {task.elapsed:.0f} s"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._plain_task = self._plain.add_task("reading the prompt")
        self._task: TaskID | None = None

    def __enter__(self) -> WaitingDisplay:
        self._plain.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def show(self, note: Note) -> None:
        """Show ``note`` in place of the one before."""
        fields = note.fields
        if note.kind != "prefill":
            if self._task is not None:  # put back into the queue, or on another engine
                self._progress.stop()
                self._progress.remove_task(self._task)
                self._task = None
                self._plain.start()
            text = _queue_text(fields) if note.kind == "queued" else "counting tokens"
            self._plain.update(self._plain_task, description=text)
            return
        figures = _prefill_text(fields)
        done = fields.get("done_tokens")
        # without a total the bar only pulses: the engine does not tell how far it is
        total = fields.get("total_tokens") if done is not None else None
        if self._task is None:
            self._plain.stop()
            self._task = self._progress.add_task("reading the prompt", figures=figures)
            self._progress.start()
        self._progress.update(self._task, completed=done or 0, total=total, figures=figures)

    def stop(self) -> None:
        """Take the line away."""
        self._plain.stop()
        self._progress.stop()


def _queue_text(fields: Mapping[str, int]) -> str:
    parts = [f"place {fields['place']} in the queue" if "place" in fields else "in the queue"]
    if "ahead_tokens" in fields:
        parts.append(f"{fields['ahead_tokens']:,} tokens ahead")
    if "expected_start_s" in fields:
        parts.append(f"starts in {fields['expected_start_s']} s")
    return ", ".join(parts)


def _prefill_text(fields: Mapping[str, int]) -> str:
    done, total = fields.get("done_tokens"), fields.get("total_tokens", 0)
    if done is None:
        parts = [f"{total:,} tokens"]
    else:
        parts = [f"{100 * done // max(total, 1)}%, {done:,} of {total:,} tokens"]
    if cached := fields.get("cached_tokens"):
        parts.append(f"{cached:,} cached")
    if "expected_first_token_s" in fields:
        parts.append(f"{fields['expected_first_token_s']} s left")
    return ", ".join(parts)
