-- dispatch: choose a rank for each request of a list and book it there, all in one atomic step.
--
-- A request that is booked already keeps its rank (its lease begins anew), so a dispatch may be repeated without harm.
-- First what has ended ends: silent engines lose their eligibility, up to EXPIRED_PER_DISPATCH + list length old bookings go.
--
-- KEYS     the pool's, in the order of lib/keys.lua
-- ARGV     dispatcher  text    who books
--          want_loads  0 or 1  whether to return the loads of all eligible ranks
--          then for each request: id (63-bit decimal), tokens (1 to 2^31 - 1), request id (text)
-- RETURNS  {'dispatched', stale 0 or 1, {outcome, rank or reason, load before or 0, for each request}, {rank, load, ...}}
--          outcome is 'placed', 'repeated' or 'no_rank'; reason 'nobody_joined', 'all_silent', 'all_draining', 'all_full'
--          or {'newer_schema', schema}
--@include keys, check_types, now_ms, decimal, engine_record, eligible, remove_engine, end_leases, end_bookings, expire, view, room
--@include policies/minimum_tokens, policies/round_robin
local EXPIRED_PER_DISPATCH = 16
local POLICIES = {minimum_tokens = minimum_tokens, round_robin = round_robin}
local dispatcher, want_loads = ARGV[1], ARGV[2]

-- why_none: the reason for which no rank is eligible.
local function why_none()
  local names = call('HKEYS', engines)
  for _, name in ipairs(names) do
    if read_engine(name).state == 'up' then return 'all_draining' end
  end
  return #names == 0 and 'nobody_joined' or 'all_silent'
end

local schema, policy, booking_lease_ms, when_full =
  unpack(call('HMGET', pool, 'schema', 'policy', 'booking_lease_ms', 'when_full'))
if schema and tonumber(schema) > SCHEMA then return {'newer_schema', schema} end
call('HLEN', in_flight)           -- these two are written below and read nowhere: a foreign type shows here,
call('HLEN', in_flight_requests)  -- before anything is written
local now = now_ms()
local stale = end_leases(now)
expire(now, EXPIRED_PER_DISPATCH + (#ARGV - 2) / 3)

local ids = {}
for at = 3, #ARGV, 3 do ids[#ids + 1] = ARGV[at] end
local records = call('HMGET', bookings, unpack(ids))
local outcomes, batch, first, again = {}, {}, {}, {}
for i, id in ipairs(ids) do
  local rank, _, epoch
  if records[i] then rank, _, epoch = read_booking(records[i]) end
  if rank and epoch == epoch_of(rank) then
    call('ZADD', deadlines, decimal(now + booking_lease_ms), id)
    outcomes[i] = {'repeated', rank, call('ZSCORE', loads, rank) or '0'}
  elseif first[id] then
    again[#again + 1] = i
  else
    outcomes[i] = {'no_rank', '', '0'}
    first[id] = outcomes[i]
    batch[#batch + 1] = {id = id, tokens = tonumber(ARGV[3 * i + 1]), request_id = ARGV[3 * i + 2], outcome = outcomes[i]}
  end
end

local reason = #batch > 0 and call('EXISTS', loads) == 0 and why_none() or nil
local choose = not reason and #batch > 0 and (POLICIES[policy] or minimum_tokens)(batch)
local booked, timed, sum, count, after = {}, {}, {}, {}, {}
local deadline = decimal(now + (booking_lease_ms or 0))
for _, request in ipairs(batch) do
  local place = choose and choose(request)
  place = place and (place_with_room(place, request.tokens) or when_full == 'least_loaded' and 1)
  if place then
    local rank, load = view[place].rank, view[place].load
    request.outcome[1], request.outcome[2], request.outcome[3] = 'placed', rank, decimal(load)
    booked[#booked + 1] = request.id
    booked[#booked + 1] = rank .. ' ' .. decimal(request.tokens) .. ' ' .. decimal(epoch_of(rank))
      .. ' ' .. dispatcher .. ' ' .. request.request_id
    timed[#timed + 1] = deadline
    timed[#timed + 1] = request.id
    sum[rank] = (sum[rank] or 0) + request.tokens
    count[rank] = (count[rank] or 0) + 1
    after[rank] = load + request.tokens
    add_to(place, request.tokens)
  else
    request.outcome[2] = reason or 'all_full'
  end
end

for _, i in ipairs(again) do  -- an id twice in one list
  local placed = first[ids[i]]
  outcomes[i] = {placed[1] == 'placed' and 'repeated' or placed[1], placed[2], placed[3]}
end

if #booked > 0 then
  call('HSET', bookings, unpack(booked))
  call('ZADD', deadlines, unpack(timed))
  for rank, tokens in pairs(sum) do
    call('HINCRBY', in_flight_requests, rank, count[rank])
    call('HINCRBY', in_flight, rank, decimal(tokens))
    call('ZADD', loads, decimal(after[rank]), rank)
  end
  if call('PTTL', bookings) < 0 then  -- new keys: they end with the pool, see lib/keep_alive.lua
    local ttl = call('PTTL', engines)
    call('PEXPIRE', bookings, ttl)
    call('PEXPIRE', deadlines, ttl)
  end
end

local flat = {}
for _, outcome in ipairs(outcomes) do
  for _, field in ipairs(outcome) do flat[#flat + 1] = field end
end
local all = want_loads == '1' and call('ZRANGE', loads, '0', '-1', 'WITHSCORES') or {}
return {'dispatched', stale and 1 or 0, flat, all}
