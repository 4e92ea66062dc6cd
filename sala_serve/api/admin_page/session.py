"""Who may see the admin page: a signed cookie that is given for the admin token.

Nothing is stored: every replica that has the token accepts the cookie, and a new token ends all sessions.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

COOKIE = "sala_admin"
SESSION_S = 8 * 3600


@dataclass(frozen=True)
class Session:
    """One login."""

    cookie: str
    csrf_token: str
    """Must come with every action, in its form: another site can send neither cookie nor this."""


class Sessions:
    """Gives and checks cookies."""

    def __init__(self, token: str, *, unix_clock: Callable[[], float]) -> None:
        self._token = token.encode()
        # cookies are signed with a key of their own, so that none helps to guess the token
        self._key = hmac.digest(self._token, b"sala_serve.admin_page", hashlib.sha256)
        self._unix_clock = unix_clock

    def log_in(self, token: str) -> Session | None:
        """Return a session, ``None`` if the token is wrong."""
        if not hmac.compare_digest(_digest(token.encode()), _digest(self._token)):
            return None
        return self._session(f"{int(self._unix_clock()) + SESSION_S}.{secrets.token_hex(16)}")

    def of(self, cookie: str | None) -> Session | None:
        """Return the session of a cookie, ``None`` if it is not one of ours or over."""
        claims, _, _ = (cookie or "").rpartition(".")
        session = self._session(claims)
        if not hmac.compare_digest(session.cookie.encode(), (cookie or "").encode()):
            return None
        return session if int(claims.partition(".")[0]) > self._unix_clock() else None

    def is_csrf_token(self, session: Session, token: str) -> bool:
        """Tell whether ``token`` was in a form of this session."""
        return hmac.compare_digest(session.csrf_token.encode(), token.encode())

    def _session(self, claims: str) -> Session:
        return Session(f"{claims}.{self._sign('cookie', claims)}", self._sign("csrf", claims))

    def _sign(self, purpose: str, claims: str) -> str:
        return hmac.digest(self._key, f"{purpose}:{claims}".encode(), hashlib.sha256).hex()


def _digest(value: bytes) -> bytes:
    # one length, so that comparing tells nothing about the token's length either
    return hashlib.sha256(value).digest()
