"""Whatever happens in whatever order, the ledger's sums are those of a plain list of what was reserved."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sala_serve.state import State, StateSettings
from sala_serve.telemetry import Usage
from sala_serve.tenants.ledger import LIMIT_NAMES, Charge, Ledger, counted_input
from sala_serve.tenants.model import Limits

LEASE_MS = 60_000
DAY_MS = 86_400_000
NOON_MS = 1_795_608_000_000
LIMITS = Limits(
    requests_per_min=6,
    input_tokens_per_min=600,
    output_tokens_per_min=300,
    tokens_in_flight=1500,
    long_prefills=2,
    tokens_per_day=3000,
    cached_token_rate=0.25,
)
RATES_PER_MS = {"requests": 6 / 60_000, "input": 600 / 60_000, "output": 300 / 60_000}


@dataclass
class Model:
    """The ledger again, as plainly as it can be said: no Lua, no records, one list."""

    now_ms: int = NOON_MS
    buckets: dict[str, float] = field(default_factory=lambda: dict.fromkeys(RATES_PER_MS, 0.0))
    held: dict[str, tuple[Charge, int, int]] = field(default_factory=dict)
    done: set[str] = field(default_factory=set)
    day_used: int = 0
    expired_tokens: int = 0

    def advance(self, ms: int) -> None:
        if (self.now_ms + ms) // DAY_MS != self.now_ms // DAY_MS:
            self.day_used = 0
        self.now_ms += ms
        for name, rate in RATES_PER_MS.items():
            self.buckets[name] = max(0.0, self.buckets[name] - rate * ms)
        for key in [key for key, (_, ends_ms, _) in self.held.items() if ends_ms <= self.now_ms]:
            self.end(key, 0, 0)

    def sums(self) -> dict[str, float]:
        charges = [charge for charge, _, _ in self.held.values()]
        return {
            **self.buckets,
            "flight": sum(each.flight for each in charges),
            "long": sum(each.long for each in charges),
            "day": self.day_used,
        }

    def admits(self, charge: Charge) -> bool:
        used = self.sums()
        asked = {**vars(charge), "requests": 1}
        return all(
            used[name] + asked[name] <= getattr(LIMITS, limit) + 1e-6
            for name, limit in LIMIT_NAMES.items()
            if name != "long" or charge.long
        )

    def hold(self, key: str, charge: Charge) -> None:
        self.buckets["requests"] += 1
        self.add(charge.input, charge.output, charge.day)
        self.held[key] = charge, self.now_ms + LEASE_MS, self.now_ms // DAY_MS

    def add(self, num_input: int, num_output: int, num_day: int) -> None:
        self.buckets["input"] = max(0.0, self.buckets["input"] + num_input)
        self.buckets["output"] = max(0.0, self.buckets["output"] + num_output)
        self.day_used = max(0, self.day_used + num_day)

    def end(self, key: str, num_input: int, num_output: int) -> None:
        charge, _, day = self.held.pop(key)
        reserved = charge.day if day == self.now_ms // DAY_MS else 0
        self.add(
            num_input - charge.input, num_output - charge.output, num_input + num_output - reserved
        )


amounts = st.integers(0, 700)
keys = st.sampled_from("abcdef")
charges = st.builds(
    lambda num_input, num_output, extra, is_long: Charge(
        num_input, num_output, num_input + num_output + extra, is_long, num_input + num_output
    ),
    *(amounts, amounts, amounts, st.integers(0, 1)),
)
usages = st.builds(
    lambda prompt, share, completion: Usage(prompt, round(prompt * share), completion),
    *(amounts, st.floats(0, 1), amounts),
)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("reserve"), keys, charges),
        st.tuples(st.just("settle"), keys, usages),
        st.tuples(st.just("refund"), keys, st.none()),
        st.tuples(st.just("renew"), keys, charges),
        st.tuples(st.just("wait"), keys, st.sampled_from([1, 700, 20_000, 59_999, 90_000, DAY_MS])),
    ),
    max_size=25,
)


async def play(state: State, script: list[tuple[str, str, object]]) -> None:
    await state.redis.flushall()
    model = Model()
    ledger = Ledger(state.scripts, lease_s=LEASE_MS / 1000, unix_clock=lambda: model.now_ms / 1000)
    generations = dict.fromkeys("abcdef", 0)
    for verb, letter, given_value in script:
        key = f"{letter}{generations[letter]}"
        match verb, given_value:
            case "reserve", Charge() as charge:
                if key in model.held:
                    verdict = await ledger.reserve("t", LIMITS, key, charge)
                    assert verdict.refused_by == "repeated"
                    continue
                verdict = await ledger.reserve("t", LIMITS, key, charge)
                assert (verdict.refused_by is None) == model.admits(charge)
                if verdict.refused_by is None:
                    model.hold(key, charge)
            case "settle", Usage() as usage if key in model.held:
                # sent twice, counted once
                for _ in range(2):
                    await ledger.settle("t", LIMITS, key, usage)
                num_input = counted_input(usage.num_prompt_tokens, usage.num_cached_tokens, 0.25)
                model.end(key, num_input, usage.num_completion_tokens)
                generations[letter] += 1
            case "refund", _ if key in model.held:
                for _ in range(2):
                    await ledger.refund("t", LIMITS, key)
                model.end(key, 0, 0)
                # and a reservation that comes late finds that it has ended
                late = await ledger.reserve("t", LIMITS, key, Charge(1, 1, 1, 0, 1))
                assert late.refused_by == "repeated"
                generations[letter] += 1
            case "renew", Charge() as charge:
                await ledger.renew("t", LIMITS, {key: charge})
                if key in model.held:
                    held, _, day = model.held[key]
                    model.held[key] = held, model.now_ms + LEASE_MS, day
                else:
                    model.hold(key, charge)
            case "wait", int(ms):
                model.advance(ms)
        used = await ledger.used("t", LIMITS)
        assert vars(used) == pytest.approx(model.sums(), abs=1e-6)


@pytest.mark.parametrize("kind", ["embedded", "redis"])
def test_books_balance(kind, request):
    url = request.getfixturevalue("redis_server").url if kind == "redis" else None
    settings_ = StateSettings(url=url, command_timeout_s=20)

    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(steps)
    def run(script):
        async def once() -> None:
            state = State.create(settings_, clock=time.monotonic)
            try:
                await play(state, script)
            finally:
                await state.close()

        asyncio.run(once())

    run()
