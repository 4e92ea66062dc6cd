"""One target beside the engine itself: what it adds, how much it can do, what it holds."""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import time
from functools import partial
from typing import TYPE_CHECKING, Any

from machine import ROOT, Usage, usage
from overhead.client import Ask, Client, closed_loop, open_loop
from overhead.engine import MODEL, NUM_ANSWER_TOKENS, TOKENIZER
from sala_serve.tokens.counter import TokenCounter

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from overhead.client import Load
    from overhead.targets import Target

CHAT = "/v1/chat/completions"
QUESTION = "Why is the sky blue in the day and red in the evening? Two sentences, please."
RATES_PER_S = (100, 500)
SATURATING_CLIENTS = 32
LONG_TOKENS = 1_000_000
SETTLE_S = 2.0
"""After long prompts, before memory is looked at."""


def short_ask(target: Target, *, is_stream: bool) -> Ask:
    """Return a short chat."""
    return _ask(target, QUESTION, is_stream=is_stream)


async def loads(
    target: Target, direct: Target, *, repeat: int, duration_s: float
) -> list[dict[str, Any]]:
    """Measure a target at each rate and saturated, each beside the engine itself right before."""
    rows = []
    for per_s in RATES_PER_S:
        for is_stream in (False, True):
            row = {"what": "rate", "rate_per_s": per_s, "is_stream": is_stream, "repeat": repeat}
            run = partial(open_loop, per_s=per_s, duration_s=duration_s)
            rows.append(row | await _beside(target, direct, run, is_stream=is_stream))
    for is_stream in (False, True):
        row = {"what": "most", "clients": SATURATING_CLIENTS, "is_stream": is_stream}
        most = partial(closed_loop, num_clients=SATURATING_CLIENTS, duration_s=duration_s)
        rows.append(row | {"repeat": repeat} | await _watched(target, most, is_stream=is_stream))
    return rows


async def warm_up(target: Target, duration_s: float = 1.0) -> None:
    """Let a target load and compile what it does at first."""
    for is_stream in (False, True):
        ask = short_ask(target, is_stream=is_stream)
        await closed_loop(target.port, ask, num_clients=8, duration_s=duration_s)


async def long_prompts(target: Target, direct: Target, *, num_prompts: int) -> dict[str, Any]:
    """Send million-token prompts one after the other, each another one; a few to the engine itself too."""
    text, num_tokens = await long_text()
    base = await _long_times_s(direct, text, min(num_prompts, 10))
    before = usage(target.process.pid)
    load_before = os.getloadavg()[0]
    times_s = await _long_times_s(target, text, num_prompts)
    after = usage(target.process.pid)
    await asyncio.sleep(SETTLE_S)
    rss_mib = usage(target.process.pid).rss_mib
    good = [each for each in times_s if each is not None]
    row: dict[str, Any] = {
        "what": "long",
        "target": target.name,
        "num_prompts": num_prompts,
        "num_good": len(good),
        "tokens": num_tokens,
        "bytes": len(text),
        "load_before": round(load_before, 2),
        "cpu_s_per_prompt": round((after.cpu_s - before.cpu_s) / num_prompts, 4),
        "rss_mib_before": round(before.rss_mib, 1),
        "rss_mib_after": round(rss_mib, 1),
        "direct_p50_ms": round(1e3 * statistics.median(each for each in base if each), 1),
    }
    if good:
        row["total_p50_ms"] = round(1e3 * statistics.median(good), 1)
        row["total_max_ms"] = round(1e3 * max(good), 1)
        row["added_p50_ms"] = round(row["total_p50_ms"] - row["direct_p50_ms"], 1)
    return row


async def long_text() -> tuple[str, int]:
    """Return English prose of about a million of the model's tokens, and how many they are."""
    counter = TokenCounter.load(TOKENIZER)
    pages = sorted((ROOT / "docs").glob("*.md"))
    prose = " ".join(" ".join(page.read_text(encoding="utf-8").split()) for page in pages)
    (prompt,) = await counter.count_completion({"prompt": prose})
    num_chars = round(LONG_TOKENS / prompt.num_tokens * len(prose))
    text = (prose * (num_chars // len(prose) + 1))[:num_chars]
    (counted,) = await counter.count_completion({"prompt": text})
    counter.close()
    return text, counted.num_tokens


async def _long_times_s(target: Target, text: str, num_prompts: int) -> list[float | None]:
    client, times_s = Client(target.port), []
    for index in range(num_prompts):
        ask = _ask(target, f"{index} {time.time()} {text}", is_stream=False)
        timing = await client.ask(ask.wire(target.port), ask.end)
        times_s.append(timing.total_s if timing.is_good else None)
    client.close()
    return times_s


async def _beside(
    target: Target,
    direct: Target,
    run: Callable[[int, Ask], Awaitable[Load]],
    *,
    is_stream: bool,
) -> dict[str, Any]:
    base = (await run(direct.port, short_ask(direct, is_stream=is_stream))).summary()
    row = await _watched(target, run, is_stream=is_stream)
    names = [f"{what}_p{percent}_ms" for what in ("first", "total") for percent in (50, 99)]
    added = {
        f"added_{name}": round(row[name] - base[name], 3)
        for name in names
        if name in row and name in base
    }
    return row | added | {"direct": base}


async def _watched(
    target: Target, run: Callable[[int, Ask], Awaitable[Load]], *, is_stream: bool
) -> dict[str, Any]:
    """Run a load on a target, and look at what its processes use meanwhile."""
    load_before = os.getloadavg()[0]
    before = usage(target.process.pid)
    summary = (await run(target.port, short_ask(target, is_stream=is_stream))).summary()
    after: Usage = usage(target.process.pid)
    used = {
        "target": target.name,
        "load_before": round(load_before, 2),
        "cores": round(after.cores_since(before), 3),
        "rss_mib": round(after.rss_mib, 1),
    }
    return used | summary


def _ask(target: Target, text: str, *, is_stream: bool) -> Ask:
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": text}],
        "max_tokens": NUM_ANSWER_TOKENS,
        "stream": is_stream,
    }
    end = b"data: [DONE]" if is_stream else b'"usage"'
    return Ask(CHAT, json.dumps(body).encode(), end, target.key)
