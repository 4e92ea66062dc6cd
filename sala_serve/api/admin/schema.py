"""Bodies and answers of the admin API."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, StringConstraints

from sala_serve.tenants.model import Limits, Scopes, Tenant
from sala_serve.tenants.settings import LimitsSection, TierName

if TYPE_CHECKING:
    from sala_serve.tenants.store import StoredKey

MAX_KEEP_OLD_S = 90 * 86400
_LAST_UNIX_S = 253_402_300_799  # year 9999
_NAME_PATTERN = r"^[^\x00-\x1f\x7f-\x9f]+$"
Name = Annotated[str, StringConstraints(min_length=1, max_length=200, pattern=_NAME_PATTERN)]
ScopeName = Annotated[str, StringConstraints(max_length=256, pattern=_NAME_PATTERN)]
ScopeNames = Annotated[list[ScopeName], Field(max_length=100)] | None
Endpoint = Annotated[str, StringConstraints(max_length=256, pattern=r"^/v1/[a-z/_]+$")]
UnixTime = Annotated[FiniteFloat, Field(ge=0, le=_LAST_UNIX_S)]


class _Body(BaseModel):
    """A field it does not know is an error, and so is a number in quotes."""

    model_config = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)


class LimitsBody(LimitsSection):
    """Limits; `null` is no limit, and a limit that is not given does not apply (in a change: stays)."""

    model_config = ConfigDict(strict=True)


class CreateTenant(_Body):
    """A new tenant."""

    id: Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9-]{0,63}$")] | None = None
    """1 to 64 of a-z, 0-9 and `-`; none: one is made."""
    name: Name
    tier: TierName = "default"
    """One of the configured tiers."""
    limits: LimitsBody = LimitsBody()


class ChangeTenant(_Body):
    """What is to change; fields that are not given stay."""

    name: Name | None = None
    tier: TierName | None = None
    limits: LimitsBody | None = None
    """Those given replace the tenant's; `null` lifts one."""
    is_active: bool | None = None
    """False: its keys are refused until it is true again."""


class ScopesBody(_Body):
    """What a key may reach; what is not given is not restricted, but `tiers`."""

    models: ScopeNames = None
    endpoints: Annotated[list[Endpoint], Field(max_length=100)] | None = None
    """Paths as in docs/api.md."""
    max_context_tokens: Annotated[int, Field(ge=1, le=10**12)] | None = None
    """Longest prompt and answer together."""
    tiers: Annotated[list[TierName], Field(max_length=100)] | None = None
    """Values of `service_tier` that a request may ask for; none: the tenant's own."""

    def to_scopes(self) -> Scopes:
        """Return these as the gateway checks them."""

        def chosen(names: list[str] | None) -> frozenset[str] | None:
            return None if names is None else frozenset(names)

        return Scopes(
            models=chosen(self.models),
            endpoints=chosen(self.endpoints),
            max_context_tokens=self.max_context_tokens,
            tiers=chosen(self.tiers),
        )


class CreateKey(_Body):
    """A new key."""

    name: Name
    scopes: ScopesBody = ScopesBody()
    expires_unix_s: UnixTime | None = None
    """None: never."""


class RotateKey(_Body):
    """A key's new secret."""

    keep_old_s: Annotated[FiniteFloat, Field(ge=0, le=MAX_KEEP_OLD_S)] = 86400.0
    """How long the last secret goes on working."""


class LimitsView(BaseModel):
    """Limits of a tenant; `null` is no limit."""

    requests_per_min: int | None
    input_tokens_per_min: int | None
    output_tokens_per_min: int | None
    tokens_in_flight: int | None
    long_prefills: int | None
    tokens_per_day: int | None
    cached_token_rate: float

    @classmethod
    def of(cls, limits: Limits) -> LimitsView:
        """Show ``limits``."""
        return cls(**vars(limits))


class TenantView(BaseModel):
    """A tenant."""

    object: Literal["tenant"] = "tenant"
    id: str
    name: str
    tier: str
    is_active: bool
    limits: LimitsView

    @classmethod
    def of(cls, tenant: Tenant) -> TenantView:
        """Show ``tenant``."""
        return cls(
            id=tenant.tenant_id,
            name=tenant.name,
            tier=tenant.tier,
            is_active=tenant.is_active,
            limits=LimitsView.of(tenant.limits),
        )


class TenantPage(BaseModel):
    """Tenants in the order of their ids."""

    object: Literal["list"] = "list"
    data: list[TenantView]
    has_more: bool
    last_id: str | None
    """For `after`, to get the next ones."""


class ScopesView(BaseModel):
    """What a key may reach; `null` is not restricted (`tiers`: the tenant's own)."""

    models: list[str] | None
    endpoints: list[str] | None
    max_context_tokens: int | None
    tiers: list[str] | None

    @classmethod
    def of(cls, scopes: Scopes) -> ScopesView:
        """Show ``scopes``."""
        shown: dict[str, Any] = {
            name: sorted(value) if isinstance(value, frozenset) else value
            for name, value in vars(scopes).items()
        }
        return cls(**shown)


class SecretView(BaseModel):
    """When one of a key's secrets began, and when it ends."""

    created_unix_s: float
    expires_unix_s: float | None


class KeyView(BaseModel):
    """A key, without its secret."""

    object: Literal["key"] = "key"
    id: str
    tenant_id: str
    name: str
    status: Literal["active", "expired", "revoked"]
    scopes: ScopesView
    created_unix_s: float
    expires_unix_s: float | None
    revoked_unix_s: float | None
    secrets: list[SecretView]
    """The newest first; two after a rotation."""

    @classmethod
    def fields_of(cls, key: StoredKey, now_unix_s: float) -> dict[str, Any]:
        """Return the fields that show ``key``."""
        return {
            "id": key.key_id,
            "tenant_id": key.tenant_id,
            "name": key.name,
            "status": key.status(now_unix_s),
            "scopes": ScopesView.of(key.scopes),
            "created_unix_s": key.created_unix_s,
            "expires_unix_s": key.expires_unix_s,
            "revoked_unix_s": key.revoked_unix_s,
            "secrets": [
                SecretView(created_unix_s=each.created_unix_s, expires_unix_s=each.expires_unix_s)
                for each in key.secrets
            ],
        }


class NewKeyView(KeyView):
    """A key with its secret, which cannot be shown again."""

    key: str
    """What clients send: `Authorization: Bearer <key>`."""


class KeyList(BaseModel):
    """A tenant's keys, the oldest first."""

    object: Literal["list"] = "list"
    data: list[KeyView]


class LimitUse(BaseModel):
    """How much of one limit is used."""

    used: float
    limit: int | None


class DayUse(BaseModel):
    """What was used on one day, UTC."""

    date: str
    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Of the prompt tokens, those from the prefix cache."""
    completion_tokens: int = 0


class UsageView(BaseModel):
    """What a tenant uses."""

    object: Literal["usage"] = "usage"
    tenant_id: str
    limits: dict[str, LimitUse]
    """Now, by name of the limit; of those a minute, what has not refilled yet."""
    days: list[DayUse]
    """Today first."""


class TierView(BaseModel):
    """A configured tier."""

    name: str
    weight: float
    priority: int
    on_state_loss: Literal["refuse", "local_share"]


class TierList(BaseModel):
    """All configured tiers."""

    object: Literal["list"] = "list"
    data: list[TierView]


class RequestView(BaseModel):
    """A request that this replica is serving."""

    request_id: str
    tenant_id: str | None
    key_id: str | None
    endpoint: str
    tier: str | None
    engine_id: str | None
    phase: str | None
    age_s: float
    num_prompt_tokens: int | None
    progress: dict[str, float | None] | None
    """While it waits: place and expected start; while it prefills: tokens done of the total."""


class RequestList(BaseModel):
    """Running requests of this replica, the oldest first."""

    object: Literal["list"] = "list"
    data: list[RequestView]


class Cancelled(BaseModel):
    """Says that a request was cut."""

    request_id: str
    cancelled: Literal[True] = True


class Deleted(BaseModel):
    """Says that an object is gone."""

    id: str
    deleted: Literal[True] = True


class ErrorDetail(BaseModel):
    """What went wrong; docs/api.md says what to do about each code."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """Every answer that is not a success."""

    error: ErrorDetail
