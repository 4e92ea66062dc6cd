"""The Lua scripts of what a tenant has stored: its objects in order, and its files.

::

    sala:file:ID              hash    a file that can be read: whose it is, the object that its owner sees
    sala:file:ID:pieces       list    its content
"""

from __future__ import annotations

from sala_serve.jobs.scripts import PRELUDE

FILE_OVERHEAD_BYTES = 4096
"""What a file counts for beside its content, so that many small ones have a bound too."""

_FENCED = (
    PRELUDE
    + """
local function is_lost(job, token) return job ~= '' and not holds('sala:job:' .. job, token) end
"""
)

SHELF_LIST = (
    PRELUDE
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
    _FENCED
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
    _FENCED
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
    _FENCED
    + """
-- id shelf job token; answers 0 if it is not the caller's to remove
if is_lost(ARGV[3], ARGV[4]) then return 0 end
redis.call('UNLINK', 'sala:file:' .. ARGV[1], 'sala:file:' .. ARGV[1] .. ':pieces')
drop(ARGV[2], ARGV[1])
return 1
"""
)
