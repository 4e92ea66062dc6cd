"""The admin API's paths, under ``/admin/v1``: tenants, their keys, their usage."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Path, Query

from sala_serve.api.admin.audit import audited
from sala_serve.api.admin.schema import (
    ChangeTenant,
    CreateKey,
    CreateTenant,
    DayUse,
    Deleted,
    ErrorAnswer,
    KeyList,
    KeyView,
    LimitUse,
    NewKeyView,
    RotateKey,
    TenantPage,
    TenantView,
    TierList,
    TierView,
    UsageView,
)
from sala_serve.errors import InvalidRequest, NotFound
from sala_serve.tenants.ledger import LIMIT_NAMES
from sala_serve.tenants.model import DEFAULT_TENANT_ID, Tenant
from sala_serve.tenants.scripts import USAGE_DAYS

if TYPE_CHECKING:
    from collections.abc import Callable

    from sala_serve.tenants.keys import KeyRing
    from sala_serve.tenants.limits import Limiter
    from sala_serve.tenants.settings import TenantsSettings
    from sala_serve.tenants.store import StoredKey

MAX_PAGE = 1000
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorAnswer} for status in (400, 401, 404, 408, 409, 413, 500, 503)
}
"""What any of the paths may answer."""
Id = Annotated[str, Path(min_length=1, max_length=128)]


def tenants_router(
    settings: TenantsSettings,
    keys: KeyRing,
    limiter: Limiter,
    *,
    unix_clock: Callable[[], float] = time.time,
) -> APIRouter:
    """Return the paths about tenants and keys."""
    router = APIRouter(prefix="/admin/v1", responses=ERRORS)
    store = keys.store

    async def any_tenant(tenant_id: str) -> Tenant:
        if tenant_id != DEFAULT_TENANT_ID:
            return await store.tenant(tenant_id)
        default = await keys.principal(DEFAULT_TENANT_ID, None)
        assert default is not None
        return default.tenant

    def shown(key: StoredKey) -> KeyView:
        return KeyView(**KeyView.fields_of(key, unix_clock()))

    @router.get("/tiers", summary="List the configured tiers")
    async def list_tiers() -> TierList:
        return TierList(
            data=[
                TierView(name=name, **section.model_dump())
                for name, section in sorted(settings.tiers.items())
            ]
        )

    @router.get("/tenants", summary="List tenants")
    async def list_tenants(
        after: Annotated[str, Query(max_length=128)] = "",
        limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = 100,
    ) -> TenantPage:
        found = await store.tenants(after=after, limit=limit + 1)
        data = [TenantView.of(tenant) for tenant in found[:limit]]
        return TenantPage(
            data=data, has_more=len(found) > limit, last_id=data[-1].id if data else None
        )

    @router.post("/tenants", status_code=201, summary="Create a tenant")
    async def create_tenant(body: CreateTenant) -> TenantView:
        with audited("tenant.create", body.id or "new") as entry:
            tenant = await store.create_tenant(
                tenant_id=body.id, name=body.name, tier=body.tier, limits=body.limits.to_limits()
            )
            entry.target = tenant.tenant_id
        return TenantView.of(tenant)

    @router.get("/tenants/{tenant_id}", summary="Show a tenant")
    async def show_tenant(tenant_id: Id) -> TenantView:
        return TenantView.of(await any_tenant(tenant_id))

    @router.patch("/tenants/{tenant_id}", summary="Change a tenant")
    async def change_tenant(tenant_id: Id, body: ChangeTenant) -> TenantView:
        changes = body.model_dump(include={"name", "tier", "is_active"}, exclude_none=True)
        limits = {} if body.limits is None else body.limits.model_dump(exclude_unset=True)
        with audited("tenant.change", tenant_id):
            tenant = await store.update_tenant(tenant_id, limit_changes=limits, **changes)
        return TenantView.of(tenant)

    @router.delete("/tenants/{tenant_id}", summary="Delete a tenant and its keys")
    async def delete_tenant(tenant_id: Id) -> Deleted:
        with audited("tenant.delete", tenant_id):
            await store.delete_tenant(tenant_id)
        return Deleted(id=tenant_id)

    @router.get("/tenants/{tenant_id}/usage", summary="Show what a tenant uses")
    async def show_usage(
        tenant_id: Id, days: Annotated[int, Query(ge=1, le=USAGE_DAYS)] = 7
    ) -> UsageView:
        tenant = await any_tenant(tenant_id)
        used = await limiter.used(tenant)
        today = datetime.fromtimestamp(unix_clock(), UTC).date()
        dates = [today - timedelta(days=back) for back in range(days)]
        first = datetime(1970, 1, 1, tzinfo=UTC).date()
        by_day = await limiter.usage_by_day(tenant_id, [(date - first).days for date in dates])
        return UsageView(
            tenant_id=tenant_id,
            limits={
                field: LimitUse(used=getattr(used, name), limit=getattr(tenant.limits, field))
                for name, field in LIMIT_NAMES.items()
            },
            days=[
                DayUse(date=date.isoformat(), **counted)
                for date, counted in zip(dates, by_day, strict=True)
            ],
        )

    @router.get("/tenants/{tenant_id}/keys", summary="List a tenant's keys")
    async def list_keys(tenant_id: Id) -> KeyList:
        return KeyList(data=[shown(key) for key in await store.keys(tenant_id)])

    @router.post("/tenants/{tenant_id}/keys", status_code=201, summary="Create a key")
    async def create_key(tenant_id: Id, body: CreateKey) -> NewKeyView:
        ends_s = body.expires_unix_s
        if ends_s is not None and ends_s <= unix_clock():
            raise InvalidRequest("Expected a time to come.", param="expires_unix_s")
        with audited("key.create", tenant_id) as entry:
            key, text = await store.create_key(
                tenant_id,
                name=body.name,
                scopes=body.scopes.to_scopes(),
                expires_unix_s=ends_s,
            )
            entry.target = f"{tenant_id}:{key.key_id}"
        return NewKeyView(key=text, **KeyView.fields_of(key, unix_clock()))

    @router.get("/keys/{key_id}", summary="Show a key")
    async def show_key(key_id: Id) -> KeyView:
        key = await store.key(key_id)
        if key is None:
            raise NotFound("There is no such key.")
        return shown(key)

    @router.post("/keys/{key_id}/rotate", summary="Give a key a new secret")
    async def rotate_key(key_id: Id, body: RotateKey | None = None) -> NewKeyView:
        keep_old_s = (body or RotateKey()).keep_old_s
        with audited("key.rotate", key_id):
            key, text = await store.rotate_key(key_id, keep_old_s=keep_old_s)
        return NewKeyView(key=text, **KeyView.fields_of(key, unix_clock()))

    @router.post("/keys/{key_id}/revoke", summary="End a key for good")
    async def revoke_key(key_id: Id) -> KeyView:
        with audited("key.revoke", key_id):
            key = await store.revoke_key(key_id)
        return shown(key)

    @router.delete("/keys/{key_id}", summary="Delete a key, which ends it too")
    async def delete_key(key_id: Id) -> Deleted:
        with audited("key.delete", key_id):
            await store.delete_key(key_id)
        return Deleted(id=key_id)

    return router
