"""What a stream says before its first token, as comments that clients ignore or as events they asked for."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from sala_serve.events import comment, named_event
from sala_serve.generation import Prefilling, Quiet, Waiting

if TYPE_CHECKING:
    from sala_serve.generation import Update

PROGRESS_HEADER = "X-Sala-Progress"
EVENT_NAME = "sala.progress"


def progress_fields(update: Update) -> tuple[str, dict[str, int | None]] | None:
    """Return the phase and its numbers, ``None`` for an update that is no progress."""
    match update:
        case Waiting():
            return "queued", {
                "place": update.place,
                "ahead_tokens": update.tokens_ahead,
                "expected_start_s": _whole(update.expected_start_s),
                "expected_first_token_s": _whole(update.expected_first_token_s),
            }
        case Prefilling():
            return "prefill", {
                "done_tokens": update.done_tokens,
                "total_tokens": update.total_tokens,
                "cached_tokens": update.cached_tokens,
                "expected_first_token_s": _whole(update.expected_first_token_s),
            }
        case Quiet():
            return update.phase, {}
    return None


def progress_event(update: Update, *, as_event: bool) -> bytes | None:
    """Return ``update`` as bytes of a stream, ``None`` if it is no progress.

    Args:
        update: of a generation.
        as_event: as ``event: sala.progress``, else as a comment.
    """
    if (found := progress_fields(update)) is None:
        return None
    phase, fields = found
    if as_event:
        return named_event(EVENT_NAME, {"phase": phase, **fields})
    return comment(phase, fields)


def _whole(seconds: float | None) -> int | None:
    return None if seconds is None else math.ceil(seconds)
