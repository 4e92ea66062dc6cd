"""On whose behalf a job runs, as it is stored with the job."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from sala_serve.tenants.model import Limits, Principal, Scopes, Tenant

if TYPE_CHECKING:
    from collections.abc import Mapping

_SETS = ("models", "endpoints", "tiers")


def dump_principal(principal: Principal) -> dict[str, Any]:
    """Return ``principal`` as JSON; it holds no secret."""
    document = asdict(principal)
    scopes = document["scopes"]
    for name in _SETS:
        scopes[name] = None if scopes[name] is None else sorted(scopes[name])
    return document


def load_principal(document: Mapping[str, Any]) -> Principal:
    """Return what :func:`dump_principal` was given."""
    scopes = dict(document["scopes"])
    for name in _SETS:
        scopes[name] = None if scopes[name] is None else frozenset(scopes[name])
    tenant = dict(document["tenant"])
    limits = Limits(**tenant.pop("limits"))
    return Principal(Tenant(**tenant, limits=limits), document["key_id"], Scopes(**scopes))
