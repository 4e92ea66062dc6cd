"""What a client is told about its limits: ``x-ratelimit-*`` headers, and the error when one is reached."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from sala_serve.errors import (
    LONGEST_RETRY_AFTER_S,
    RETRY_AFTER_S,
    InsufficientQuota,
    RateLimited,
)
from sala_serve.tenants.ledger import LIMIT_NAMES

if TYPE_CHECKING:
    from sala_serve.errors import GatewayError
    from sala_serve.tenants.ledger import Charge, Used, Verdict
    from sala_serve.tenants.model import Limits

_DAY_MS = 86_400_000
_WORDS = {
    "requests": "requests a minute",
    "input": "input tokens a minute",
    "output": "output tokens a minute",
    "flight": "tokens in flight",
    "long": "long requests at the same time",
    "day": "tokens a day",
}
_REFILLED = {"requests": "requests", "input": "input-tokens", "output": "output-tokens"}


def rate_limit_headers(limits: Limits, used: Used, now_ms: int) -> dict[str, str]:
    """Return the headers for the limits that there are.

    ``-tokens`` is that of input and output tokens of which a smaller share is left. ``-reset-`` is how long
    until all of a limit is there again, if nothing more is asked.

    Args:
        limits: the tenant's.
        used: what of them is used, this request included.
        now_ms: Unix.
    """
    headers: dict[str, str] = {}
    tightest: tuple[float, str] | None = None
    for name, label in _REFILLED.items():
        limit = getattr(limits, LIMIT_NAMES[name])
        if limit is None:
            continue
        amount = getattr(used, name)
        remaining = max(math.floor(limit - amount), 0)
        reset_ms = math.ceil(amount * 60_000 / limit) if limit else _DAY_MS
        headers |= _three(label, limit, remaining, reset_ms)
        share_left = remaining / max(limit, 1)
        if name != "requests" and (tightest is None or share_left < tightest[0]):
            tightest = (share_left, label)
    if tightest is not None:
        for part in ("limit", "remaining", "reset"):
            headers[f"x-ratelimit-{part}-tokens"] = headers[f"x-ratelimit-{part}-{tightest[1]}"]
    if limits.tokens_per_day is not None:
        remaining = max(limits.tokens_per_day - used.day, 0)
        headers |= _three(
            "day-tokens", limits.tokens_per_day, remaining, _DAY_MS - now_ms % _DAY_MS
        )
    return headers


def too_large(charge: Charge, limits: Limits) -> str | None:
    """Return the short name of a limit that could never admit ``charge``, if there is one."""
    amounts = {**vars(charge), "requests": 1}
    for name, field in LIMIT_NAMES.items():
        limit = getattr(limits, field)
        if limit is not None and amounts[name] > limit:
            return name
    return None


def refusal(name: str, limits: Limits, charge: Charge, *, verdict: Verdict | None) -> GatewayError:
    """Return the error for a claim that the limit called ``name`` does not admit.

    Args:
        name: short name of the limit.
        limits: the tenant's.
        charge: what the claim would have taken.
        verdict: of the ledger; ``None``: no waiting will help.
    """
    limit = getattr(limits, LIMIT_NAMES[name])
    asked = {**vars(charge), "requests": 1}[name]
    kind: Literal["requests", "tokens"] = "requests" if name in ("requests", "long") else "tokens"
    message = f"Limit of {limit} {_WORDS[name]}: this request counts {asked}"
    if verdict is None:
        return RateLimited(
            f"{message}, which is more than the limit.",
            kind=kind,
            headers={"X-Should-Retry": "false"},
        )
    headers = rate_limit_headers(limits, verdict.used, verdict.now_ms)
    message += f", {math.ceil(getattr(verdict.used, name))} are used."
    if name == "day":
        return InsufficientQuota(
            f"{message} The next day begins at 00:00 UTC.",
            headers={**headers, "X-Should-Retry": "false"},
        )
    # what other requests hold comes back when they end, which nobody knows
    wait_ms = verdict.wait_ms if name in _REFILLED else max(verdict.wait_ms, RETRY_AFTER_S * 1000)
    wait_s = math.ceil(wait_ms / 1000)
    if wait_s > LONGEST_RETRY_AFTER_S:
        headers["X-Should-Retry"] = "false"
    else:
        headers |= {"Retry-After": str(wait_s), "Retry-After-Ms": str(wait_ms)}
    if name in _REFILLED:
        message += f" Please retry in {_duration(wait_ms)}."
    return RateLimited(message, kind=kind, headers=headers)


def _three(label: str, limit: int, remaining: int, reset_ms: int) -> dict[str, str]:
    return {
        f"x-ratelimit-limit-{label}": str(limit),
        f"x-ratelimit-remaining-{label}": str(remaining),
        f"x-ratelimit-reset-{label}": _duration(reset_ms),
    }


def _duration(ms: int) -> str:
    """Write a duration as OpenAI does: ``17ms``, ``8.64s``, ``6m0s``, ``1h2m3s``."""
    if ms < 1000:
        return f"{ms}ms"
    if ms < 60_000:
        return f"{ms / 1000:g}s"
    seconds = math.ceil(ms / 1000)
    hours, minutes = seconds // 3600, seconds // 60 % 60
    return (f"{hours}h" if hours else "") + f"{minutes}m{seconds % 60}s"
