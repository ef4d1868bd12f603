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
--          or {'newer_schema', schema} or {'unknown_pool'}
--@include keys, now_ms, decimal, ordinary_note, scope
local now = now_ms()
-- The short way: one request and no loads. In blocks and not in functions: to make those is half a booking.
if #ARGV == 5 and string.sub(ARGV[2], 1, 1) == '0' then
  local schema, note, sums, largest = unpack(call('HMGET', pool, 'schema', 'ordinary', 'queue_sums', 'largest'))
  local from, until_ms, lease_ms, lives, policy, k = string.match(note or '', ORDINARY)
  if from and tonumber(schema) == SCHEMA and from + 0 <= now and now < until_ms + 0 and (not is_scoped or names_all()) then
    local rank, load, score, booked
    if policy == 'minimum_tokens' then
--@include least_loaded
    else
--@include queue_sums, within_envelope
    end
    if rank then
--@include place_one
    end
    if booked == 1 then  -- else there are older bookings, and the keys are not new
--@include end_with_pool
      end_with_pool()
    end
    if booked then return {'dispatched', 0, 'placed', rank, load} end
  end
end

--@include queue_sums, index_queues, check_types, engine_record, eligible, booking, remove_engine, add_in_flight
--@include end_bookings, end_with_pool, keep_alive, ordinary_from, withdraw_ordinary, end_leases, recall_silent
--@include expire, weights, listed_loads, view, why_none, room, book, parameter, keep_queues, note_ordinary, remember, least
--@include largest, largest_first, policies/*, policies
local EXPIRED_PER_DISPATCH = 16
local dispatcher, want_loads = unpack(ARGV, 1, 2)

local schema, policy, booking_lease_ms, when_full, when_silent, lives =
  unpack(call('HMGET', pool, 'schema', 'policy', 'booking_lease_ms', 'when_full', 'when_silent', 'lives'))
if not schema then  -- what a replica may lack that its primary has: it refuses a write, be it one of nothing
  return call('HDEL', pool, 'schema') and {'unknown_pool'}
end
if tonumber(schema) > SCHEMA then return {'newer_schema', schema} end
local stale = end_leases(now)
expire(now, EXPIRED_PER_DISPATCH + (#ARGV - 2) / 3)
if when_silent == 'last_known' and (stale or call('EXISTS', loads) == 0) then stale = recall_silent(now) end

local reply, ids = {'dispatched', stale and 1 or 0}, {}  -- an answer stands in the reply where its id stands in ARGV
for at = 3, #ARGV, 3 do ids[#ids + 1] = ARGV[at] end
local records = call('HMGET', bookings, unpack(ids))
local batch, first, again, repeated = {}, {}, {}, {}
for i, id in ipairs(ids) do
  local at, rank, _, counts = 3 * i
  if records[i] then rank, _, counts = read_booking(records[i]) end
  reply[at], reply[at + 1], reply[at + 2] = 'no_rank', '', '0'
  if counts then
    reply[at], reply[at + 1], reply[at + 2] = 'repeated', rank, call('ZSCORE', loads, rank) or '0'
    repeated[#repeated + 1] = id
  elseif first[id] then
    again[#again + 1] = at
  else
    first[id] = at
    batch[#batch + 1] = {at = at, id = id, tokens = tonumber(ARGV[at + 1])}
  end
end

largest_first(batch)
read_weights(now)
is_scoped = is_scoped and not names_all()
local reason = #batch > 0 and sees_none() and why_none(now) or nil
local choose = not reason and #batch > 0 and (POLICIES[policy] or envelope)(batch)
local placed = {}
for _, request in ipairs(batch) do
  local at, place = request.at, choose and choose(request)
  place = place and (place_with_room(place, request.tokens) or when_full == 'least_loaded' and 1)
  if place then
    request.rank = view[place].rank
    reply[at], reply[at + 1], reply[at + 2] = 'placed', request.rank, view[place].load
    placed[#placed + 1] = request
    add_to(place, request.tokens)
  else
    reply[at + 1] = reason or 'all_full'
  end
end
for _, at in ipairs(again) do  -- an id twice in one list
  local same = first[ARGV[at]]
  reply[at], reply[at + 1], reply[at + 2] = reply[same], reply[same + 1], reply[same + 2]
  if reply[at] == 'placed' then reply[at] = 'repeated' end
end
book(placed, repeated, decimal(now + booking_lease_ms), dispatcher, lives)
write_remembered()
note_ordinary(now)

local listed = string.sub(want_loads, 1, 1) == '1' and call('ZRANGE', loads, '0', '-1', 'WITHSCORES') or {}
for _, field in ipairs(listed) do reply[#reply + 1] = field end
return reply
