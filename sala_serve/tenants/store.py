"""Tenants and their keys, as stored: read, made, changed and deleted by the admin API.

Keys in Redis: ``sala:tenant:ID`` and ``sala:key:ID`` hold a JSON object each, ``sala:tenants`` and
``sala:tenant-keys:ID`` the ids. A change is a read, then a write that happens only if nothing has changed
since. Of a key's secret only a keyed hash is stored.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import re
import secrets
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from sala_serve.errors import Conflict, InvalidRequest, NotFound, StateUnavailable
from sala_serve.tenants.model import DEFAULT_TENANT_ID, Limits, Scopes, Tenant

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from sala_serve.state import State
    from sala_serve.tenants.secret import ServerSecret

logger = logging.getLogger(__name__)

TENANT_ID = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")
KEY_ID_LENGTH = 16
_SECRET_BYTES = 32
_ID_LETTERS = "abcdefghijklmnopqrstuvwxyz234567"
MAX_KEYS = 100
"""Of one tenant; all of them are read to list them."""
_SECRET_CHECK = "sala:secret-check"

_WRITE = """
local stored = redis.call('GET', KEYS[1])
if (stored or '') ~= ARGV[1] then return 0 end
if KEYS[3] and redis.call('EXISTS', KEYS[3]) == 0 then return -1 end
redis.call('SET', KEYS[1], ARGV[2])
redis.call('SADD', KEYS[2], ARGV[3])
return 1
"""
_DELETE_TENANT = """
for _, id in ipairs(redis.call('SMEMBERS', KEYS[2])) do redis.call('DEL', 'sala:key:' .. id) end
redis.call('DEL', KEYS[2])
redis.call('SREM', KEYS[3], ARGV[1])
return redis.call('DEL', KEYS[1])
"""

_DELETE_KEY = """
redis.call('SREM', KEYS[2], ARGV[1])
return redis.call('DEL', KEYS[1])
"""


@dataclass(frozen=True)
class StoredSecret:
    """One of a key's secrets."""

    digest: str = field(repr=False)
    """Keyed hash, hexadecimal."""
    created_unix_s: float
    expires_unix_s: float | None = None


@dataclass(frozen=True)
class StoredKey:
    """A key without its secret, which nobody has but its owner."""

    key_id: str
    tenant_id: str
    name: str
    scopes: Scopes
    created_unix_s: float
    secrets: tuple[StoredSecret, ...]
    """The newest first; two while a rotation's old one still works."""
    expires_unix_s: float | None = None
    revoked_unix_s: float | None = None

    def status(self, now_unix_s: float) -> Literal["active", "expired", "revoked"]:
        """Say whether the key works."""
        if self.revoked_unix_s is not None:
            return "revoked"
        if self.expires_unix_s is not None and self.expires_unix_s <= now_unix_s:
            return "expired"
        return "active"


class TenantStore:
    """Reads and writes tenants and keys.

    Every method raises :class:`~sala_serve.errors.StateUnavailable` while Redis is away.

    Args:
        state: where they are stored.
        secret: under which keys are hashed; the same on all replicas.
        tier_names: tiers that a tenant may have.
        unix_clock: seconds.
    """

    def __init__(
        self,
        state: State,
        secret: ServerSecret,
        *,
        tier_names: Collection[str],
        unix_clock: Callable[[], float],
    ) -> None:
        self._state = state
        self._pepper = secret.derive("keys")
        self._check_value = secret.derive("check").hex().encode()
        self._tier_names = tier_names
        self._unix_clock = unix_clock
        self._write = state.redis.register_script(_WRITE)
        self._delete_tenant = state.redis.register_script(_DELETE_TENANT)
        self._delete_key = state.redis.register_script(_DELETE_KEY)
        self._num_losses_checked: int | None = None

    def digest(self, key_id: str, secret: str) -> str:
        """Return the keyed hash under which a key's secret is stored."""
        return hmac.new(self._pepper, f"{key_id}-{secret}".encode(), hashlib.sha256).hexdigest()

    async def tenants(self, *, after: str = "", limit: int = 100) -> list[Tenant]:
        """Return tenants in the order of their ids, ``limit`` of those that come after ``after``."""
        with self._state.guarded():
            ids = sorted(each.decode() for each in await self._members("sala:tenants"))
            page = [each for each in ids if each > after][:limit]
            texts = await self._texts([f"sala:tenant:{each}" for each in page])
        # one that was deleted in between is not there
        found = zip(page, texts, strict=True)
        return [_read_tenant(tenant_id, text) for tenant_id, text in found if text is not None]

    async def tenant(self, tenant_id: str) -> Tenant:
        """Return one tenant.

        Raises:
            NotFound: there is none with this id.
        """
        return _read_tenant(tenant_id, await self._require(f"sala:tenant:{tenant_id}", "tenant"))

    async def create_tenant(
        self, *, name: str, tier: str, limits: Limits, tenant_id: str | None = None
    ) -> Tenant:
        """Make a tenant, under an id of its own if none is given.

        Raises:
            InvalidRequest: the id or the tier cannot be.
            Conflict: the id is taken.
        """
        tenant_id = tenant_id or f"t-{_random_id()}"
        if not TENANT_ID.fullmatch(tenant_id):
            message = "Expected 1 to 64 of a-z, 0-9 and -, beginning with a letter or a digit."
            raise InvalidRequest(message, param="id")
        tenant = Tenant(tenant_id, name, tier, limits)
        self._check_tier(tier)
        if tenant_id == DEFAULT_TENANT_ID or not await self._save_tenant(None, tenant):
            raise Conflict(f"There is a tenant {tenant_id} already.")
        return tenant

    async def update_tenant(
        self, tenant_id: str, *, limit_changes: Mapping[str, Any] | None = None, **changes: Any
    ) -> Tenant:
        """Change fields of a tenant: ``name``, ``tier``, ``limits``, ``is_active``.

        Args:
            tenant_id: whose.
            limit_changes: fields of its limits; those that are not named stay.
            **changes: fields of the tenant.

        Raises:
            NotFound: there is none with this id.
            InvalidRequest: there is no such tier.
        """
        if "tier" in changes:
            self._check_tier(changes["tier"])
        while True:
            text = await self._require(f"sala:tenant:{tenant_id}", "tenant")
            tenant = replace(_read_tenant(tenant_id, text), **changes)
            tenant = replace(tenant, limits=replace(tenant.limits, **(limit_changes or {})))
            if await self._save_tenant(text, tenant):
                return tenant

    async def delete_tenant(self, tenant_id: str) -> None:
        """Delete a tenant and its keys; what it used stays until it expires.

        Raises:
            NotFound: there is none with this id.
        """
        names = [f"sala:tenant:{tenant_id}", f"sala:tenant-keys:{tenant_id}", "sala:tenants"]
        with self._state.guarded():
            if not await self._delete_tenant(keys=names, args=[tenant_id]):
                raise NotFound("There is no such tenant.")

    async def keys(self, tenant_id: str) -> list[StoredKey]:
        """Return a tenant's keys, the oldest first.

        Raises:
            NotFound: there is no such tenant.
        """
        await self.tenant(tenant_id)
        with self._state.guarded():
            ids = [each.decode() for each in await self._members(f"sala:tenant-keys:{tenant_id}")]
            texts = await self._texts([f"sala:key:{each}" for each in ids])
        found = zip(ids, texts, strict=True)
        keys = [_read_key(key_id, text) for key_id, text in found if text is not None]
        return sorted(keys, key=lambda key: (key.created_unix_s, key.key_id))

    async def key(self, key_id: str) -> StoredKey | None:
        """Return one key, if it is there."""
        with self._state.guarded():
            await self._check_secret()
            (text,) = await self._texts([f"sala:key:{key_id}"])
        return None if text is None else _read_key(key_id, text)

    async def create_key(
        self, tenant_id: str, *, name: str, scopes: Scopes, expires_unix_s: float | None = None
    ) -> tuple[StoredKey, str]:
        """Make a key.

        Returns:
            The key, and the text that its owner sends, which cannot be shown again.

        Raises:
            NotFound: there is no such tenant.
            Conflict: it has as many keys as it may have.
        """
        if len(await self.keys(tenant_id)) >= MAX_KEYS:
            raise Conflict(f"A tenant may have {MAX_KEYS} keys.")
        key_id, now_s = _random_id(), self._unix_clock()
        token, stored = self._new_secret(key_id)
        key = StoredKey(key_id, tenant_id, name, scopes, now_s, (stored,), expires_unix_s)
        with self._state.guarded():
            await self._check_secret(is_first=True)
        await self._save_key(None, key)
        return key, token

    async def rotate_key(self, key_id: str, *, keep_old_s: float) -> tuple[StoredKey, str]:
        """Give a key a new secret; its last one works for ``keep_old_s`` more seconds.

        Returns:
            The key, and the text that its owner sends from now on, which cannot be shown again.

        Raises:
            NotFound: there is no such key.
            Conflict: it is revoked or expired.
        """
        token, newest = self._new_secret(key_id)

        def rotated(key: StoredKey) -> StoredKey:
            last = key.secrets[0]
            ends_s = self._unix_clock() + keep_old_s
            kept = (replace(last, expires_unix_s=ends_s),) if keep_old_s > 0 else ()
            return replace(key, secrets=(newest, *kept))

        return await self._change_key(key_id, rotated), token

    async def revoke_key(self, key_id: str) -> StoredKey:
        """End a key for good.

        Raises:
            NotFound: there is no such key.
        """

        def revoked(key: StoredKey) -> StoredKey:
            return replace(key, revoked_unix_s=key.revoked_unix_s or self._unix_clock())

        return await self._change_key(key_id, revoked, must_be_active=False)

    async def delete_key(self, key_id: str) -> None:
        """Forget a key, which ends it too.

        Raises:
            NotFound: there is no such key.
        """
        key = _read_key(key_id, await self._require(f"sala:key:{key_id}", "key"))
        names = [f"sala:key:{key_id}", f"sala:tenant-keys:{key.tenant_id}"]
        with self._state.guarded():
            if not await self._delete_key(keys=names, args=[key_id]):
                raise NotFound("There is no such key.")

    async def _change_key(
        self,
        key_id: str,
        change: Callable[[StoredKey], StoredKey],
        *,
        must_be_active: bool = True,
    ) -> StoredKey:
        while True:
            text = await self._require(f"sala:key:{key_id}", "key")
            key = _read_key(key_id, text)
            if must_be_active and (status := key.status(self._unix_clock())) != "active":
                raise Conflict(f"The key is {status}.")
            if await self._save_key(text, changed := change(key)):
                return changed

    def _new_secret(self, key_id: str) -> tuple[str, StoredSecret]:
        secret = secrets.token_urlsafe(_SECRET_BYTES)
        stored = StoredSecret(self.digest(key_id, secret), self._unix_clock())
        return f"sk-sala-{key_id}-{secret}", stored

    async def _save_tenant(self, expected: bytes | None, tenant: Tenant) -> bool:
        record = {**asdict(tenant)}
        del record["tenant_id"]
        names = [f"sala:tenant:{tenant.tenant_id}", "sala:tenants"]
        return await self._save(names, expected, record, tenant.tenant_id)

    async def _save_key(self, expected: bytes | None, key: StoredKey) -> bool:
        record = asdict(key)
        del record["key_id"]
        for name, value in record["scopes"].items():
            if isinstance(value, frozenset):
                record["scopes"][name] = sorted(value)
        names = [f"sala:key:{key.key_id}", f"sala:tenant-keys:{key.tenant_id}"]
        names.append(f"sala:tenant:{key.tenant_id}")
        return await self._save(names, expected, record, key.key_id)

    async def _save(
        self, names: list[str], expected: bytes | None, record: dict[str, Any], member: str
    ) -> bool:
        """Write a record if the stored one is still ``expected``; return whether it was."""
        args: list[bytes | str] = [expected or b"", json.dumps(record), member]
        with self._state.guarded():
            outcome = int(await self._write(keys=names, args=args))
        if outcome == -1:
            raise NotFound("There is no such tenant.")
        return outcome == 1

    async def _require(self, name: str, what: str) -> bytes:
        with self._state.guarded():
            (text,) = await self._texts([name])
        if text is None:
            raise NotFound(f"There is no such {what}.")
        return text

    async def _texts(self, names: Sequence[str]) -> list[bytes | None]:
        if not names:
            return []
        texts: list[bytes | None] = await self._state.redis.mget(names)  # type: ignore[assignment]
        return texts

    async def _members(self, name: str) -> set[bytes]:
        members: set[bytes] = await self._state.redis.smembers(name)  # type: ignore[assignment]
        return members

    async def _check_secret(self, *, is_first: bool = False) -> None:
        """Find out whether keys were stored under our secret, once each time Redis (be)comes available."""
        if self._num_losses_checked == self._state.num_losses and not is_first:
            return
        if is_first:
            await self._state.redis.set(_SECRET_CHECK, self._check_value, nx=True)
        (stored,) = await self._texts([_SECRET_CHECK])
        if stored is None:
            return
        if not hmac.compare_digest(stored, self._check_value):
            logger.error(
                "keys in Redis were stored under another server secret: set tenants.secret to the same "
                "value on all replicas"
            )
            raise StateUnavailable("The gateway cannot read the stored keys.")
        self._num_losses_checked = self._state.num_losses

    def _check_tier(self, tier: str) -> None:
        if tier not in self._tier_names:
            names = ", ".join(sorted(self._tier_names))
            raise InvalidRequest(f"Expected one of the configured tiers: {names}.", param="tier")


def _read_tenant(tenant_id: str, text: bytes) -> Tenant:
    record = json.loads(text)
    limits = Limits(**record.pop("limits"))
    return Tenant(tenant_id=tenant_id, limits=limits, **record)


def _read_key(key_id: str, text: bytes) -> StoredKey:
    record = json.loads(text)
    scopes: dict[str, Any] = {
        name: frozenset(value) if isinstance(value, list) else value
        for name, value in record.pop("scopes").items()
    }
    stored = tuple(StoredSecret(**each) for each in record.pop("secrets"))
    return StoredKey(key_id=key_id, scopes=Scopes(**scopes), secrets=stored, **record)


def _random_id() -> str:
    return "".join(secrets.choice(_ID_LETTERS) for _ in range(KEY_ID_LENGTH))
