from __future__ import annotations

import os
import random
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sala_serve.scheduling.prefixes import Pins, PrefixIndex, chain_of, num_shared_blocks
from sala_serve.scheduling.salt import cache_salt, prefix_key
from sala_serve.scheduling.settings import SchedulingSettings
from sala_serve.tokens.prompt import PREFIX_BLOCK_TOKENS as BLOCK

MILLION = 1_048_576


def hashes(*texts: int) -> tuple[bytes, ...]:
    """Chained hashes of a prompt whose blocks are these numbers."""
    return tuple(random.Random(repr(texts[:end])).randbytes(16) for end in range(1, len(texts) + 1))


texts = st.lists(st.integers(0, 1), max_size=8)


@given(texts, texts)
def test_shared_blocks_are_those_before_the_first_difference(one: list[int], other: list[int]):
    expected = len(os.path.commonprefix([one, other]))
    assert num_shared_blocks(chain_of(hashes(*one), 7), chain_of(hashes(*other), 7)) == expected


@given(st.lists(texts, max_size=12), texts)
def test_held_is_the_longest_beginning_of_what_was_added(added: list[list[int]], asked: list[int]):
    index = PrefixIndex(SchedulingSettings())
    for each in added:
        index.add(chain_of(hashes(*each), 7), len(each) * BLOCK, len(each) * BLOCK)
    expected = max((len(os.path.commonprefix([each, asked])) for each in added), default=0)
    assert index.held_tokens(chain_of(hashes(*asked), 7)) == expected * BLOCK


@given(st.lists(texts, max_size=12), st.integers(1, 6))
def test_what_is_forgotten_is_never_the_beginning_of_what_is_held(
    added: list[list[int]], limit: int
):
    index = PrefixIndex(SchedulingSettings(), limit * BLOCK)
    for each in added:
        index.add(chain_of(hashes(*each), 7), len(each) * BLOCK, len(each) * BLOCK)
        assert len(index) <= limit
        # the latest is held as far as there is room
        assert index.held_tokens(chain_of(hashes(*each), 7)) == min(len(each), limit) * BLOCK
        for other in added:
            chain = chain_of(hashes(*other), 7)
            held = [key in index._has_state for key in chain]
            assert held == sorted(held, reverse=True)


def test_same_text_of_another_tenant_is_not_held():
    index = PrefixIndex(SchedulingSettings())
    text = hashes(*range(8))
    index.add(chain_of(text, prefix_key(b"s", "one")), 8 * BLOCK, 8 * BLOCK)
    assert index.held_tokens(chain_of(text, prefix_key(b"s", "one"))) == 8 * BLOCK
    assert index.held_tokens(chain_of(text, prefix_key(b"s", "other"))) == 0


@pytest.mark.parametrize(
    ("shared_tokens", "cached_tokens"),
    [
        (MILLION, MILLION - 1),  # the same prompt: all but its last token
        (
            MILLION - 4096,
            MILLION - 4096,
        ),  # another question after it: one engine block before its end
        (MILLION - 5120, 983_040),  # leaves it earlier: the last interval's state
        (70_000, 65_536),
        (65_000, 0),
    ],
)
def test_hit_ends_where_a_state_is_kept(shared_tokens: int, cached_tokens: int):
    index = PrefixIndex(SchedulingSettings())
    first = [os.urandom(16) for _ in range(MILLION // BLOCK)]
    index.add(chain_of(first, 7), MILLION, MILLION)
    num_shared = shared_tokens // BLOCK
    second = first[:num_shared] + [os.urandom(16) for _ in range(len(first) - num_shared)]
    assert index.cached_tokens(chain_of(second, 7), MILLION) == cached_tokens


def test_prompt_given_up_leaves_what_was_computed():
    index = PrefixIndex(SchedulingSettings())
    chain = chain_of([os.urandom(16) for _ in range(MILLION // BLOCK)], 7)
    index.add(chain, 200_000, MILLION)
    assert index.cached_tokens(chain, MILLION) == 3 * 65_536


def test_a_million_tokens_take_a_quarter_of_a_mebibyte_at_most():
    prompts = [[os.urandom(16) for _ in range(MILLION // BLOCK)] for _ in range(8)]
    index = PrefixIndex(SchedulingSettings())
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for prompt in prompts:
            index.add(chain_of(prompt, 7), MILLION, MILLION)
        taken = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert taken / 8 / 2**20 < 0.25


def test_prefixes_of_an_engine_are_no_more_than_it_can_hold():
    index = PrefixIndex(SchedulingSettings(), MILLION)
    for _ in range(3):
        index.add(chain_of([os.urandom(16) for _ in range(MILLION // BLOCK)], 7), MILLION, MILLION)
    assert len(index) == MILLION // BLOCK


def test_latest_pins_are_remembered():
    pins = Pins(2)
    for key in ("a", "b", "c"):
        pins.set("tenant", key, f"engine-{key}")
    assert [pins.get("tenant", key) for key in ("a", "b", "c")] == [None, "engine-b", "engine-c"]
    assert pins.get("other", "b") is None
    assert pins.get("tenant", None) is None


@given(st.text(max_size=40), st.text(max_size=40))
def test_salts_differ_by_tenant_and_are_what_vllm_accepts(one: str, other: str):
    salts = [cache_salt(b"secret", each) for each in (one, other)]
    assert (salts[0] == salts[1]) == (one == other)
    assert all(len(salt) == 43 and not set(salt) & set("@/\\\0+=") for salt in salts)


def test_salt_needs_the_secret_and_is_not_the_key_of_prefixes():
    assert cache_salt(b"one", "t") != cache_salt(b"other", "t")
    assert prefix_key(b"one", "t") != prefix_key(b"other", "t")
