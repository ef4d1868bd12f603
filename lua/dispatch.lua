-- dispatch: choose a rank for each request of a list and book it there, all in one atomic step.
--
-- A request that is booked already keeps its rank (its lease begins anew), so a dispatch may be repeated without harm.
-- First what has ended ends: silent engines lose their eligibility, up to EXPIRED_PER_DISPATCH + list length old bookings go.
--
-- KEYS     the pool's, in the order of lib/keys.lua
-- ARGV     dispatcher  text    who books
--          want_loads  0 or 1  whether to return the loads of all eligible ranks; followed, each after a space, by the
--                              ranks among which to choose, where that is not the whole pool, and those to avoid (-e/0)
--          then for each request: id (63-bit decimal), tokens (1 to 2^31 - 1), request id (text)
-- RETURNS  {'dispatched', stale 0 or 1, outcome, rank or reason, load before or 0, the three for each request,
--          then rank, load of each eligible rank where they are wanted}
--          outcome is 'placed', 'repeated' or 'no_rank'; reason 'nobody_joined', 'all_silent', 'all_draining', 'all_full'
--          or {'newer_schema', schema}
--@include keys, now_ms, decimal, ordinary, end_with_pool, place_one
local now, short, from, until_ms, lease_ms, lives, k, sums, largest = now_ms(), #ARGV == 5 and ARGV[2] == '0'
if short then from, until_ms, lease_ms, lives, k, sums, largest = read_ordinary() end
short = from and from <= now and now < until_ms
local reply = short and k == '-' and place_one(now + lease_ms, lives, least_loaded())
if reply then return reply end  -- before the functions of the other ways are made: they cost half a booking

--@include queues, within_envelope
reply = short and k ~= '-' and place_one(now + lease_ms, lives, within_envelope(k, sums, largest))
if reply then return reply end

--@include check_types, engine_record, eligible, booking, remove_engine, add_in_flight, end_bookings
--@include keep_alive, end_leases, recall_silent, expire, weights, scope, view, why_none, room, book, parameter
--@include keep_queues, note_ordinary, remember, least, largest, policies/*, policies
local EXPIRED_PER_DISPATCH = 16
local dispatcher, want_loads = unpack(ARGV, 1, 2)

local schema, policy, booking_lease_ms, when_full, when_silent, lives =
  unpack(call('HMGET', pool, 'schema', 'policy', 'booking_lease_ms', 'when_full', 'when_silent', 'lives'))
if not schema then return no_pool() end
if tonumber(schema) > SCHEMA then return {'newer_schema', schema} end
local stale = end_leases(now)
expire(now, EXPIRED_PER_DISPATCH + (#ARGV - 2) / 3)
if when_silent == 'last_known' and (stale or call('EXISTS', loads) == 0) then stale = recall_silent(now) end

local ids = {}
for at = 3, #ARGV, 3 do ids[#ids + 1] = ARGV[at] end
local records = call('HMGET', bookings, unpack(ids))
local outcomes, batch, first, again, timed = {}, {}, {}, {}, {}
local deadline = decimal(now + booking_lease_ms)
for i, id in ipairs(ids) do
  local rank, _, counts
  if records[i] then rank, _, counts = read_booking(records[i]) end
  if counts then
    outcomes[i] = {'repeated', rank, call('ZSCORE', loads, rank) or '0'}
    timed[#timed + 1], timed[#timed + 2] = deadline, id
  elseif first[id] then
    again[#again + 1] = i
  else
    outcomes[i] = {'no_rank', '', '0'}
    first[id] = outcomes[i]
    batch[#batch + 1] = {
      at = i, id = id, tokens = tonumber(ARGV[3 * i + 1]), request_id = ARGV[3 * i + 2], outcome = outcomes[i],
      turn = turn_of(id),
    }
  end
end

table.sort(batch, function(one, other)  -- placed together, the largest first
  return one.tokens > other.tokens or one.tokens == other.tokens and one.at < other.at
end)
read_weights(now)
look_within(want_loads)
local reason = #batch > 0 and sees_none() and why_none() or nil
local choose = not reason and #batch > 0 and (POLICIES[policy] or envelope)(batch)
local placed = {}
for _, request in ipairs(batch) do
  local place = choose and choose(request)
  place = place and (place_with_room(place, request.tokens) or when_full == 'least_loaded' and 1)
  if place then
    request.rank = view[place].rank
    request.outcome[1], request.outcome[2], request.outcome[3] = 'placed', request.rank, decimal(view[place].load)
    placed[#placed + 1] = request
    timed[#timed + 1], timed[#timed + 2] = deadline, request.id
    add_to(place, request.tokens)
  else
    request.outcome[2] = reason or 'all_full'
  end
end
for _, i in ipairs(again) do  -- an id twice in one list
  local outcome, rank, load = unpack(first[ids[i]])
  outcomes[i] = {outcome == 'placed' and 'repeated' or outcome, rank, load}
end
book(placed, timed, dispatcher, lives)
write_remembered()
note_ordinary(now)

outcomes[#outcomes + 1] = string.sub(want_loads, 1, 1) == '1' and call('ZRANGE', loads, '0', '-1', 'WITHSCORES') or nil
reply = {'dispatched', stale and 1 or 0}
for _, part in ipairs(outcomes) do
  for _, field in ipairs(part) do reply[#reply + 1] = field end
end
return reply
