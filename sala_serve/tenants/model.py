"""What a tenant is: its tier, its limits, and what one of its keys may reach."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from sala_serve.errors import PermissionDenied

DEFAULT_TENANT_ID = "default"
"""Of requests with a key of the static list, and of all requests where no key is asked for."""


@dataclass(frozen=True)
class Limits:
    """How much one tenant may ask for; ``None`` is no limit.

    All tokens are the model's own. The three limits a minute are token buckets: full at first, refilled
    evenly, so that within any ``t`` seconds at most ``limit * (1 + t / 60)`` pass.
    """

    requests_per_min: int | None = None
    input_tokens_per_min: int | None = None
    """Prompt tokens; those taken from the prefix cache count ``cached_token_rate`` each."""
    output_tokens_per_min: int | None = None
    tokens_in_flight: int | None = None
    """Prompt and answer of all running and queued requests together, cached tokens included: they hold
    memory too."""
    long_prefills: int | None = None
    """Long requests at the same time; the caller says which are long."""
    tokens_per_day: int | None = None
    """Input, cached tokens at their rate, and output; a day begins at 00:00 UTC."""
    cached_token_rate: float = 0.1
    """Share of a cached token that counts, from 0 to 1."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name == "cached_token_rate":
                if not 0 <= value <= 1:
                    raise ValueError(f"{name}: expected 0 to 1, got {value}")
            elif value is not None and not 0 <= value <= MAX_LIMIT:
                raise ValueError(f"{name}: expected 0 to {MAX_LIMIT} or none, got {value}")


MAX_LIMIT = 10**12
"""So that sums stay exact in Lua, whose numbers are doubles."""


@dataclass(frozen=True)
class Tier:
    """A service tier: how tenants share the engines, and what becomes of them when Redis is away."""

    name: str
    weight: float = 1.0
    """Share of the engines' work relative to other tiers' tenants."""
    priority: int = 0
    """As in vLLM: a smaller one is served earlier."""
    on_state_loss: Literal["refuse", "local_share"] = "local_share"
    """Without Redis: refuse with 503, or go on with this replica's share of each limit."""

    def __post_init__(self) -> None:
        if self.weight <= 0:
            raise ValueError(f"weight: expected a number above 0, got {self.weight}")


@dataclass(frozen=True)
class Tenant:
    """Somebody who is served and billed apart from others."""

    tenant_id: str
    name: str
    tier: str
    limits: Limits = field(default_factory=Limits)
    is_active: bool = True
    """False: its keys are refused as if they did not exist."""


@dataclass(frozen=True)
class Scopes:
    """What one key may reach; ``None`` is everything, where nothing else is said."""

    models: frozenset[str] | None = None
    endpoints: frozenset[str] | None = None
    """Paths as in docs/api.md, for example ``/v1/chat/completions``."""
    max_context_tokens: int | None = None
    """Longest prompt and answer together."""
    tiers: frozenset[str] | None = None
    """Values of ``service_tier`` that a request may ask for; ``None``: the tenant's own alone."""


@dataclass(frozen=True)
class Principal:
    """On whose behalf a request runs."""

    tenant: Tenant
    key_id: str | None
    """``None``: a key of the static list, or no key was asked for."""
    scopes: Scopes = field(default_factory=Scopes)


def check_scopes(
    principal: Principal,
    *,
    model: str | None = None,
    endpoint: str | None = None,
    context_tokens: int | None = None,
    tier: str | None = None,
) -> None:
    """Check what is given against the key's scopes.

    Raises:
        PermissionDenied: the key does not reach it; the message names what it reaches.
    """
    scopes = principal.scopes
    # else whoever has a key could choose the tier with the largest share
    tiers = frozenset({principal.tenant.tier}) if scopes.tiers is None else scopes.tiers
    for given, allowed, what, param in (
        (endpoint, scopes.endpoints, "endpoint", None),
        (model, scopes.models, "model", "model"),
        (tier, tiers, "service tier", "service_tier"),
    ):
        if given is not None and allowed is not None and given not in allowed:
            names = ", ".join(sorted(allowed)) or "none"
            raise PermissionDenied(
                f"This API key does not reach this {what}; allowed: {names}.", param=param
            )
    longest = scopes.max_context_tokens
    if context_tokens is not None and longest is not None and context_tokens > longest:
        raise PermissionDenied(
            f"This API key allows {longest} tokens of prompt and answer together; this request asks for "
            f"{context_tokens}."
        )


def check_endpoint(principal: Principal, path: str) -> None:
    """Raise :class:`PermissionDenied` unless the key reaches ``path``, or a path above it."""
    above = (each for each in principal.scopes.endpoints or () if path.startswith(f"{each}/"))
    check_scopes(principal, endpoint=next(above, path))
