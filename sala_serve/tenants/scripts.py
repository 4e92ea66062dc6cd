"""The Lua scripts of limits: each is one atomic step on the three keys of one tenant.

Keys, all ``sala:...:{tenant}``:

1. ``limits``, a hash: ``at`` (ms), and what is used of each limit then. The limits a minute are token buckets:
   what is used of them shrinks by ``limit / 60000`` a millisecond. ``flight`` and ``long`` are sums over (2).
2. ``held``, a hash: reservation id to ``input:output:flight:long:day:date``, or to ``done`` for a while after
   its end, so that a step that is sent twice counts once.
3. ``leases``, a sorted set: reservation id by the millisecond at which its entry in (2) ends.
4. ``usage``, the beginning of the names of the hashes of what was used on each day.

A tenant's keys are read and written by these scripts only.
"""

from __future__ import annotations

DONE_MS = 120_000
"""How long a finished reservation is remembered; longer than a step may be repeated."""
USAGE_DAYS = 40

_PRELUDE = """
local buckets, held, leases, usage = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local now, lease = tonumber(ARGV[1]), tonumber(ARGV[2])
if now == 0 then
  local time = redis.call('TIME')
  now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
end
local date = math.floor(now / 86400000)
local limit = {
  requests = tonumber(ARGV[3]), input = tonumber(ARGV[4]), output = tonumber(ARGV[5]),
  flight = tonumber(ARGV[6]), long = tonumber(ARGV[7]), day = tonumber(ARGV[8])
}
local stored = redis.call('HMGET', buckets, 'at', 'date', 'requests', 'input', 'output', 'flight', 'long', 'day')
local used = {
  requests = tonumber(stored[3] or 0), input = tonumber(stored[4] or 0), output = tonumber(stored[5] or 0),
  flight = tonumber(stored[6] or 0), long = tonumber(stored[7] or 0), day = tonumber(stored[8] or 0)
}
if tonumber(stored[2] or date) ~= date then used.day = 0 end
local elapsed = math.max(0, now - tonumber(stored[1] or now))
for _, name in ipairs({'requests', 'input', 'output'}) do
  if limit[name] then used[name] = math.max(0, used[name] - elapsed * limit[name] / 60000) end
end

local function exact(number) return string.format('%.17g', number) end
local function whole(number) return string.format('%.0f', number) end

local function count(requests)
  if limit.requests then used.requests = used.requests + requests end
end
local function add(input, output, day)
  if limit.input then used.input = math.max(0, used.input + input) end
  if limit.output then used.output = math.max(0, used.output + output) end
  used.day = math.max(0, used.day + day)
end
local function read(record)
  local parts = {}
  for part in string.gmatch(record, '[^:]+') do parts[#parts + 1] = tonumber(part) end
  return {
    input = parts[1], output = parts[2], flight = parts[3], long = parts[4],
    day = parts[6] == date and parts[5] or 0
  }
end
local function release(record)
  used.flight = math.max(0, used.flight - record.flight)
  used.long = math.max(0, used.long - record.long)
end
local function hold(id, input, output, flight, long, day)
  count(1)
  add(input, output, day)
  used.flight = used.flight + flight
  used.long = used.long + long
  local record = {whole(input), whole(output), whole(flight), whole(long), whole(day), whole(date)}
  redis.call('HSET', held, id, table.concat(record, ':'))
  redis.call('ZADD', leases, whole(now + lease), id)
end
local function finish(id)
  redis.call('HSET', held, id, 'done')
  redis.call('ZADD', leases, whole(now + DONE_MS), id)
end

local expired = 0
for _, id in ipairs(redis.call('ZRANGEBYSCORE', leases, '-inf', whole(now), 'LIMIT', 0, 100)) do
  local text = redis.call('HGET', held, id)
  if text and text ~= 'done' then
    local record = read(text)
    release(record)
    add(-record.input, -record.output, -record.day)
    expired = expired + 1
  end
  redis.call('HDEL', held, id)
  redis.call('ZREM', leases, id)
end

local function save()
  redis.call('HSET', buckets, 'at', whole(now), 'date', whole(date), 'requests', exact(used.requests),
    'input', exact(used.input), 'output', exact(used.output), 'flight', whole(used.flight),
    'long', whole(used.long), 'day', whole(used.day))
  for _, key in ipairs({buckets, held, leases}) do redis.call('PEXPIRE', key, 172800000) end
end
local function answer(refused_by, wait)
  return {refused_by, whole(wait), whole(now), whole(expired), exact(used.requests), exact(used.input),
    exact(used.output), whole(used.flight), whole(used.long), whole(used.day)}
end
""".replace("DONE_MS", str(DONE_MS))

RESERVE = (
    _PRELUDE
    + """
local id = ARGV[9]
local input, output = tonumber(ARGV[10]), tonumber(ARGV[11])
local flight, long, day = tonumber(ARGV[12]), tonumber(ARGV[13]), tonumber(ARGV[14])
if redis.call('HEXISTS', held, id) == 1 then
  save()
  return answer('repeated', 0)
end
local refused_by, wait = '', 0
local function refuse(name, needed)
  if refused_by == '' then refused_by = name end
  wait = math.max(wait, needed)
end
if limit.day and used.day + day > limit.day then refuse('day', (date + 1) * 86400000 - now) end
for i, name in ipairs({'requests', 'input', 'output'}) do
  local amount = ({1, input, output})[i]
  -- a millionth of a token is what floating point may be off by
  local missing = limit[name] and used[name] + amount - limit[name] - 1e-6 or 0
  if missing > 0 then refuse(name, math.ceil(missing * 60000 / limit[name])) end
end
if limit.flight and used.flight + flight > limit.flight then refuse('flight', 0) end
if limit.long and used.long + long > limit.long and long > 0 then refuse('long', 0) end
if refused_by == '' then hold(id, input, output, flight, long, day) end
save()
return answer(refused_by, wait)
"""
)
"""Take all of a claim or nothing. Refused: by which limit, and ms until the buckets would admit it."""

SETTLE = (
    _PRELUDE
    + """
local id = ARGV[9]
local input, output, day = tonumber(ARGV[10]), tonumber(ARGV[11]), tonumber(ARGV[12])
local text = redis.call('HGET', held, id)
if text ~= 'done' then
  if text then
    local record = read(text)
    release(record)
    add(input - record.input, output - record.output, day - record.day)
  else
    count(tonumber(ARGV[13]))
    add(input, output, day)
  end
  finish(id)
  local key = usage .. whole(date)
  for i, name in ipairs({'requests', 'prompt_tokens', 'cached_tokens', 'completion_tokens'}) do
    redis.call('HINCRBY', key, name, ARGV[12 + i])
  end
  redis.call('EXPIRE', key, USAGE_S)
end
save()
return answer('', 0)
""".replace("USAGE_S", str(USAGE_DAYS * 86400))
)
"""Replace what was reserved by what was used. One that Redis does not know is charged whole: it expired, was
granted by a replica on its own, or Redis lost it."""

REFUND = (
    _PRELUDE
    + """
local id = ARGV[9]
local text = redis.call('HGET', held, id)
if text ~= 'done' then
  if text then
    local record = read(text)
    release(record)
    add(-record.input, -record.output, -record.day)
  end
  finish(id)
end
save()
return answer('', 0)
"""
)
"""Give tokens back; the request stays counted. One that Redis does not know is marked as done, so that its
reservation finds that when it comes late."""

RENEW = (
    _PRELUDE
    + """
for i = 9, #ARGV, 6 do
  local id = ARGV[i]
  local text = redis.call('HGET', held, id)
  if not text then
    hold(id, tonumber(ARGV[i + 1]), tonumber(ARGV[i + 2]), tonumber(ARGV[i + 3]), tonumber(ARGV[i + 4]),
      tonumber(ARGV[i + 5]))
  elseif text ~= 'done' then
    redis.call('ZADD', leases, whole(now + lease), id)
  end
end
save()
return answer('', 0)
"""
)
"""Lengthen leases; reservations that Redis does not know are entered, whatever the limits say by now."""

PEEK = (
    _PRELUDE
    + """
save()
return answer('', 0)
"""
)
"""What is used now."""
