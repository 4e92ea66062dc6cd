import asyncio
import json
import time
from datetime import UTC, datetime

import pytest

from sala_serve.errors import InvalidApiKey
from sala_serve.telemetry import Usage
from sala_serve.tenants.limits import Claim
from sala_serve.tenants.model import Limits, Scopes

NO_LIMITS = {
    "requests_per_min": None,
    "input_tokens_per_min": None,
    "output_tokens_per_min": None,
    "tokens_in_flight": None,
    "long_prefills": None,
    "tokens_per_day": None,
    "cached_token_rate": 0.1,
}


async def create(admin, path, expected=201, **body):
    answer = await admin.post(f"/admin/v1/{path}", json=body)
    assert answer.status_code == expected, answer.text
    return answer.json()


async def test_tenant_is_made_changed_and_deleted(admin):
    acme = await create(
        admin, "tenants", id="acme", name="Acme", tier="gold", limits={"requests_per_min": 5}
    )
    shown = {
        "object": "tenant",
        "id": "acme",
        "name": "Acme",
        "tier": "gold",
        "is_active": True,
        "limits": {**NO_LIMITS, "requests_per_min": 5},
    }
    assert acme == shown
    # a limit that is not named stays, one that is null goes
    changes = {"limits": {"tokens_per_day": 900, "cached_token_rate": 0.5}, "is_active": False}
    changed = (await admin.patch("/admin/v1/tenants/acme", json=changes)).json()
    shown |= {"is_active": False}
    shown["limits"] |= {"tokens_per_day": 900, "cached_token_rate": 0.5}
    assert changed == shown
    await admin.patch("/admin/v1/tenants/acme", json={"limits": {"requests_per_min": None}})
    shown["limits"]["requests_per_min"] = None
    assert (await admin.get("/admin/v1/tenants/acme")).json() == shown
    answer = await admin.delete("/admin/v1/tenants/acme")
    assert answer.json() == {"id": "acme", "deleted": True}
    assert (await admin.get("/admin/v1/tenants/acme")).status_code == 404


async def test_tenants_are_listed_in_pages(admin):
    for tenant_id in ("c", "a", "b"):
        await create(admin, "tenants", id=tenant_id, name=tenant_id)
    made = await create(admin, "tenants", name="without an id of its own")
    seen, after = [], ""
    while True:
        page = (await admin.get(f"/admin/v1/tenants?limit=2&after={after}")).json()
        assert len(page["data"]) <= 2
        seen += [tenant["id"] for tenant in page["data"]]
        if not page["has_more"]:
            break
        after = page["last_id"]
    assert seen == ["a", "b", "c", made["id"]]


async def test_key_works_with_its_scopes_until_it_is_revoked(admin, replica):
    await create(admin, "tenants", id="acme", name="Acme", limits={"requests_per_min": 5})
    scopes = {
        "models": ["sala"],
        "endpoints": ["/v1/chat/completions"],
        "max_context_tokens": 1000,
        "tiers": ["gold"],
    }
    ends_s = time.time() + 3600
    made = await create(
        admin, "tenants/acme/keys", name="a key", scopes=scopes, expires_unix_s=ends_s
    )
    principal = await replica.keys.authenticate(made["key"])
    assert principal.key_id == made["id"]
    assert principal.tenant.limits == Limits(requests_per_min=5)
    assert principal.scopes == Scopes(
        frozenset({"sala"}), frozenset({"/v1/chat/completions"}), 1000, frozenset({"gold"})
    )
    shown = (await admin.get(f"/admin/v1/keys/{made['id']}")).json()
    assert shown == {name: value for name, value in made.items() if name != "key"}
    assert (shown["status"], shown["scopes"], shown["expires_unix_s"]) == ("active", scopes, ends_s)
    assert (await admin.get("/admin/v1/tenants/acme/keys")).json()["data"] == [shown]

    revoked = (await admin.post(f"/admin/v1/keys/{made['id']}/revoke")).json()
    assert revoked["status"] == "revoked"
    assert revoked["revoked_unix_s"] == pytest.approx(time.time(), abs=60)


async def test_rotation_lets_both_secrets_work_unless_told_otherwise(admin, replica):
    await create(admin, "tenants", id="acme", name="Acme")
    first = await create(admin, "tenants/acme/keys", name="k")
    rotate = f"keys/{first['id']}/rotate"
    second = await create(admin, rotate, expected=200)
    assert second["id"] == first["id"]
    assert second["key"] != first["key"]
    for each in (first, second):
        assert (await replica.keys.authenticate(each["key"])).key_id == first["id"]
    newest, last = second["secrets"]
    assert newest["expires_unix_s"] is None
    assert last["expires_unix_s"] == pytest.approx(time.time() + 86400, abs=60)
    third = await create(admin, rotate, expected=200, keep_old_s=0)
    assert len(third["secrets"]) == 1


async def test_key_that_is_deleted_makes_room_and_is_gone(admin, replica, state):
    await create(admin, "tenants", id="acme", name="Acme")
    made = await create(admin, "tenants/acme/keys", name="k")
    assert (await admin.delete(f"/admin/v1/keys/{made['id']}")).json()["deleted"] is True
    assert (await admin.delete(f"/admin/v1/keys/{made['id']}")).status_code == 404
    assert (await admin.get(f"/admin/v1/keys/{made['id']}")).status_code == 404
    assert (await admin.get("/admin/v1/tenants/acme/keys")).json()["data"] == []
    assert await state.redis.scard("sala:tenant-keys:acme") == 0
    with pytest.raises(InvalidApiKey):
        await replica.keys.authenticate(made["key"])


async def test_usage_shows_what_is_held_now_and_was_used_by_day(admin, replica):
    await create(admin, "tenants", id="acme", name="Acme", limits={"tokens_in_flight": 1000})
    tenant = await replica.keys.store.tenant("acme")
    made = await create(admin, "tenants/acme/keys", name="k")
    who = await replica.keys.authenticate(made["key"])
    assert who.tenant == tenant
    async with replica.limiter.reserve(who, Claim(300, 0, 50, False), request_id="r") as one:
        await one.settle(Usage(300, 100, 20))
    async with replica.limiter.reserve(who, Claim(600, 0, 0, False), request_id="r"):
        usage = (await admin.get("/admin/v1/tenants/acme/usage?days=2")).json()
    assert usage["limits"]["tokens_in_flight"] == {"used": 600, "limit": 1000}
    assert usage["limits"]["requests_per_min"]["limit"] is None
    today, yesterday = usage["days"]
    assert today == {
        "date": datetime.now(UTC).date().isoformat(),
        "requests": 1,
        "prompt_tokens": 300,
        "cached_tokens": 100,
        "completion_tokens": 20,
    }
    assert yesterday["requests"] == 0
    assert yesterday["date"] < today["date"]


async def test_tenant_default_is_shown_and_not_changed(admin):
    assert (await admin.get("/admin/v1/tenants/default")).json()["limits"] == NO_LIMITS
    assert (await admin.get("/admin/v1/tenants/default/usage")).status_code == 200
    assert (await admin.patch("/admin/v1/tenants/default", json={"name": "x"})).status_code == 404
    await create(admin, "tenants", expected=409, id="default", name="x")
    await create(admin, "tenants/default/keys", expected=404, name="x")


async def test_tiers_are_listed(admin):
    tiers = (await admin.get("/admin/v1/tiers")).json()["data"]
    assert [(tier["name"], tier["weight"]) for tier in tiers] == [("default", 1), ("gold", 4)]


# method, path, body, status, param
REFUSED = [
    ("POST", "tenants", {"id": "Ac/me", "name": "x"}, 400, "id"),
    ("POST", "tenants", {"name": "x", "tier": "lead"}, 400, "tier"),
    ("POST", "tenants", {"name": "x", "teir": "gold"}, 400, "teir"),
    ("POST", "tenants", {"name": "a\nline"}, 400, "name"),
    ("POST", "tenants", {"name": "\ud800"}, 400, "name"),
    (
        "POST",
        "tenants",
        {"name": "x", "limits": {"tokens_per_day": -1}},
        400,
        "limits.tokens_per_day",
    ),
    (
        "POST",
        "tenants",
        {"name": "x", "limits": {"requests_per_min": "5"}},
        400,
        "limits.requests_per_min",
    ),
    ("POST", "tenants", {"id": "acme", "name": "again"}, 409, None),
    ("PATCH", "tenants/acme", {"limits": {"tokens": 5}}, 400, "limits.tokens"),
    (
        "PATCH",
        "tenants/acme",
        {"limits": {"cached_token_rate": None}},
        400,
        "limits.cached_token_rate",
    ),
    ("PATCH", "tenants/nobody", {"name": "x"}, 404, None),
    (
        "POST",
        "tenants/acme/keys",
        {"name": "k", "scopes": {"endpoints": ["chat"]}},
        400,
        "scopes.endpoints.0",
    ),
    ("POST", "tenants/acme/keys", {"name": "k", "expires_unix_s": 1}, 400, "expires_unix_s"),
    ("POST", "keys/nokey/rotate", {"keep_old_s": -1}, 400, "keep_old_s"),
    ("POST", "keys/nokey/revoke", None, 404, None),
    ("GET", "tenants?limit=0", None, 400, "limit"),
    ("GET", "tenants/nobody/usage", None, 404, None),
    ("GET", "nothing", None, 404, None),
    ("PUT", "tenants", {}, 405, None),
]


async def test_what_cannot_be_is_refused_in_openais_words(admin):
    await create(admin, "tenants", id="acme", name="Acme")
    for method, path, body, status, param in REFUSED:
        answer = await admin.request(
            method,
            f"/admin/v1/{path}",
            # ASCII with escapes: httpx cannot write half a character
            content=None if body is None else json.dumps(body),
            headers={"Content-Type": "application/json"},
        )
        assert answer.status_code == status, (path, body, answer.text)
        error = answer.json()["error"]
        assert (error["param"], error["type"]) == (param, "invalid_request_error")
    tenants = (await admin.get("/admin/v1/tenants")).json()["data"]
    assert [(each["id"], each["name"], each["limits"]) for each in tenants] == [
        ("acme", "Acme", NO_LIMITS)
    ]
    assert (await admin.get("/admin/v1/tenants/acme/keys")).json()["data"] == []


async def test_changes_of_limits_at_the_same_time_all_count(admin, replica):
    await create(admin, "tenants", id="acme", name="Acme")
    names = [name for name in NO_LIMITS if name != "cached_token_rate"]
    await asyncio.gather(
        *(
            admin.patch("/admin/v1/tenants/acme", json={"limits": {name: index}})
            for index, name in enumerate(names)
        )
    )
    limits = (await replica.keys.store.tenant("acme")).limits
    assert [getattr(limits, name) for name in names] == list(range(len(names)))
