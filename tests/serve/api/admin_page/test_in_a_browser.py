"""The admin page in a real browser, which enforces its content security policy and its cookies."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from starlette.applications import Starlette

from sala_serve.api.admin_page import AdminPage
from sala_serve.api.admin_page.view import EngineRow, KeyRow, Overview, RequestRow, TenantRow

TOKEN = "an-admin-token-of-24-chars"


class Recorded:
    """What the page may do, written down; a revoked key is shown as such."""

    def __init__(self):
        self.done = []
        self.is_broken = False
        self.view = Overview(
            engines=(EngineRow("gpu-a", "ready"),),
            requests=(
                RequestRow(
                    *("long-1", "acme", "/v1/completions", "prefill", 12.0),
                    num_prompt_tokens=1_000_000,
                    done_tokens=250_000,
                ),
            ),
            tenants=(
                TenantRow("acme", "acme", "gold", True, keys=(KeyRow("k1", "active", True),)),
            ),
        )

    async def overview(self):
        if self.is_broken:
            raise RuntimeError
        return self.view

    async def revoke_key(self, key_id):
        self.done.append(("revoke", key_id))
        tenant = replace(self.view.tenants[0], keys=(KeyRow(key_id, "revoked", False),))
        self.view = replace(self.view, tenants=(tenant,))
        return True

    async def cancel_request(self, request_id):
        self.done.append(("cancel", request_id))
        self.view = replace(self.view, requests=())
        return True


@pytest.fixture
def actions():
    return Recorded()


@pytest.fixture
async def url(actions, served):
    async with served(Starlette(routes=AdminPage(actions, token=TOKEN).routes())) as url:
        yield url


async def log_in(browser, url):
    await browser.goto(url)
    await browser.until("location.pathname === '/login' && document.activeElement.name === 'token'")
    await browser.type(TOKEN)
    await browser.click("button")
    await browser.until("document.querySelector('#running')")


async def test_log_in_watch_revoke_cancel_log_out(browser, url, actions):
    await log_in(browser, url)
    assert await browser.js("document.cookie") == ""  # HttpOnly
    assert "acme" in await browser.text("#tenants")
    bar = "document.querySelector('#running progress')"
    assert await browser.js(f"{bar}.value / {bar}.max") == 0.25
    assert await browser.js(f"getComputedStyle({bar}).appearance") == "none"  # its style has come

    # the page follows without being loaded again
    await browser.js("window.isTheSamePage = true")
    (row,) = actions.view.requests
    actions.view = replace(actions.view, requests=(replace(row, done_tokens=750_000),))
    await browser.until(f"{bar}.value / {bar}.max === 0.75")
    assert await browser.js("window.isTheSamePage")

    await browser.click("#tenants [data-id=k1] button")
    await browser.until("document.querySelector('.message')")
    assert await browser.text(".message") == "The key is revoked."
    assert "revoked" in await browser.text("#tenants [data-id=k1]")
    assert not await browser.js("document.querySelector('#tenants [data-id=k1] button')")

    await browser.click("#running [data-id=long-1] button")
    await browser.until("document.querySelector('#running .none')")
    assert actions.done == [("revoke", "k1"), ("cancel", "long-1")]

    await browser.click("header button")
    await browser.until("location.pathname === '/login'")
    await browser.goto(url)
    await browser.until("location.pathname === '/login'")
    assert browser.problems == []


async def test_wrong_token_is_said(browser, url):
    await browser.goto(url)
    await browser.until("document.activeElement.name === 'token'")
    await browser.type("not-the-token")
    await browser.click("button")
    await browser.until("document.querySelector('[role=alert]')")
    assert await browser.text("[role=alert]") == "This is not the admin token."


async def test_page_says_when_it_is_stale(browser, url, actions):
    await log_in(browser, url)
    assert await browser.js("document.querySelector('#stale').hidden")
    actions.is_broken = True
    await browser.until("!document.querySelector('#stale').hidden")
    assert "acme" in await browser.text("#tenants")
    actions.is_broken = False
    await browser.until("document.querySelector('#stale').hidden")


async def test_without_scripts_the_page_loads_itself_again(browser, url, actions):
    await log_in(browser, url)
    await browser.call("Emulation.setScriptExecutionDisabled", value=True)
    await browser.goto(url)
    await browser.until("document.querySelector('meta[http-equiv=refresh]')?.content === '5'")
    actions.view = replace(actions.view, requests=())
    await browser.until("document.querySelector('#running .none')")


async def test_script_that_gets_into_a_name_does_not_run(browser, url, actions):
    tenant = replace(actions.view.tenants[0], name="<img src=x onerror=document.title='hacked'>")
    actions.view = replace(actions.view, tenants=(tenant,))
    await log_in(browser, url)
    assert "onerror" in await browser.text("#tenants")
    assert await browser.js("document.title") == "sala-serve"
    # and were the page to write it as HTML, the policy would still refuse it
    await browser.js("document.querySelector('main').innerHTML = '<img src=x onerror=alert(1)>'")
    await browser.until("true")
    async with asyncio.timeout(20):
        while not browser.problems:  # noqa: ASYNC110 - filled by the listener
            await asyncio.sleep(0.02)
    assert any("Content Security Policy" in problem for problem in browser.problems)
