"""Who changed what on the admin port: one line each, whether it worked or not."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sala_serve.errors import GatewayError

if TYPE_CHECKING:
    from collections.abc import Iterator

logger = logging.getLogger(__name__)
# written whatever `telemetry.log_level` says
logger.setLevel(logging.INFO)
NOT_FOUND = "not_found"


@dataclass(frozen=True)
class Caller:
    """Whose request is handled."""

    via: str
    """``api`` or ``page``."""
    client: str
    """Address."""
    request_id: str


CALLER: ContextVar[Caller] = ContextVar("sala_serve.admin_caller")
"""Set by the guard for each request."""


@dataclass
class Entry:
    """What is being done."""

    action: str
    """``tenant.create``, ``key.revoke`` and so on."""
    target: str
    """Id of what it is done to."""
    outcome: str = "done"
    """Or the code of an error."""


@contextmanager
def audited(action: str, target: str) -> Iterator[Entry]:
    """Write a line when the block ends; it may set the target of what it makes, and the outcome."""
    entry = Entry(action, target)
    try:
        yield entry
    except GatewayError as error:
        entry.outcome = error.code
        raise
    except BaseException:
        entry.outcome = "failed"
        raise
    finally:
        write(entry)


def write(entry: Entry) -> None:
    """Write one line."""
    fields = {
        "action": entry.action,
        "target": _harmless(entry.target),
        "outcome": entry.outcome,
        **vars(CALLER.get()),
    }
    text = " ".join(f"{name}={value}" for name, value in fields.items())
    logger.info("audit %s", text, extra={"fields": {"message": "audit", **fields}})


def _harmless(text: str) -> str:
    # a line of the log must not be something that a caller wrote
    letters = (
        each if each.isascii() and each.isalnum() or each in "-_.:/" else "?" for each in text
    )
    return "".join(letters)[:128] or "-"
