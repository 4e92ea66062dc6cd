"""docs/tenants.md agrees with the code."""

import time
from dataclasses import fields
from pathlib import Path

import httpx

from sala_serve.api.admin.app import admin_app
from sala_serve.state import State, StateSettings
from sala_serve.tenants.model import Limits
from sala_serve.tenants.scripts import USAGE_DAYS
from sala_serve.tenants.settings import AdminSettings, LimitsSettings, TenantsSettings, TierSection
from sala_serve.tenants.store import MAX_KEYS

PAGE = (Path(__file__).parents[4] / "docs" / "tenants.md").read_text(encoding="utf-8")


def table(heading):
    section = PAGE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip().replace("`", "") for cell in line.split("|")[1:-1]] for line in lines[2:]]


async def test_operations_are_those_of_the_document(make_replica, headers):
    state = State.create(StateSettings(), clock=time.monotonic)
    transport = httpx.ASGITransport(admin_app(make_replica(state), ()))
    async with httpx.AsyncClient(transport=transport, base_url="http://admin") as client:
        document = (await client.get("/openapi.json", headers=headers)).json()
    await state.close()
    served = {
        f"{method.upper()} {path}" for path, item in document["paths"].items() for method in item
    }
    rows = table("The admin API")
    assert {row[0] for row in rows} == served
    assert len(rows) == len(served)


def test_limits_are_those_of_the_code():
    names = [field.name for field in fields(Limits) if field.name != "cached_token_rate"]
    assert [row[0] for row in table("Limits")] == names
    assert f"`cached_token_rate` ({Limits().cached_token_rate})" in PAGE


def test_numbers_are_those_of_the_settings():
    tenants, limits, admin, state = (
        TenantsSettings(),
        LimitsSettings(),
        AdminSettings(),
        StateSettings(),
    )
    assert f"`tenants.key_cache_s` ({tenants.key_cache_s:.0f} s; 1.5 at most)" in PAGE
    assert f"`tenants.stale_keys_s` ({tenants.stale_keys_s / 60:.0f} min)" in PAGE
    assert f"`limits.lease_s` ({limits.lease_s:.0f} s)" in PAGE
    assert f"`state.command_timeout_s` ({state.command_timeout_s:.0f} s)" in PAGE
    assert f"({admin.host}:{admin.port})" in PAGE
    assert f"a tenant may have {MAX_KEYS}" in PAGE
    assert f"stays {USAGE_DAYS} days" in PAGE
    assert (limits.local_share, TierSection().on_state_loss) == (0.5, "local_share")
