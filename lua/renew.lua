-- renew: bookings that their dispatcher still needs, on engines that acknowledge nothing: their leases begin anew, and each
-- counts with the tokens that its request has by now. Ids that are not booked, or whose engine has begun another life, are
-- passed over. Repeating changes nothing but the lease.
--
-- KEYS     the pool's, in the order of lib/keys.lua
-- ARGV     for each booking: id (63-bit decimal), tokens (1 to 2^31 - 1)
-- RETURNS  {'renewed', 1 or 0 for each} or {'newer_schema', schema}
--@include keys, check_types, newer_schema, now_ms, decimal, ordinary, queues, booking, add_in_flight
local refusal = newer_schema()
if refusal then return refusal end
check_types()
local now = now_ms()
local from = read_ordinary()
if from and now < from then withdraw_ordinary() end

local ids, reply, records, timed, tokens, count = {}, {'renewed'}, {}, {}, {}, {}
for at = 1, #ARGV, 2 do ids[#ids + 1] = ARGV[at] end
local found, seen = call('HMGET', bookings, unpack(ids)), {}
local lease_ms = call('HGET', pool, 'booking_lease_ms')  -- none: there is no pool
for i, id in ipairs(ids) do
  local rank, booked, counts
  if found[i] and lease_ms then rank, booked, counts = read_booking(seen[id] or found[i]) end
  if counts then
    seen[id] = string.gsub(seen[id] or found[i], ' %d+', ' ' .. ARGV[2 * i], 1)
    records[#records + 1], records[#records + 2] = id, seen[id]
    timed[#timed + 1], timed[#timed + 2] = decimal(now + lease_ms), id
    tokens[rank], count[rank] = (tokens[rank] or 0) + ARGV[2 * i] - booked, 0
  end
  reply[i + 1] = counts and 1 or 0
end
if #records == 0 then return reply end
add_in_flight(tokens, count)
call('ZADD', deadlines, unpack(timed))
call('HSET', bookings, unpack(records))
return reply
