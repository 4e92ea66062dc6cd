"""Settings of tenants, limits and the admin API."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, SecretStr, field_validator

from sala_serve.settings import Fraction, Section
from sala_serve.tenants.model import MAX_LIMIT, Limits, Tier

Limit = Annotated[int, Field(ge=0, le=MAX_LIMIT)] | None
TierName = Annotated[str, Field(pattern=r"^[a-z0-9_-]{1,32}$")]


class LimitsSection(Section):
    """Limits of one tenant; one that is not given does not apply."""

    requests_per_min: Limit = None
    """Requests a minute."""
    input_tokens_per_min: Limit = None
    """Prompt tokens a minute; those from the prefix cache count `cached_token_rate` each."""
    output_tokens_per_min: Limit = None
    """Generated tokens a minute."""
    tokens_in_flight: Limit = None
    """Prompt and answer of all running and queued requests together."""
    long_prefills: Limit = None
    """Long requests at the same time."""
    tokens_per_day: Limit = None
    """Input and output tokens a day, from 00:00 UTC."""
    cached_token_rate: Fraction = 0.1
    """Share of a cached token that counts."""

    def to_limits(self) -> Limits:
        """Return these as the limiter takes them."""
        return Limits(**self.model_dump())


class TierSection(Section):
    """One service tier."""

    weight: Annotated[float, Field(gt=0, le=1e6)] = 1.0
    """Share of the engines' work relative to other tiers' tenants."""
    priority: int = 0
    """As in vLLM: a smaller one is served earlier."""
    on_state_loss: Literal["refuse", "local_share"] = "local_share"
    """Without Redis: refuse with 503, or go on with this replica's share of each limit."""


class TenantsSettings(Section):
    """Tenants, their tiers, and the secret under which keys are stored."""

    tiers: dict[TierName, TierSection] = {
        "default": TierSection(),
        "batch": TierSection(priority=1),
    }
    """Service tiers by name; `default` must be one of them. `batch` is that of the lines of batches."""
    default_limits: LimitsSection = LimitsSection()
    """Of tenant `default`: requests with a key of `api_keys`, or all where no key is asked for."""
    require_keys: bool | None = None
    """Refuse requests without a key; none: if there are `server.api_keys` or an admin API."""
    secret: SecretStr | None = Field(default=None, min_length=16)
    """Server secret, the same for all replicas: stored keys are hashed with it and caches salted with it."""
    secret_file: Path | None = None
    """File with the server secret, made if it does not exist; none: `sala-serve/secret` in the user's state
    folder where Redis is configured, else a secret of this process alone."""
    key_cache_s: Annotated[float, Field(ge=0, le=1.5)] = 1.0
    """How long a key that was looked up is believed; a revocation works within this and a look-up."""
    stale_keys_s: Annotated[float, Field(ge=0)] = 600.0
    """While Redis is away, how long ago a key may have been looked up, in tiers that go on without it."""

    @field_validator("tiers")
    @classmethod
    def _check_tiers(cls, tiers: dict[str, TierSection]) -> dict[str, TierSection]:
        if "default" not in tiers:
            raise ValueError("expected a tier named default among them")
        return tiers

    def tier(self, name: str) -> Tier:
        """Return the tier called `name`; one that is no longer configured is `default`."""
        section = self.tiers.get(name) or self.tiers["default"]
        return Tier(name=name if name in self.tiers else "default", **section.model_dump())


class LimitsSettings(Section):
    """How limits are kept."""

    lease_s: Annotated[float, Field(ge=3, le=3600)] = 60.0
    """A reservation whose gateway was killed is given back after this."""
    local_share: Annotated[float, Field(gt=0, le=1)] = 0.5
    """While Redis is away: this replica's share of each limit. One over the number of replicas keeps the
    limits; more is kinder."""


class AdminSettings(Section):
    """The admin API, on a port of its own."""

    token: SecretStr | None = Field(default=None, min_length=16)
    """Credential, sent as `Authorization: Bearer`; none: no admin API."""
    host: str = "127.0.0.1"
    """Address to listen on."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8002
    """Port; 0: any."""
