"""The engine's answer: read its events, and know what it has used so far, complete or not."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from sala_serve.engine.vllm_errors import error_from_vllm
from sala_serve.errors import EngineLost
from sala_serve.telemetry import Usage

if TYPE_CHECKING:
    from sala_serve.engine.progress import RequestProgress


def parse_chunk(data: bytes, *, prompt_field: str) -> dict[str, Any]:
    """Parse one event of the engine.

    Raises:
        EngineLost: it is damaged.
        GatewayError: it is an error event.
    """
    try:
        chunk = json.loads(data)
    except ValueError:
        raise EngineLost("The engine's stream is damaged.") from None
    if not isinstance(chunk, dict):
        raise EngineLost("The engine's stream is damaged.")
    if (error := chunk.get("error")) is not None:
        status = error.get("code") if isinstance(error, dict) else None
        status = status if isinstance(status, int) else 500
        raise error_from_vllm(status, data, prompt_field=prompt_field)
    return chunk


def parse_whole(body: bytes) -> dict[str, Any]:
    """Parse an answer that is not a stream; raises :class:`EngineLost` if it is cut short."""
    try:
        document = json.loads(body)
    except ValueError:
        raise EngineLost("The engine's answer is not complete.") from None
    if not isinstance(document, dict):
        raise EngineLost("The engine's answer is not complete.")
    return document


def usage_of(document: dict[str, Any]) -> Usage | None:
    """Return what the engine says it took, if it says so here."""
    usage = document.get("usage")
    if not isinstance(usage, dict):
        return None
    details = usage.get("prompt_tokens_details") or {}
    return Usage(
        num_prompt_tokens=usage.get("prompt_tokens") or 0,
        num_cached_tokens=details.get("cached_tokens") or 0,
        num_completion_tokens=usage.get("completion_tokens") or 0,
    )


@dataclass
class Meter:
    """What one generation has used, so that it can be settled whenever it ends."""

    num_prompt_tokens: int
    """As counted."""
    reported: Usage | None = None
    """By the engine, with the last token."""
    progress: RequestProgress | None = None
    """The last look; after another turn, of that one."""
    num_kept_tokens: int = 0
    """Of the prompt, known to be done when the last turn gave way."""
    num_found_tokens: int | None = None
    """Cached tokens that the first turn found, if it gave way: what later ones find beyond is the request's own."""
    num_chunks: int = 0
    """Chunks with tokens; one has one token or more."""
    open_choices: set[int] = field(default_factory=set)
    """Indices of choices that have begun and not given a ``finish_reason``."""
    is_free: bool = False
    """Whether nothing is charged, because it failed."""

    @property
    def has_first_token(self) -> bool:
        """Whether the prompt is computed."""
        is_decoding = self.progress is not None and self.progress.phase == "decoding"
        return self.num_chunks > 0 or is_decoding

    @property
    def has_started(self) -> bool:
        """Whether the engine may have computed anything; unless it says otherwise, it may."""
        if self.num_chunks > 0 or self.progress is None:
            return True
        return self.progress.phase != "waiting"

    def take(self, chunk: dict[str, Any]) -> None:
        """Note one chunk with choices."""
        self.num_chunks += 1
        for choice in chunk["choices"]:
            index = choice.get("index", 0)
            if choice.get("finish_reason") is None:
                self.open_choices.add(index)
            else:
                self.open_choices.discard(index)

    def give_back(self) -> None:
        """Charge nothing: it failed, and through no fault of the client's."""
        self.is_free = True

    def give_way(self) -> None:
        """Note that this turn is over; the engine should keep what it has computed."""
        if self.progress is not None:
            if self.num_found_tokens is None:
                self.num_found_tokens = self.progress.num_cached_tokens
            self.num_kept_tokens = self.progress.num_computed_tokens
            self.progress = None

    @property
    def may_give_way(self) -> bool:
        """Whether what was computed before was found again; else it would never come to an end."""
        found = 0 if self.progress is None else self.progress.num_cached_tokens
        return not self.has_first_token and 2 * found >= self.num_kept_tokens

    def usage(self) -> Usage | None:
        """Return what is to be charged: as reported, else what is known to be computed; ``None`` is nothing."""
        if self.is_free:
            return None
        if self.reported is not None:
            cached = self._found(self.reported.num_cached_tokens)
            return replace(self.reported, num_cached_tokens=cached)
        progress = self.progress
        cached = self._found(0 if progress is None else progress.num_cached_tokens)
        if self.has_first_token:
            seen = 0 if progress is None else progress.num_output_tokens
            return Usage(self.num_prompt_tokens, cached, max(seen, self.num_chunks))
        done = max(self.num_kept_tokens, 0 if progress is None else progress.num_computed_tokens)
        return Usage(done, cached, 0) if done else None

    def _found(self, num_cached_tokens: int) -> int:
        if self.num_found_tokens is None:
            return num_cached_tokens
        return min(num_cached_tokens, self.num_found_tokens)
