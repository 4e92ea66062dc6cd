"""The server secret: one value, the same on all replicas, from which every other secret is derived."""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sala_serve.tenants.settings import TenantsSettings

_NUM_BYTES = 32
_SHORTEST = 16


class ServerSecret:
    """Derives keys for one purpose each; ``repr`` shows nothing of it."""

    def __init__(self, value: bytes) -> None:
        if len(value) < _SHORTEST:
            raise ValueError(
                f"expected a server secret of at least {_SHORTEST} bytes, got {len(value)}"
            )
        self._value = value

    def __repr__(self) -> str:
        return "<server secret>"

    def derive(self, purpose: str) -> bytes:
        """Return 32 bytes for ``purpose``; one purpose's tell nothing about another's."""
        return hmac.digest(self._value, b"sala-serve/" + purpose.encode(), hashlib.sha256)

    @classmethod
    def load(cls, settings: TenantsSettings, *, is_shared: bool) -> ServerSecret:
        """Read the secret from the settings or its file, or make it.

        Args:
            settings: ``secret``, else ``secret_file``.
            is_shared: whether other processes, now or later, see what is stored under it. If not, and
                nothing is configured, a secret of this process is enough.

        Raises:
            ValueError: the file cannot be read or made, or is too short.
        """
        if settings.secret is not None:
            return cls(settings.secret.get_secret_value().encode())
        if settings.secret_file is not None:
            return cls(_read_or_make(settings.secret_file))
        if not is_shared:
            return cls(secrets.token_bytes(_NUM_BYTES))
        return cls(_read_or_make(_state_folder() / "secret"))


def _state_folder() -> Path:
    base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(base, "sala-serve")


def _read_or_make(path: Path) -> bytes:
    try:
        if not path.exists():
            _make(path)
        return path.read_bytes().strip()
    except OSError as error:
        raise ValueError(
            f"cannot read or make the server secret {path} ({error.strerror}): set tenants.secret or "
            "tenants.secret_file"
        ) from None


def _make(path: Path) -> None:
    """Make a secret; of several processes that do so at the same time all find the same one."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    whole = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
    try:
        whole.touch(mode=0o600)
        whole.write_text(secrets.token_urlsafe(_NUM_BYTES), encoding="ascii")
        with suppress(FileExistsError):
            path.hardlink_to(whole)
    finally:
        whole.unlink(missing_ok=True)
