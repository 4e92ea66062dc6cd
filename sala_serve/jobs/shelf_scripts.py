"""The Lua scripts of what a tenant has stored: its objects in order, their bytes, its files.

::

    sala:shelf:KIND:T:index   zset    objects of tenant T by when they were stored
    sala:shelf:KIND:T:bytes   hash    what each counts for
    sala:shelf:KIND:T:total   string  the sum
    sala:shelf:KIND:T:expiry  zset    objects that may go, by when they do
    sala:file:ID              hash    a file that can be read: whose it is, the object that its owner sees
    sala:file:ID:pieces       list    its content
"""

from __future__ import annotations

from sala_serve.jobs.scripts import PRELUDE

FILE_OVERHEAD_BYTES = 4096
"""What a file counts for beside its content, so that many small ones have a bound too."""

_SHELF = (
    PRELUDE
    + """
local function drop(shelf, id)
    local size = redis.call('HGET', shelf .. ':bytes', id) or '0'
    redis.call('HDEL', shelf .. ':bytes', id)
    redis.call('ZREM', shelf .. ':index', id)
    redis.call('ZREM', shelf .. ':expiry', id)
    return redis.call('DECRBY', shelf .. ':total', size)
end
local function drop_expired(shelf, now)
    for _, id in ipairs(redis.call('ZRANGEBYSCORE', shelf .. ':expiry', '-inf', ms(now))) do
        drop(shelf, id)
    end
    return tonumber(redis.call('GET', shelf .. ':total') or '0')
end
local function is_lost(job, token) return job ~= '' and not holds('sala:job:' .. job, token) end
"""
)

SHELF_PUT = (
    _SHELF
    + """
-- shelf id bytes now limit may_evict: room for one object; answers {1, objects to delete} or {0}
local shelf, id, bytes, now = ARGV[1], ARGV[2], tonumber(ARGV[3]), now_ms(ARGV[4])
local total = drop_expired(shelf, now)
local victims, spare = {}, 0
if ARGV[6] == '1' then
    for _, other in ipairs(redis.call('ZRANGE', shelf .. ':expiry', 0, -1)) do
        if total + bytes - spare <= tonumber(ARGV[5]) then break end
        spare = spare + tonumber(redis.call('HGET', shelf .. ':bytes', other) or 0)
        victims[#victims + 1] = other
    end
end
if total + bytes - spare > tonumber(ARGV[5]) then return {0, {}} end
for _, other in ipairs(victims) do drop(shelf, other) end
redis.call('ZADD', shelf .. ':index', ms(now), id)
redis.call('HSET', shelf .. ':bytes', id, ms(bytes))
redis.call('INCRBY', shelf .. ':total', ms(bytes))
return {1, victims}
"""
)

SHELF_SET = (
    _SHELF
    + """
-- shelf id bytes now keep_ms: the object has this size now (if given) and may go after keep_ms
local shelf, id = ARGV[1], ARGV[2]
local old = redis.call('HGET', shelf .. ':bytes', id)
if not old then return 0 end
local bytes = tonumber(ARGV[3] ~= '' and ARGV[3] or old)
redis.call('HSET', shelf .. ':bytes', id, ms(bytes))
redis.call('INCRBY', shelf .. ':total', ms(bytes - tonumber(old)))
redis.call('ZADD', shelf .. ':expiry', ms(now_ms(ARGV[4]) + tonumber(ARGV[5])), id)
return 1
"""
)

SHELF_REMOVE = (
    _SHELF
    + """
-- shelf id
return drop(ARGV[1], ARGV[2])
"""
)

SHELF_LIST = (
    _SHELF
    + """
-- shelf now after limit newest_first: identities in order of creation
local shelf = ARGV[1]
drop_expired(shelf, now_ms(ARGV[2]))
local rank, range = 'ZRANK', 'ZRANGE'
if ARGV[5] == '1' then rank, range = 'ZREVRANK', 'ZREVRANGE' end
local first = 0
if ARGV[3] ~= '' then
    local place = redis.call(rank, shelf .. ':index', ARGV[3])
    if not place then return false end
    first = place + 1
end
return redis.call(range, shelf .. ':index', first, first + tonumber(ARGV[4]) - 1)
"""
)

FILE_APPEND = (
    _SHELF
    + """
-- id shelf piece pieces_before limit overhead now pending_ms job token: one more piece of a file that is being
-- written; answers 1, 0: somebody else writes it or it is gone, -1: the tenant would have too much
local pieces, shelf, id, now = 'sala:file:' .. ARGV[1] .. ':pieces', ARGV[2], ARGV[1], now_ms(ARGV[7])
if is_lost(ARGV[9], ARGV[10]) or redis.call('LLEN', pieces) ~= tonumber(ARGV[4]) then return 0 end
local bytes = #ARGV[3]
if ARGV[4] == '0' then bytes = bytes + tonumber(ARGV[6]) end
if ARGV[5] ~= '' and drop_expired(shelf, now) + bytes > tonumber(ARGV[5]) then return -1 end
redis.call('RPUSH', pieces, ARGV[3])
redis.call('PEXPIRE', pieces, ARGV[8])
redis.call('HINCRBY', shelf .. ':bytes', id, bytes)
redis.call('INCRBY', shelf .. ':total', bytes)
redis.call('ZADD', shelf .. ':expiry', ms(now + tonumber(ARGV[8])), id)
return 1
"""
)

FILE_PUBLISH = (
    _SHELF
    + """
-- id shelf tenant document pieces now keep_ms job token: the file is whole; answers as FILE_APPEND
local file, shelf, now = 'sala:file:' .. ARGV[1], ARGV[2], now_ms(ARGV[6])
if is_lost(ARGV[8], ARGV[9]) or redis.call('LLEN', file .. ':pieces') ~= tonumber(ARGV[5]) then return 0 end
redis.call('HSET', file, 'tenant', ARGV[3], 'doc', ARGV[4], 'pieces', ARGV[5])
redis.call('PEXPIRE', file, ARGV[7])
redis.call('PEXPIRE', file .. ':pieces', ARGV[7])
redis.call('ZADD', shelf .. ':index', ms(now), ARGV[1])
redis.call('ZADD', shelf .. ':expiry', ms(now + tonumber(ARGV[7])), ARGV[1])
return 1
"""
)

FILE_REMOVE = (
    _SHELF
    + """
-- id shelf job token; answers 0 if it is not the caller's to remove
if is_lost(ARGV[3], ARGV[4]) then return 0 end
redis.call('UNLINK', 'sala:file:' .. ARGV[1], 'sala:file:' .. ARGV[1] .. ':pieces')
drop(ARGV[2], ARGV[1])
return 1
"""
)
