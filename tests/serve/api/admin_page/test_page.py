"""The admin page by itself: who may see it, what its forms need, what it shows."""

from __future__ import annotations

import re
from dataclasses import replace

import httpx
import pytest
from starlette.applications import Starlette

from sala_serve.api.admin_page import AdminPage
from sala_serve.api.admin_page.session import COOKIE, SESSION_S, Sessions
from sala_serve.api.admin_page.view import (
    Bar,
    EngineRow,
    KeyRow,
    Overview,
    RequestRow,
    TenantRow,
)
from sala_serve.errors import StateUnavailable

TOKEN = "an-admin-token-of-24-chars"
OVERVIEW = Overview(
    engines=(
        EngineRow("gpu-a", "ready", 1, 2, 786_432, Bar("memory", 3_000_000, 4_000_000), 21_000.0),
        EngineRow("gpu-b", "the connection is refused"),
    ),
    requests=(
        RequestRow(
            *("long-1", "acme", "/v1/chat/completions", "prefill", 12.0),
            tier="gold",
            engine_id="gpu-a",
            num_prompt_tokens=1_048_576,
            done_tokens=262_144,
            cached_tokens=65_536,
            expected_s=38.0,
        ),
        RequestRow(
            *("wait-2", "umbrella", "/v1/completions", "queue", 4.0),
            num_prompt_tokens=500_000,
            place=2,
            ahead_tokens=800_000,
            expected_s=61.0,
        ),
        RequestRow("wait-1", "acme", "/v1/completions", "queue", 5.0, place=1),
    ),
    tenants=(
        TenantRow(
            *("acme", "Acme & <b>Sons</b>", "gold", True, 1, 500_000, 1),
            limits=(
                Bar("tokens in flight", 1_500_000, 2_000_000),
                Bar("requests a minute", 60, 60),
            ),
            keys=(KeyRow("k1", "active", True), KeyRow("k0", "revoked", False)),
        ),
        TenantRow("umbrella", "umbrella", "free", False),
    ),
    jobs=(("response", "queued", 3),),
    queued_tokens=1_300_000,
    expected_drain_s=3 * 60.0,
    service_gap_tokens=120_000,
    service_gap_bound_tokens=262_144,
)


class Clock:
    now_s = 1_800_000_000.0

    def __call__(self):
        return self.now_s


class Recorded:
    """What the page may do, written down."""

    def __init__(self):
        self.view = OVERVIEW
        self.done = []
        self.is_there = True
        self.state_is_up = True

    async def overview(self):
        return self.view

    async def revoke_key(self, key_id):
        if not self.state_is_up:
            raise StateUnavailable("away")
        self.done.append(("revoke", key_id))
        return self.is_there

    async def cancel_request(self, request_id):
        self.done.append(("cancel", request_id))
        return self.is_there


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def actions():
    return Recorded()


@pytest.fixture
async def http(actions, clock):
    app = Starlette(routes=AdminPage(actions, token=TOKEN, unix_clock=clock).routes())
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://admin") as http:
        yield http


@pytest.fixture
async def logged_in(http):
    response = await http.post("/login", data={"token": TOKEN})
    assert (response.status_code, response.headers["location"]) == (303, "/")
    return http


async def csrf_token(http):
    return re.search(r'name="csrf_token" value="(\w+)"', (await http.get("/")).text)[1]


async def test_without_a_session_everything_leads_to_the_login(http, actions):
    assert (await http.get("/")).headers["location"] == "/login"
    for path in ("/actions/revoke-key", "/actions/cancel-request", "/logout"):
        response = await http.post(path, data={"key_id": "k1", "request_id": "long-1"})
        assert (response.status_code, response.headers["location"]) == (303, "/login")
    assert actions.done == []
    assert "acme" not in (await http.get("/login")).text


@pytest.mark.parametrize("token", ["", "wrong", TOKEN[:-1], TOKEN + "x", "é"])
async def test_wrong_token_gets_no_cookie(http, token):
    response = await http.post("/login", data={"token": token})
    assert response.status_code == 403
    assert "set-cookie" not in response.headers
    assert token == "" or token not in response.text


@pytest.mark.parametrize("content", [b"\xff=\xff", b"token", b"token=" + b"x" * 20_000])
async def test_what_is_no_small_form_is_refused(http, content):
    assert (await http.post("/login", content=content)).status_code == 403


async def test_cookie_is_out_of_reach_of_scripts_and_other_sites(http):
    response = await http.post("/login", data={"token": TOKEN})
    cookie = response.headers["set-cookie"]
    assert cookie.startswith(f"{COOKIE}=")
    assert "HttpOnly" in cookie
    assert "SameSite=strict" in cookie
    assert "Secure" not in cookie
    assert TOKEN not in cookie
    response = await http.post("https://admin/login", data={"token": TOKEN})
    assert "Secure" in response.headers["set-cookie"]


async def test_session_ends_after_its_time(logged_in, clock):
    clock.now_s += SESSION_S - 1
    assert (await logged_in.get("/")).status_code == 200
    clock.now_s += 2
    assert (await logged_in.get("/")).status_code == 303


def test_cookie_that_was_changed_or_made_for_another_token_is_refused(clock):
    sessions = Sessions(TOKEN, unix_clock=clock)
    session = sessions.log_in(TOKEN)
    assert sessions.of(session.cookie) == session
    expiry, nonce, signature = session.cookie.split(".")
    later = f"{int(expiry) + 1}.{nonce}.{signature}"
    for cookie in (None, "", ".", "x", later, f"{expiry}.{nonce}.", f"{session.cookie}0", "é.é.é"):
        assert sessions.of(cookie) is None
    assert Sessions(TOKEN + "2", unix_clock=clock).of(session.cookie) is None


async def test_log_out_takes_the_cookie_away(logged_in):
    response = await logged_in.post("/logout", data={"csrf_token": await csrf_token(logged_in)})
    assert response.headers["location"] == "/login"
    assert (await logged_in.get("/")).status_code == 303


async def test_an_action_needs_the_token_of_its_own_session(logged_in, http, actions):
    other = Sessions(TOKEN, unix_clock=Clock()).log_in(TOKEN).csrf_token
    for form in ({}, {"csrf_token": ""}, {"csrf_token": "x"}, {"csrf_token": other}):
        response = await logged_in.post("/actions/revoke-key", data={**form, "key_id": "k1"})
        assert response.status_code == 403
    assert (await logged_in.get("/actions/revoke-key?key_id=k1")).status_code == 405
    assert actions.done == []


@pytest.mark.parametrize(
    ("path", "form", "done", "message"),
    [
        ("revoke-key", {"key_id": "k1"}, ("revoke", "k1"), "The key is revoked."),
        (
            "cancel-request",
            {"request_id": "long-1"},
            ("cancel", "long-1"),
            "The request is cancelled.",
        ),
    ],
)
async def test_action_is_done_and_said(logged_in, actions, path, form, done, message):
    form["csrf_token"] = await csrf_token(logged_in)
    response = await logged_in.post(f"/actions/{path}", data=form, follow_redirects=True)
    assert actions.done == [done]
    assert message in response.text
    actions.is_there = False
    response = await logged_in.post(f"/actions/{path}", data=form, follow_redirects=True)
    assert "It is not there any more." in response.text


async def test_state_that_is_away_is_said_and_the_rest_is_shown(logged_in, actions):
    actions.state_is_up = False
    actions.view = replace(OVERVIEW, tenants=None)
    form = {"csrf_token": await csrf_token(logged_in), "key_id": "k1"}
    response = await logged_in.post("/actions/revoke-key", data=form, follow_redirects=True)
    assert "nothing was done" in response.text
    assert "The shared state does not answer." in response.text
    assert "gpu-a" in response.text


async def test_message_cannot_be_put_there_by_a_link(logged_in):
    text = (await logged_in.get("/?done=<script>alert(1)</script>")).text
    assert "alert" not in text
    assert 'class="message"' not in text


async def test_names_are_shown_as_text(logged_in):
    text = (await logged_in.get("/")).text
    assert "Acme &amp; &lt;b&gt;Sons&lt;/b&gt;" in text
    assert "<b>Sons" not in text


async def test_page_says_that_this_gateway_drains(logged_in, actions):
    assert "draining" not in (await logged_in.get("/")).text
    actions.view = replace(OVERVIEW, is_draining=True)
    assert "draining" in (await logged_in.get("/")).text


async def test_empty_gateway_has_a_page_too(logged_in, actions):
    actions.view = Overview()
    text = (await logged_in.get("/")).text
    assert text.count('class="none"') == 4


@pytest.mark.parametrize("path", ["/", "/login", "/admin.css", "/admin.js"])
async def test_browser_is_told_to_load_and_keep_nothing_else(logged_in, path):
    headers = (await logged_in.get(path)).headers
    policy = headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy
    assert "http" not in policy
    assert "frame-ancestors 'none'" in policy
    assert headers["x-content-type-options"] == "nosniff"
    if path in ("/", "/login"):
        assert headers["cache-control"] == "no-store"


def test_waiting_requests_stand_in_their_order_and_running_ones_by_age():
    assert [row.request_id for row in OVERVIEW.queued] == ["wait-1", "wait-2"]
    assert [row.request_id for row in OVERVIEW.running] == ["long-1"]
