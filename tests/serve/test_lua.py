"""The store that the limits' scripts have without Redis, beside a real one."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sala_serve.lua import SWEEP_INTERVAL_S, LuaStore, ScoredSet

# each command that the scripts use, found and not found; answers are strings, as theirs are
EVERY_COMMAND = """
local hash, set, answer = KEYS[1], KEYS[2], {}
local function note(value) answer[#answer + 1] = tostring(value) end
redis.call('HSET', hash, 'a', ARGV[1], 'b', 2.5, 'c', 3)
note(redis.call('HGET', hash, 'a'))
note(redis.call('HGET', hash, 'none'))
note(redis.call('HEXISTS', hash, 'b'))
note(redis.call('HEXISTS', hash, 'none'))
for _, value in ipairs(redis.call('HMGET', hash, 'b', 'c', 'none', 'a')) do note(value) end
redis.call('HINCRBY', hash, 'c', '-5')
redis.call('HINCRBY', hash, 'new', ARGV[2])
note(redis.call('HGET', hash, 'c'))
note(redis.call('HGET', hash, 'new'))
redis.call('HDEL', hash, 'b')
note(redis.call('HGET', hash, 'b'))
for score, member in ipairs({'x', 'y', 'z'}) do redis.call('ZADD', set, 10 - score, member) end
redis.call('ZADD', set, '20', 'x')
redis.call('ZREM', set, 'y')
redis.call('ZREM', set, 'none')
for _, top in ipairs({'6', '7', '20'}) do
  for _, member in ipairs(redis.call('ZRANGEBYSCORE', set, '-inf', top, 'LIMIT', 0, 100)) do note(member) end
  note('-')
end
note(#redis.call('ZRANGEBYSCORE', set, '-inf', '20', 'LIMIT', 0, 1))
note(#redis.call('TIME'))
redis.call('PEXPIRE', hash, 60000)
redis.call('EXPIRE', set, 60)
return answer
"""


async def test_commands_answer_as_those_of_redis(state):
    script = state.scripts.register_script(EVERY_COMMAND)
    answers = await script(keys=["sala:hash", "sala:set"], args=["text", 7])
    expected = "text false 1 0 2.5 3 false text -2 7 false - z - z x - 1 2"
    assert b" ".join(answers).decode() == expected
    assert await state.scripts.hgetall("sala:hash") == {b"a": b"text", b"c": b"-2", b"new": b"7"}
    assert await state.scripts.hgetall("sala:none") == {}


@given(
    st.lists(
        st.tuples(st.sampled_from("abcde"), st.one_of(st.none(), st.integers(0, 9))), max_size=40
    ),
    st.integers(0, 9),
    st.integers(1, 5),
)
def test_scored_set_is_a_sorted_list(steps, most, limit):
    found, plain = ScoredSet(), {}
    for name, score in steps:
        member = name.encode()
        if score is None:
            found.remove(member)
            plain.pop(member, None)
        else:
            found.add(member, score)
            plain[member] = score
        expected = sorted((score, each) for each, score in plain.items() if score <= most)
        assert found.up_to(most, limit) == [each for _, each in expected[:limit]]


def test_what_has_ended_is_forgotten():
    now_unix_s = [1_795_608_000.0]
    store = LuaStore(lambda: now_unix_s[0])
    write = store.register_script(
        "redis.call('HSET', KEYS[1], 'a', 1) redis.call('PEXPIRE', KEYS[1], ARGV[1]) return {}"
    )

    async def play():
        await write(keys=["short"], args=[1000])
        await write(keys=["long"], args=[10**9])
        now_unix_s[0] += SWEEP_INTERVAL_S
        return await store.hgetall("short"), await store.hgetall("long")

    assert asyncio.run(play()) == ({}, {b"a": b"1"})


def test_what_redis_would_refuse_is_refused():
    script = LuaStore().register_script("return redis.call('FLUSHALL')")
    with pytest.raises(KeyError):
        asyncio.run(script(keys=[], args=[]))
