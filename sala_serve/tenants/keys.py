"""Who sent a request, told by its API key.

A key is ``sk-sala-<id>-<secret>``. It is looked up by its id, and the hash of its secret is compared in constant
time; an id that does not exist takes the same path. What was looked up is believed for ``key_cache_s``, so a
revoked key stops working on all replicas within that. A secret that does not fit is looked up again first: a new
one works at once.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sala_serve.errors import InvalidApiKey, NotFound, StateUnavailable
from sala_serve.tenants.model import DEFAULT_TENANT_ID, Principal, Tenant
from sala_serve.tenants.store import KEY_ID_LENGTH, TenantStore

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from sala_serve.state import State
    from sala_serve.tenants.secret import ServerSecret
    from sala_serve.tenants.settings import TenantsSettings
    from sala_serve.tenants.store import StoredKey

_KEY = re.compile(rf"sk-sala-([a-z2-7]{{{KEY_ID_LENGTH}}})-([A-Za-z0-9_-]{{43}})")
_NO_DIGEST = "0" * 64
MAX_CACHED = 10_000
"""Keys remembered by one replica, unknown ones included."""
MAX_LOOK_UP_S = 2.0
"""What takes longer is not believed: the key may have been revoked since."""


@dataclass(frozen=True)
class _Found:
    key: StoredKey | None
    tenant: Tenant | None
    looked_up_at_s: float


class KeyRing:
    """Tells whose a key is.

    Args:
        state: where keys are stored.
        settings: of tenants.
        secret: under which keys are hashed.
        static_keys: accepted besides, for the tenant "default".
        has_admin: whether keys can be made, so that one is asked for.
        clock: monotonic seconds.
        unix_clock: seconds.
    """

    def __init__(
        self,
        state: State,
        settings: TenantsSettings,
        *,
        secret: ServerSecret,
        static_keys: Collection[str] = (),
        has_admin: bool = False,
        clock: Callable[[], float] = time.monotonic,
        unix_clock: Callable[[], float] = time.time,
    ) -> None:
        self.store = TenantStore(
            state, secret, tier_names=settings.tiers.keys(), unix_clock=unix_clock
        )
        """Makes and changes tenants and keys."""
        self._settings = settings
        self._clock = clock
        self._unix_clock = unix_clock
        # digests have one length, so that comparing them tells nothing about a key's length either
        self._static_digests = [hashlib.sha256(key.encode()).digest() for key in static_keys]
        needs = settings.require_keys
        self.asks_for_keys = bool(static_keys) or has_admin if needs is None else needs
        """Whether a request without a key is refused."""
        limits = settings.default_limits.to_limits()
        tenant = Tenant(DEFAULT_TENANT_ID, "Default", "default", limits)
        self._default = Principal(tenant, key_id=None)
        self._cache: OrderedDict[str, _Found] = OrderedDict()

    async def authenticate(self, token: str | None) -> Principal:
        """Return on whose behalf a request with this key runs.

        Args:
            token: what came after ``Bearer``; ``None``: nothing came.

        Raises:
            InvalidApiKey: no key came and one is needed, or this one does not work (any more).
            StateUnavailable: Redis is away and the key is not remembered.
        """
        parts = _KEY.fullmatch(token or "")
        if parts is None:
            return self._authenticate_static(token)
        key_id, secret = parts.groups()
        given = self.store.digest(key_id, secret)
        began_at_s = self._clock()
        found = await self._look_up(key_id)
        is_right = self._fits(found, given)
        if not is_right and found.looked_up_at_s < began_at_s:
            found = await self._look_up(key_id, not_before_s=began_at_s)
            is_right = self._fits(found, given)
        principal = self._principal(found)
        if not is_right or principal is None:
            raise InvalidApiKey("Incorrect API key provided.")
        return principal

    def _fits(self, found: _Found, given: str) -> bool:
        now_s = self._unix_clock()
        stored = [
            each.digest
            for each in (found.key.secrets if found.key else ())
            if each.expires_unix_s is None or each.expires_unix_s > now_s
        ]
        # two are compared whatever is stored, so that the time taken does not tell what is
        digests = (*stored, _NO_DIGEST, _NO_DIGEST)[:2]
        return sum(hmac.compare_digest(given, digest) for digest in digests) > 0

    async def principal(self, tenant_id: str, key_id: str | None) -> Principal | None:
        """Return on whose behalf a stored job runs now; ``None``: its key or tenant no longer works.

        Raises:
            StateUnavailable: Redis is away and the key is not remembered.
        """
        if key_id is None:
            return self._default if tenant_id == DEFAULT_TENANT_ID else None
        principal = self._principal(await self._look_up(key_id))
        return principal if principal and principal.tenant.tenant_id == tenant_id else None

    def _authenticate_static(self, token: str | None) -> Principal:
        given = hashlib.sha256((token or "").encode()).digest()
        # every key is compared, so that the time taken does not tell which one matched
        is_ours = sum(hmac.compare_digest(given, digest) for digest in self._static_digests) > 0
        if is_ours or not self.asks_for_keys:
            return self._default
        message = "No API key: send it as 'Authorization: Bearer <key>'."
        raise InvalidApiKey("Incorrect API key provided." if token else message)

    def _principal(self, found: _Found) -> Principal | None:
        key, tenant = found.key, found.tenant
        if key is None or tenant is None or not tenant.is_active:
            return None
        if key.status(self._unix_clock()) != "active":
            return None
        return Principal(tenant, key.key_id, key.scopes)

    async def _look_up(self, key_id: str, not_before_s: float = float("-inf")) -> _Found:
        now_s = self._clock()
        known = self._cache.get(key_id)
        oldest_s = max(now_s - self._settings.key_cache_s, not_before_s)
        if known is not None and known.looked_up_at_s > oldest_s:
            return known
        try:
            found = await self._read(key_id, now_s)
        except StateUnavailable:
            if known is None or known.tenant is None or not self._may_be_stale(known, known.tenant):
                raise
            return known
        self._cache[key_id] = found
        self._cache.move_to_end(key_id)
        if len(self._cache) > MAX_CACHED:
            self._cache.popitem(last=False)
        return found

    async def _read(self, key_id: str, now_s: float) -> _Found:
        # dated before it is asked for: a revocation during the look-up may be missed by it
        key = await self.store.key(key_id)
        try:
            tenant = None if key is None else await self.store.tenant(key.tenant_id)
        except NotFound:
            tenant = None
        if self._clock() - now_s >= MAX_LOOK_UP_S:
            raise StateUnavailable("The gateway's shared state is too slow; please retry.")
        return _Found(key, tenant, now_s)

    def _may_be_stale(self, known: _Found, tenant: Tenant) -> bool:
        is_recent = self._clock() - known.looked_up_at_s < self._settings.stale_keys_s
        return is_recent and self._settings.tier(tenant.tier).on_state_loss == "local_share"
