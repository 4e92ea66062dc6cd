"""Who changed what on the admin port: one line each, whether it worked or not."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from sala_serve.errors import GatewayError

if TYPE_CHECKING:
    from collections.abc import Iterator

logger = logging.getLogger(__name__)
# written whatever `telemetry.log_level` says
logger.setLevel(logging.INFO)


@dataclass
class Entry:
    """What is being done."""

    action: str
    """``tenant.create``, ``key.revoke`` and so on."""
    target: str
    """Id of what it is done to; what a caller made up is shown with ``?`` for all but harmless characters."""


@contextmanager
def audited(
    action: str, target: str, *, via: Literal["api", "page"], client: str, request_id: str
) -> Iterator[Entry]:
    """Write a line when the block ends; it may set the target of what it makes."""
    entry = Entry(action, target)
    outcome = "failed"
    try:
        yield entry
        outcome = "done"
    except GatewayError as error:
        outcome = error.code
        raise
    finally:
        write(entry, outcome, via=via, client=client, request_id=request_id)


def write(
    entry: Entry, outcome: str, *, via: Literal["api", "page"], client: str, request_id: str
) -> None:
    """Write one line."""
    fields = {
        "action": entry.action,
        "target": _harmless(entry.target),
        "outcome": outcome,
        "via": via,
        "client": client,
        "request_id": request_id,
    }
    text = " ".join(f"{name}={value}" for name, value in fields.items())
    logger.info("audit %s", text, extra={"fields": {"message": "audit", **fields}})


def _harmless(text: str) -> str:
    # a line of the log must not be something that a caller wrote
    allowed = "".join(
        each if each.isascii() and each.isalnum() or each in "-_.:/" else "?" for each in text
    )
    return allowed[:128] or "-"
