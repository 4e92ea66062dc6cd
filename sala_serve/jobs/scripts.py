"""The Lua scripts of the store: each is one atomic step, so that no reader sees half of it.

Keys are built from identities inside the scripts, so Redis Cluster is not supported. Instants are
milliseconds of Redis' own clock, unless a caller gives one, so that replicas need not agree on the time.

::

    sala:job:ID              hash    what is known of a job; ``token`` fences its writers
    sala:job:ID:spec         string  what the worker needs; gone when the job is over
    sala:job:ID:input        string  what a later response builds on
    sala:job:ID:events       stream  output events; entry N+1-0 is sequence number N
    sala:job:ID:lines        hash    results of a batch's lines, by line number, until they are in files
    sala:jobs:LANE:ready:T   list    jobs of tenant T that wait for a worker, oldest first
    sala:jobs:LANE:tenants   zset    tenants with such jobs, by the turn they last had
    sala:jobs:LANE:delayed   zset    jobs that wait for another attempt, by when it is due
    sala:jobs:LANE:leases    zset    jobs that run, by when their lease ends
    sala:jobs:LANE:dead      stream  jobs given up after their last attempt

What a tenant has stored of one kind (the lane of a job, or ``file``) is counted on its shelf, in the step that
stores or removes it: were it another step, a crash between the two would leave what counts for ever.

::

    sala:shelf:KIND:T:index   zset    objects of tenant T by when they were stored
    sala:shelf:KIND:T:bytes   hash    what each counts for
    sala:shelf:KIND:T:total   string  the sum
    sala:shelf:KIND:T:expiry  zset    objects that may go, by when they do
"""

PRELUDE = """
local function now_ms(given)
    if given ~= '' then return tonumber(given) end
    local time = redis.call('TIME')
    return time[1] * 1000 + math.floor(time[2] / 1000)
end
local function ms(value) return string.format('%.0f', value) end
local function is_final(status) return status ~= 'queued' and status ~= 'in_progress' end
local function enqueue(lane, tenant, id, side)
    redis.call(side, 'sala:jobs:' .. lane .. ':ready:' .. tenant, id)
    local turn = redis.call('GET', 'sala:jobs:' .. lane .. ':turn') or '0'
    redis.call('ZADD', 'sala:jobs:' .. lane .. ':tenants', 'NX', turn, tenant)
end
local function append(job, events, first)
    local last = tonumber(redis.call('HGET', job, 'seq'))
    for index = first, #events do
        last = last + 1
        redis.call('XADD', job .. ':events', ms(last + 1) .. '-0', 'e', events[index])
    end
    redis.call('HSET', job, 'seq', ms(last))
    return last
end
local function holds(job, token)
    local known = redis.call('HMGET', job, 'token', 'status')
    return known[1] == token and known[2] == 'in_progress'
end
local function shelf_of(kind, tenant) return 'sala:shelf:' .. kind .. ':' .. tenant end
local function drop(shelf, id)
    local size = redis.call('HGET', shelf .. ':bytes', id) or '0'
    redis.call('HDEL', shelf .. ':bytes', id)
    redis.call('ZREM', shelf .. ':index', id)
    redis.call('ZREM', shelf .. ':expiry', id)
    redis.call('DECRBY', shelf .. ':total', size)
end
local function drop_expired(shelf, now)
    for _, id in ipairs(redis.call('ZRANGEBYSCORE', shelf .. ':expiry', '-inf', ms(now))) do
        drop(shelf, id)
    end
    return tonumber(redis.call('GET', shelf .. ':total') or '0')
end
local function may_go(shelf, id, bytes, at)
    local old = redis.call('HGET', shelf .. ':bytes', id)
    if not old then return end
    redis.call('HSET', shelf .. ':bytes', id, ms(bytes or tonumber(old)))
    redis.call('INCRBY', shelf .. ':total', ms((bytes or tonumber(old)) - tonumber(old)))
    redis.call('ZADD', shelf .. ':expiry', ms(at), id)
end
"""

_REMOVE = """
local function remove(id)
    local job = 'sala:job:' .. id
    local known = redis.call('HMGET', job, 'lane', 'tenant')
    if not known[1] then return 0 end
    redis.call('ZREM', 'sala:jobs:' .. known[1] .. ':leases', id)
    redis.call('ZREM', 'sala:jobs:' .. known[1] .. ':delayed', id)
    redis.call('DEL', job, job .. ':spec', job .. ':input', job .. ':events', job .. ':lines')
    drop(shelf_of(known[1], known[2]), id)
    return 1
end
"""

SUBMIT = (
    PRELUDE
    + _REMOVE
    + """
local function make_room(shelf, bytes, now, limit)
    local missing, victims = drop_expired(shelf, now) + bytes - limit, {}
    for _, other in ipairs(missing > 0 and redis.call('ZRANGE', shelf .. ':expiry', 0, -1) or {}) do
        if missing <= 0 then break end
        missing = missing - tonumber(redis.call('HGET', shelf .. ':bytes', other) or 0)
        victims[#victims + 1] = other
    end
    if missing > 0 then return false end
    for _, other in ipairs(victims) do
        drop(shelf, other)
        remove(other)
    end
    return true
end
-- id lane tenant status created_ms document with_events body_bytes keep_ms now limit | events
-- the tenant's finished jobs that would expire first give way; answers 0: there is no room all the same
local id, lane, tenant, status = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local job, shelf, now = 'sala:job:' .. id, shelf_of(lane, tenant), now_ms(ARGV[10])
local bytes = #ARGV[6] + tonumber(ARGV[8])
if not make_room(shelf, bytes, now, tonumber(ARGV[11])) then
    redis.call('DEL', job .. ':spec', job .. ':input')
    return 0
end
redis.call('ZADD', shelf .. ':index', ms(now), id)
redis.call('HSET', shelf .. ':bytes', id, ms(bytes))
redis.call('INCRBY', shelf .. ':total', ms(bytes))
redis.call('HSET', job, 'lane', lane, 'tenant', tenant, 'status', status, 'created', ARGV[5],
    'doc', ARGV[6], 'events', ARGV[7], 'bytes', ARGV[8],
    'attempt', '0', 'token', '0', 'seq', '-1', 'progress', '{}')
append(job, ARGV, 12)
if status == 'queued' then
    redis.call('PERSIST', job .. ':spec')
    redis.call('PERSIST', job .. ':input')
    enqueue(lane, tenant, id, 'RPUSH')
else
    redis.call('PEXPIRE', job, ARGV[9])
    redis.call('PEXPIRE', job .. ':input', ARGV[9])
    may_go(shelf, id, nil, now + tonumber(ARGV[9]))
end
return 1
"""
)

LEASE = (
    PRELUDE
    + """
-- lane now lease_ms | tenants that are not to be served
local lane, now = ARGV[1], now_ms(ARGV[2])
local leases, tenants = 'sala:jobs:' .. lane .. ':leases', 'sala:jobs:' .. lane .. ':tenants'
local delayed = 'sala:jobs:' .. lane .. ':delayed'
local skipped = {}
for index = 4, #ARGV do skipped[ARGV[index]] = true end
for _, id in ipairs(redis.call('ZRANGEBYSCORE', leases, '-inf', ms(now), 'LIMIT', 0, 100)) do
    redis.call('ZREM', leases, id)
    local tenant = redis.call('HGET', 'sala:job:' .. id, 'tenant')
    if tenant then
        redis.call('HINCRBY', 'sala:job:' .. id, 'token', 1)
        enqueue(lane, tenant, id, 'LPUSH')
    end
end
for _, id in ipairs(redis.call('ZRANGEBYSCORE', delayed, '-inf', ms(now), 'LIMIT', 0, 100)) do
    redis.call('ZREM', delayed, id)
    local tenant = redis.call('HGET', 'sala:job:' .. id, 'tenant')
    if tenant then enqueue(lane, tenant, id, 'LPUSH') end
end
for _, tenant in ipairs(redis.call('ZRANGE', tenants, 0, -1)) do
    if not skipped[tenant] then
        local ready = 'sala:jobs:' .. lane .. ':ready:' .. tenant
        local id = redis.call('LPOP', ready)
        while id do
            local job = 'sala:job:' .. id
            local status = redis.call('HGET', job, 'status')
            if status and not is_final(status) then
                local token = redis.call('HINCRBY', job, 'token', 1)
                local attempt = redis.call('HINCRBY', job, 'attempt', 1)
                redis.call('HSET', job, 'status', 'in_progress', 'progress', '{}')
                redis.call('ZADD', leases, ms(now + tonumber(ARGV[3])), id)
                local turn = redis.call('INCR', 'sala:jobs:' .. lane .. ':turn')
                redis.call('ZADD', tenants, 'XX', ms(turn), tenant)
                local known = redis.call('HMGET', job, 'seq', 'created')
                return {id, tenant, ms(token), ms(attempt), known[1], ms(now - known[2])}
            end
            id = redis.call('LPOP', ready)
        end
        redis.call('ZREM', tenants, tenant)
    end
end
return false
"""
)

HEARTBEAT = (
    PRELUDE
    + """
-- lane now lease_ms | id token ...; answers 0 lost, 1 held, 2 held and its owner wants it cancelled
local leases = 'sala:jobs:' .. ARGV[1] .. ':leases'
local ends = ms(now_ms(ARGV[2]) + tonumber(ARGV[3]))
local answers = {}
for index = 4, #ARGV, 2 do
    local id, job = ARGV[index], 'sala:job:' .. ARGV[index]
    local answer = 0
    if holds(job, ARGV[index + 1]) and redis.call('ZSCORE', leases, id) then
        redis.call('ZADD', leases, 'XX', ends, id)
        answer = redis.call('HEXISTS', job, 'cancel') == 1 and 2 or 1
    end
    answers[#answers + 1] = answer
end
return answers
"""
)

APPEND = (
    PRELUDE
    + """
-- id token | events; answers the last sequence number, or nothing when the lease is lost
local job = 'sala:job:' .. ARGV[1]
if not holds(job, ARGV[2]) then return false end
return ms(append(job, ARGV, 3))
"""
)

UPDATE = (
    PRELUDE
    + """
-- id token | field value ...
local job = 'sala:job:' .. ARGV[1]
if not holds(job, ARGV[2]) then return 0 end
for index = 3, #ARGV, 2 do redis.call('HSET', job, ARGV[index], ARGV[index + 1]) end
return 1
"""
)

FINISH = (
    PRELUDE
    + """
-- id token status document now keep_ms keep_events_ms dead_because | events
-- without a token: from outside, whoever runs the job, unless it is over
local id, token, job = ARGV[1], ARGV[2], 'sala:job:' .. ARGV[1]
local known = redis.call('HMGET', job, 'status', 'lane', 'tenant')
if not known[1] or is_final(known[1]) then return 0 end
if token ~= '' and not holds(job, token) then return 0 end
append(job, ARGV, 9)
local bytes = #ARGV[4] + redis.call('STRLEN', job .. ':input')
may_go(shelf_of(known[2], known[3]), id, bytes, now_ms(ARGV[5]) + tonumber(ARGV[6]))
redis.call('HSET', job, 'status', ARGV[3], 'doc', ARGV[4], 'bytes', ms(bytes), 'progress', '{}')
redis.call('HINCRBY', job, 'token', 1)
redis.call('ZREM', 'sala:jobs:' .. known[2] .. ':leases', id)
redis.call('ZREM', 'sala:jobs:' .. known[2] .. ':delayed', id)
redis.call('DEL', job .. ':spec')
redis.call('PEXPIRE', job, ARGV[6])
redis.call('PEXPIRE', job .. ':input', ARGV[6])
redis.call('PEXPIRE', job .. ':events', ARGV[7])
redis.call('UNLINK', job .. ':lines')
if ARGV[8] ~= '' then
    redis.call('XADD', 'sala:jobs:' .. known[2] .. ':dead', 'MAXLEN', '~', 1000, '*', 'job', id,
        'tenant', known[3], 'because', ARGV[8])
end
return 1
"""
)

RELEASE = (
    PRELUDE
    + """
-- id token delay_ms now counts
local id, job = ARGV[1], 'sala:job:' .. ARGV[1]
if not holds(job, ARGV[2]) then return 0 end
local known = redis.call('HMGET', job, 'lane', 'tenant')
redis.call('HSET', job, 'status', 'queued', 'progress', '{}')
redis.call('HINCRBY', job, 'token', 1)
if ARGV[5] == '0' then redis.call('HINCRBY', job, 'attempt', -1) end
redis.call('ZREM', 'sala:jobs:' .. known[1] .. ':leases', id)
if tonumber(ARGV[3]) > 0 then
    redis.call('ZADD', 'sala:jobs:' .. known[1] .. ':delayed', ms(now_ms(ARGV[4]) + tonumber(ARGV[3])), id)
else
    enqueue(known[1], known[2], id, 'LPUSH')
end
return 1
"""
)

TOUCH = (
    PRELUDE
    + """
-- id now keep_ms: keep a finished job as if it had finished now
local id, job = ARGV[1], 'sala:job:' .. ARGV[1]
local known = redis.call('HMGET', job, 'status', 'lane', 'tenant')
if not known[1] or not is_final(known[1]) then return 0 end
redis.call('PEXPIRE', job, ARGV[3])
redis.call('PEXPIRE', job .. ':input', ARGV[3])
may_go(shelf_of(known[2], known[3]), id, nil, now_ms(ARGV[2]) + tonumber(ARGV[3]))
return 1
"""
)

DELETE = (
    PRELUDE
    + _REMOVE
    + """
-- id
return remove(ARGV[1])
"""
)

LINE = (
    PRELUDE
    + """
-- id token line result | name number ...; a batch's line is written once, by the worker that holds the batch,
-- and counted when it is written. A batch that moves is no poison: its attempts begin anew
local job = 'sala:job:' .. ARGV[1]
if not holds(job, ARGV[2]) then return 0 end
if redis.call('HSETNX', job .. ':lines', ARGV[3], ARGV[4]) == 1 then
    for index = 5, #ARGV, 2 do redis.call('HINCRBY', job, 'n:' .. ARGV[index], ARGV[index + 1]) end
    redis.call('HSET', job, 'attempt', '1')
end
return 1
"""
)

CANCEL = (
    PRELUDE
    + """
-- id unix_s: whoever holds the job, or will, is to end it
local job = 'sala:job:' .. ARGV[1]
local status = redis.call('HGET', job, 'status')
if not status or is_final(status) then return 0 end
redis.call('HSETNX', job, 'cancel', ARGV[2])
return 1
"""
)

COUNTS = """
-- lane; answers how many jobs wait, run, and were given up
local lane = 'sala:jobs:' .. ARGV[1]
local waiting = redis.call('ZCARD', lane .. ':delayed')
for _, tenant in ipairs(redis.call('ZRANGE', lane .. ':tenants', 0, -1)) do
    waiting = waiting + redis.call('LLEN', lane .. ':ready:' .. tenant)
end
return {waiting, redis.call('ZCARD', lane .. ':leases'), redis.call('XLEN', lane .. ':dead')}
"""
