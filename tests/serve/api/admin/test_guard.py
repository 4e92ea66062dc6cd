"""What surrounds every request of the admin port."""

import asyncio
import json
import logging
import time
from types import SimpleNamespace

import pytest
from pydantic import SecretStr
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from sala_serve.api.admin import guard
from sala_serve.errors import InvalidApiKey
from sala_serve.scheduling.work import Waiting
from sala_serve.state import State, StateSettings
from sala_serve.telemetry import Phase, RequestRecord
from sala_serve.telemetry.logs import JsonFormatter

AUDIT = "sala_serve.api.admin.audit"
METHODS = {"get", "post", "patch", "delete"}


@pytest.fixture
async def state():
    """One store is enough here."""
    state = State.create(StateSettings(), clock=time.monotonic)
    yield state
    await state.close()


def operations(document):
    return [
        (method, path.replace("{", "").replace("}", ""))
        for path, item in document["paths"].items()
        for method in item
        if method in METHODS
    ]


WRONG = [None, "", "Bearer", "Bearer {}x", "Bearer x{}", "Basic {}", "{}"]


async def test_nothing_is_reached_without_the_token(admin, token):
    found = operations((await admin.get("/openapi.json")).json())
    assert len(found) >= 15
    others = [
        ("get", "/openapi.json"),
        ("get", "/nothing"),
        ("get", "/"),
        ("put", "/admin/v1/tiers"),
    ]
    del admin.headers["Authorization"]
    for text in WRONG:
        headers = {} if text is None else {"Authorization": text.format(token)}
        for method, path in (*found, *others):
            answer = await admin.request(method, path, headers=headers, content=b"{}")
            assert answer.status_code == 401, (text, method, path)
            assert answer.json()["error"]["code"] == "invalid_api_key"
            assert answer.headers["WWW-Authenticate"] == "Bearer"


async def test_page_checks_its_visitors_itself_and_opens_nothing_else(replica, client_of):
    async def show(_request):
        return PlainTextResponse("a page", headers={"Cache-Control": "max-age=300"})

    async with client_of(replica, [Route("/", show)], Authorization="none") as client:
        answer = await client.get("/")
        assert (answer.text, answer.headers["Cache-Control"]) == ("a page", "max-age=300")
        for path in ("/admin/v1/tenants", "/openapi.json", "/x"):
            assert (await client.get(path)).status_code == 401


async def test_answers_are_not_kept_and_have_the_requests_id(admin):
    answer = await admin.get("/admin/v1/tiers", headers={"X-Request-Id": "mine-1"})
    assert answer.headers["X-Request-Id"] == "mine-1"
    assert answer.headers["Cache-Control"] == "no-store"
    answer = await admin.get("/admin/v1/nothing", headers={"X-Request-Id": "not harmless"})
    assert len(answer.headers["X-Request-Id"]) == 32


async def test_body_is_bounded_in_bytes(admin):
    body = json.dumps({"name": "x" * guard.MAX_BODY_BYTES}).encode()

    async def pieces():
        for start in range(0, len(body), 1000):
            yield body[start : start + 1000]

    answer = await admin.post("/admin/v1/tenants", content=pieces())
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "body_too_large"


async def test_body_is_bounded_in_time(admin, monkeypatch):
    monkeypatch.setattr(guard, "BODY_TIMEOUT_S", 0.05)
    has_answer = asyncio.Event()

    async def pieces():
        yield b'{"name": '
        await has_answer.wait()

    answer = await admin.post("/admin/v1/tenants", content=pieces())
    has_answer.set()
    assert answer.json()["error"]["code"] == "upload_timeout"


async def test_bug_is_told_by_its_request_id_alone(replica, client_of, caplog):
    class Broken:
        def snapshot(self):
            raise RuntimeError("sk-sala-secret")

        def cancel(self, request_id):
            raise NotImplementedError

    replica.running = Broken()
    async with client_of(replica, **{"X-Request-Id": "bug-1"}) as client:
        answer = await client.get("/admin/v1/requests")
    assert answer.status_code == 500
    assert answer.json()["error"]["message"] == "The gateway failed; its log has request bug-1."
    assert "bug-1" in caplog.text


async def test_running_requests_are_shown_with_what_they_wait_for_and_cut(admin, replica):
    waiting = RequestRecord("r1", "/v1/chat/completions", started_at_s=time.monotonic() - 5)
    waiting.tenant_id, waiting.key_id, waiting.num_prompt_tokens = "acme", "k1", 1_048_576
    waiting.enter(Phase.QUEUE)
    waiting.note = Waiting(
        place=3,
        num_ahead=2,
        tokens_ahead=1_200_000,
        expected_start_s=41,
        expected_first_token_s=60,
    )
    decoding = RequestRecord("r2", "/v1/completions", started_at_s=time.monotonic())
    decoding.note = waiting.note
    decoding.enter(Phase.DECODE)
    replica.running.running = [SimpleNamespace(record=each) for each in (waiting, None, decoding)]
    first, second = (await admin.get("/admin/v1/requests")).json()["data"]
    assert (first["request_id"], first["tenant_id"], first["phase"]) == ("r1", "acme", "queue")
    assert 5 <= first["age_s"] < 60
    assert first["progress"] == {
        "place": 3,
        "num_ahead": 2,
        "tokens_ahead": 1_200_000,
        "expected_start_s": 41,
        "expected_first_token_s": 60,
    }
    assert (second["phase"], second["progress"]) == ("decode", None)

    answer = await admin.post("/admin/v1/requests/r1/cancel")
    assert answer.json() == {"request_id": "r1", "cancelled": True}
    assert (await admin.post("/admin/v1/requests/r1/cancel")).status_code == 404
    assert [each.record for each in replica.running.running] == [None, decoding]


async def test_scheduler_is_shown(admin):
    shown = (await admin.get("/admin/v1/scheduler")).json()
    assert shown["num_queued"] == 0
    assert shown["expected_drain_s"] is None
    assert shown["engines"] == []


def audit_lines(caplog):
    return [
        json.loads(JsonFormatter().format(each)) for each in caplog.records if each.name == AUDIT
    ]


async def test_every_change_leaves_a_line_whether_it_worked_or_not(admin, token, caplog):
    # lines of audit are written whatever the level of others
    caplog.set_level(logging.ERROR, logger="sala_serve")
    caplog.handler.setLevel(logging.NOTSET)
    await admin.post("/admin/v1/tenants", json={"id": "acme", "name": "A secret name"})
    await admin.post("/admin/v1/tenants", json={"id": "acme", "name": "A secret name"})
    await admin.patch("/admin/v1/tenants/acme", json={"is_active": True})
    made = (await admin.post("/admin/v1/tenants/acme/keys", json={"name": "k"})).json()
    key_id = made["id"]
    rotated = (await admin.post(f"/admin/v1/keys/{key_id}/rotate")).json()
    await admin.post(f"/admin/v1/keys/{key_id}/revoke")
    await admin.delete(f"/admin/v1/keys/{key_id}")
    await admin.post("/admin/v1/requests/gone/cancel")
    await admin.delete("/admin/v1/tenants/acme")
    await admin.delete("/admin/v1/tenants/a%20b%0Aoutcome=done", headers={"X-Request-Id": "last"})
    await admin.get("/admin/v1/tenants")
    lines = audit_lines(caplog)
    assert [(line["action"], line["target"], line["outcome"]) for line in lines] == [
        ("tenant.create", "acme", "done"),
        ("tenant.create", "acme", "conflict"),
        ("tenant.change", "acme", "done"),
        ("key.create", f"acme:{key_id}", "done"),
        ("key.rotate", key_id, "done"),
        ("key.revoke", key_id, "done"),
        ("key.delete", key_id, "done"),
        ("request.cancel", "gone", "not_found"),
        ("tenant.delete", "acme", "done"),
        ("tenant.delete", "a?b?outcome?done", "not_found"),
    ]
    assert {line["message"] for line in lines} == {"audit"}
    assert {(line["via"], line["client"]) for line in lines} == {("api", "127.0.0.1")}
    assert lines[-1]["request_id"] == "last"
    for secret in ("A secret name", made["key"], rotated["key"], token):
        assert secret not in caplog.text


async def test_wrong_token_leaves_a_line(admin, caplog):
    await admin.get("/admin/v1/tenants", headers={"Authorization": "Bearer guessed"})
    (line,) = audit_lines(caplog)
    assert (line["action"], line["outcome"]) == ("token", "invalid_api_key")
    assert "guessed" not in caplog.text


async def test_redis_that_is_away_is_said_so(redis_server, make_replica, client_of, caplog):
    settings = StateSettings(url=SecretStr(redis_server.url), command_timeout_s=0.25)
    state = State.create(settings, clock=time.monotonic)
    async with client_of(make_replica(state)) as admin:
        await admin.post("/admin/v1/tenants", json={"id": "acme", "name": "Acme"})
        redis_server.stop()
        for method, path in (("GET", "tenants"), ("DELETE", "tenants/acme")):
            answer = await admin.request(method, f"/admin/v1/{path}")
            assert answer.status_code == 503
            assert answer.json()["error"]["code"] == "state_unavailable"
        assert audit_lines(caplog)[-1]["outcome"] == "state_unavailable"
        redis_server.start()
        await state.check()
        assert (await admin.get("/admin/v1/tenants")).json()["data"] == []
    await state.close()


async def test_revoked_key_works_on_no_replica_within_two_seconds(
    redis_server, make_replica, client_of
):
    async with asyncio.timeout(60):
        states = [
            State.create(
                StateSettings(url=SecretStr(redis_server.url), command_timeout_s=20),
                clock=time.monotonic,
            )
            for _ in range(2)
        ]
        one, other = (make_replica(state) for state in states)
        async with client_of(one) as admin:
            await admin.post("/admin/v1/tenants", json={"id": "acme", "name": "Acme"})
            made = (await admin.post("/admin/v1/tenants/acme/keys", json={"name": "k"})).json()
            for replica in (one, other):
                # looked up just now, so remembered as long as can be
                await replica.keys.authenticate(made["key"])
            await admin.post(f"/admin/v1/keys/{made['id']}/revoke")
            revoked_at_s = time.monotonic()
        last_accepted_at_s = revoked_at_s
        for replica in (other, one):
            while True:
                began_at_s = time.monotonic()
                try:
                    await replica.keys.authenticate(made["key"])
                except InvalidApiKey:
                    break
                last_accepted_at_s = began_at_s
                await asyncio.sleep(0.02)
        # when it was asked, not when it was answered: a busy machine makes the answer late, not wrong
        assert last_accepted_at_s - revoked_at_s < 2
        for state in states:
            await state.close()
