"""The page and the API on one port, of a whole gateway."""

import json
import re

import httpx
import pytest

from sala_serve.api.admin import build_admin_app
from sala_serve.errors import InvalidApiKey
from sala_serve.telemetry.logs import JsonFormatter

AUDIT = "sala_serve.api.admin.audit"


@pytest.fixture
async def browser(start_stack, token):
    """A client without the API's header, and the gateway."""
    async with start_stack(token=token, key_cache_s=0) as stack:
        transport = httpx.ASGITransport(build_admin_app(stack.gateway))
        async with httpx.AsyncClient(transport=transport, base_url="http://admin") as client:
            yield client, stack.gateway


def audit_lines(caplog):
    lines = [
        json.loads(JsonFormatter().format(each)) for each in caplog.records if each.name == AUDIT
    ]
    return [(line["action"], line["target"], line["outcome"], line["via"]) for line in lines]


async def test_page_revokes_what_the_api_made_and_leaves_a_line(browser, token, headers, caplog):
    client, gateway = browser
    await client.post("/admin/v1/tenants", json={"id": "acme", "name": "Acme"}, headers=headers)
    made = (
        await client.post("/admin/v1/tenants/acme/keys", json={"name": "k"}, headers=headers)
    ).json()
    assert (await gateway.keys.authenticate(made["key"])).tenant.tenant_id == "acme"

    caplog.clear()
    assert (await client.post("/login", data={"token": f"{token}x"})).status_code == 403
    assert (await client.post("/login", data={"token": token})).status_code == 303
    page = (await client.get("/")).text
    assert made["id"] in page
    assert made["key"] not in page
    csrf_token = re.search(r'name="csrf_token" value="([0-9a-f]+)"', page)[1]
    form = {"csrf_token": csrf_token, "key_id": made["id"]}
    await client.post("/actions/revoke-key", data=form)
    with pytest.raises(InvalidApiKey):
        await gateway.keys.authenticate(made["key"])
    await client.post("/actions/revoke-key", data={**form, "key_id": "nokey"})
    await client.post("/actions/cancel-request", data={**form, "request_id": "gone"})
    await client.post("/actions/revoke-key", data={**form, "csrf_token": "forged"})
    assert audit_lines(caplog) == [
        ("token", "/login", "invalid_api_key", "page"),
        ("key.revoke", made["id"], "done", "page"),
        ("key.revoke", "nokey", "not_found", "page"),
        ("request.cancel", "gone", "not_found", "page"),
        ("token", "/actions/revoke-key", "invalid_api_key", "page"),
    ]


async def test_cookie_of_the_page_does_not_open_the_api(browser, token, headers):
    client, _ = browser
    await client.post("/login", data={"token": token})
    assert (await client.get("/")).status_code == 200
    assert (await client.get("/admin/v1/tenants")).status_code == 401
    assert (await client.get("/admin/v1/tenants", headers=headers)).status_code == 200
