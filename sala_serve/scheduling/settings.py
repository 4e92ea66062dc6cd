"""How work is shared."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from sala_serve.settings import Section


class SchedulingSettings(Section):
    """Section ``scheduling``."""

    order: Literal["fair", "arrival"] = "fair"
    """``arrival``: first come, first served, whoever it is; to compare with."""
    long_prompt_tokens: int = Field(default=16_384, ge=1)
    """A request is long if more uncached prompt tokens than this are left. As ``long_prefill_tokens`` of the
    engine's scheduler."""
    max_long_prefills: int = Field(default=1, ge=1)
    """Long prefills at the same time on one engine. As ``max_long_prefills`` of the engine's scheduler."""
    piece_tokens: int = Field(default=32_768, ge=1)
    """A request is charged at most this far ahead of what the engine has computed of it."""
    lead_tokens: int = Field(default=32_768, ge=0)
    """How far a tenant (of weight 1) may be ahead of another that waits and still be served by urgency."""
    give_way_tokens: int | None = Field(default=131_072, ge=1)
    """A long prefill whose tenant is further ahead than this (at weight 1) of one that waits for the same place is
    put back, and later goes on from what the engine has kept; None: never."""
    output_token_cost: float = Field(default=4.0, ge=0)
    """What a generated token costs, in uncached prompt tokens; cached ones cost nothing."""
    max_prefill_ahead_tokens: int = Field(default=16_896, ge=1)
    """Uncached tokens of short prompts that an engine is given ahead of what it has computed: two steps, so that
    it never waits for us and the order stays ours."""
    max_queued_requests: int = Field(default=1024, ge=1)
    """Of all tenants. One tenant never takes more than is left for the others."""
    max_queued_tokens: int = Field(default=67_108_864, ge=1)
    """Prompt tokens of all waiting requests; shared as above."""
    overdue_s: float = Field(default=60.0, ge=0)
    """A request that has waited this long and ``overdue_prefills`` times its own prefill goes before all younger
    ones of its tenant, and memory is kept free for it."""
    overdue_prefills: float = Field(default=10.0, ge=0)
    """See ``overdue_s``."""
    min_shared_tokens: int = Field(default=8192, ge=1)
    """A request waits for a running prefill that will save it at least this many tokens."""
    prefill_tokens_per_s: float = Field(default=20_000.0, gt=0)
    """One engine's, until enough of its work has been seen."""
    decode_tokens_per_s: float = Field(default=150.0, gt=0)
    """One answer's, until some have been seen."""
    state_interval_tokens: int = Field(default=65_536, ge=1)
    """The engine keeps states at multiples of this; a hit ends at one (docs/decisions/0007)."""
    engine_block_tokens: int = Field(default=2048, ge=1)
    """The engine keeps a state one such block before a prompt's last boundary, too."""
    max_prefix_tokens: int = Field(default=16_777_216, ge=1)
    """Tokens of prefixes remembered for an engine that does not tell its capacity."""
    max_pins: int = Field(default=10_000, ge=1)
    """Values of ``prompt_cache_key`` that are remembered."""
