"""The whole page of a busy gateway, in a browser; ``SALA_SCREENSHOT=docs/admin.png`` keeps its picture."""

from __future__ import annotations

import asyncio
import os
import shutil
from contextlib import AsyncExitStack

import httpx

from sala_serve.api.admin import build_admin_app
from sala_serve.app import build_app
from sala_serve.config import Settings
from sala_serve.engine.fake import Behaviour, FakeEngine
from sala_serve.gateway import Gateway
from sala_serve.tenants.model import Limits, Scopes

TOKEN = "an-admin-token-of-24-chars"
CHAT = "/v1/chat/completions"
# the picture shows a million tokens, well on their way; to see that all of it is there, fewer do
NUM_LONG, LONG_S, SHOWN_FRAC = (
    (1_048_576, 30, 0.3) if "SALA_SCREENSHOT" in os.environ else (65_536, 120, 0.02)
)
TENANTS = {
    "acme": ("gold", Limits(tokens_in_flight=3_000_000, requests_per_min=600, long_prefills=4)),
    "initech": ("default", Limits(input_tokens_per_min=4_000_000, tokens_per_day=20_000_000)),
    "umbrella": ("batch", Limits(tokens_in_flight=8_000_000)),
}
QUESTIONS = [
    ("acme", "report-2026", NUM_LONG),
    ("umbrella", "archive-17", NUM_LONG // 2),
    ("umbrella", "archive-18", NUM_LONG * 3 // 4),
    ("umbrella", "archive-19", NUM_LONG * 3 // 4),
    ("initech", "contract-4", NUM_LONG // 2),
    ("acme", "chat-8812", 900),
]


def engine():
    return FakeEngine(
        Behaviour(
            model="minicpm-sala",
            max_model_len=2_000_000,
            num_prompt_tokens=None,
            num_cached_tokens=None,
            prefill_tokens_per_s=NUM_LONG / LONG_S,
            itl_s=0.5,
            num_tokens=500,
            kv_capacity_tokens=NUM_LONG * 4,
        )
    )


async def test_busy_gateway_in_a_browser(browser, served, tmp_path):
    async with AsyncExitStack() as stack:
        engines = {name: engine() for name in ("gpu-a", "gpu-b")}
        settings = Settings(
            engines=[
                {
                    "engine_id": name,
                    "url": await stack.enter_async_context(served(each.app)),
                    "probe_interval_s": 0.2,
                }
                for name, each in engines.items()
            ],
            tenants={
                "tiers": {
                    "gold": {"weight": 4, "priority": -1},
                    "default": {},
                    "batch": {"weight": 0.5},
                }
            },
            admin={"token": TOKEN},
        )
        gateway = Gateway.create(settings)
        url = await stack.enter_async_context(served(build_app(gateway)))
        admin_url = await stack.enter_async_context(served(build_admin_app(gateway)))
        async with asyncio.timeout(20):
            while len(gateway.pool.ready()) < 2:  # noqa: ASYNC110 - they are looked at from elsewhere
                await asyncio.sleep(0.02)

        headers = {}
        for name, (tier, limits) in TENANTS.items():
            store = gateway.keys.store
            await store.create_tenant(name=name, tier=tier, limits=limits, tenant_id=name)
            key, token = await store.create_key(name, name="ci", scopes=Scopes())
            headers[name] = {"Authorization": f"Bearer {token}"}
        await store.revoke_key(key.key_id)
        key, token = await store.create_key(name, name="ci-2", scopes=Scopes())
        headers[name] = {"Authorization": f"Bearer {token}"}

        client = await stack.enter_async_context(httpx.AsyncClient(base_url=url, timeout=120))

        async def ask(tenant, request_id, num_words):
            body = {
                "model": "minicpm-sala",
                "messages": [{"role": "user", "content": "word " * num_words}],
                "stream": True,
            }
            ids = {"X-Request-Id": request_id}
            await client.post(CHAT, json=body, headers=headers[tenant] | ids)

        await log_in(browser, admin_url)
        async with asyncio.TaskGroup() as group:
            try:
                for number, question in enumerate(QUESTIONS, 1):
                    group.create_task(ask(*question))
                    async with asyncio.timeout(60):
                        while num_admitted(gateway) < number:  # noqa: ASYNC110 - so that the first two run
                            await asyncio.sleep(0.02)
                bar = "document.querySelector('#running [data-id=report-2026] progress')"
                await browser.until(f"{bar} && {bar}.value / {bar}.max > {SHOWN_FRAC}")
                await browser.until("document.querySelectorAll('#queue tbody .id').length >= 2")
                for each in engines.values():  # however slow the browser is, this is what it shows
                    each.core.freeze()
                picture = tmp_path / "admin.png"
                await browser.screenshot(picture, width=1500, height=1080)
                shown = {
                    section: await browser.text(f"#{section}")
                    for section in ("engines", "running", "queue", "tenants")
                }
            finally:
                for each in engines.values():
                    each.core.thaw()
                gateway.running.cut_all()
    assert all(name in shown["engines"] for name in engines)
    assert all(name in shown["tenants"] for name in TENANTS)
    assert "tokens in flight" in shown["tenants"]
    assert f" of {NUM_LONG + 1:,}" in shown["running"]  # the fake template adds one
    assert "archive" in shown["queue"]
    assert browser.problems == []
    assert picture.stat().st_size > 20_000
    if kept := os.environ.get("SALA_SCREENSHOT"):
        shutil.copy(picture, kept)


def num_admitted(gateway):
    snapshot = gateway.scheduler.snapshot()
    return snapshot.num_queued + sum(tenant.num_running for tenant in snapshot.tenants)


async def log_in(browser, url):
    await browser.goto(url)
    await browser.until("document.activeElement?.name === 'token'")
    await browser.type(TOKEN)
    await browser.click("button")
    await browser.until("document.querySelector('#running')")
