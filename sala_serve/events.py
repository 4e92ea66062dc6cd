"""Server-sent events as bytes: cut a stream into them, read one, write one."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Mapping

DONE = b"[DONE]"
DONE_EVENT = b"data: [DONE]\n\n"
_BLANK_LINE = re.compile(rb"\n\r?\n")


async def split_events(chunks: AsyncIterator[bytes]) -> AsyncGenerator[bytes]:
    """Yield each event or comment with its closing blank line; a torn last one is dropped."""
    buffer = bytearray()
    async for chunk in chunks:
        searched = max(len(buffer) - 3, 0)  # a blank line may be cut anywhere
        buffer += chunk
        while found := _BLANK_LINE.search(buffer, searched):
            yield bytes(buffer[: found.end()])
            del buffer[: found.end()]
            searched = 0


def event_data(event: bytes) -> bytes | None:
    """Return the payload of a one-line ``data:`` event, ``None`` for a comment."""
    return event.removeprefix(b"data:").strip() if event.startswith(b"data:") else None


def comment(name: str, fields: Mapping[str, int | None]) -> bytes:
    """Return ``: name field=value ...``, which clients ignore; unknown values (``None``) are left out."""
    known = "".join(f" {key}={value}" for key, value in fields.items() if value is not None)
    return f": {name}{known}\n\n".encode()


def named_event(name: str, document: Mapping[str, Any]) -> bytes:
    """Return an event with a name of its own."""
    return f"event: {name}\ndata: {json.dumps(document)}\n\n".encode()
