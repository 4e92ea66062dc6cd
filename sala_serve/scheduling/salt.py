"""The secret part of every prefix: no tenant can find out what another has sent."""

from __future__ import annotations

import base64
import hashlib
import hmac


def cache_salt(secret: bytes, tenant_id: str) -> str:
    """Return the ``cache_salt`` of a tenant's requests: vLLM shares prefixes only between equal ones.

    43 characters of ``A-Z a-z 0-9 - _``, all of which vLLM 0.32 accepts (up to 128).
    """
    digest = _digest(secret, b"cache-salt", tenant_id)
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode()


def prefix_key(secret: bytes, tenant_id: str) -> int:
    """Return 64 bits that keep a tenant's prefixes apart from others' in the gateway's own memory."""
    return int.from_bytes(_digest(secret, b"prefix-key", tenant_id)[:8], "little")


def _digest(secret: bytes, purpose: bytes, tenant_id: str) -> bytes:
    # every part with its length before it, so that no two pairs read the same
    parts = (purpose, tenant_id.encode())
    message = b"".join(len(part).to_bytes(4, "big") + part for part in parts)
    return hmac.digest(secret, message, hashlib.sha256)
