-- renew: requests that are still open keep their bookings: their leases begin anew, and on an engine that does not count
-- itself (no hook) their tokens become what they hold by now. Ids that are not booked, and bookings of an engine's earlier
-- life, are passed over, so that a renewal never books; repeating it only renews the lease.
--
-- KEYS     the pool's, in the order of lib/keys.lua
-- ARGV     id (63-bit decimal), tokens (0 to leave them as they are), for each booking, at most MOST_RENEWED
-- RETURNS  {'renewed', bookings renewed} or {'newer_schema', schema}
--@include keys, check_types, newer_schema, now_ms, decimal, ordinary_note, ordinary_from, withdraw_ordinary
--@include queue_sums, index_queues, booking, add_in_flight
local MOST_RENEWED = 500

local refusal = newer_schema()
if refusal then return refusal end
check_types()
local lease_ms = call('HGET', pool, 'booking_lease_ms')
if not lease_ms or #ARGV == 0 or #ARGV > 2 * MOST_RENEWED then return {'renewed', 0} end

local now, from = now_ms(), ordinary_from()
if from and now < from then withdraw_ordinary() end
local ids = {}
for at = 1, #ARGV, 2 do ids[#ids + 1] = ARGV[at] end
local deadline = decimal(now + lease_ms)
local timed, changed, tokens, count, seen = {}, {}, {}, {}, {}
for i, record in ipairs(call('HMGET', bookings, unpack(ids))) do
  local rank, booked, counts
  if record and not seen[ids[i]] then rank, booked, counts = read_booking(record) end
  if counts then
    local now_held = tonumber(ARGV[2 * i])
    seen[ids[i]] = true
    timed[#timed + 1], timed[#timed + 2] = deadline, ids[i]
    if now_held > 0 and now_held ~= booked then
      changed[#changed + 1] = ids[i]
      changed[#changed + 1] = string.gsub(record, '^(%S+) %d+ ', '%1 ' .. decimal(now_held) .. ' ', 1)
      tokens[rank], count[rank] = (tokens[rank] or 0) + now_held - booked, 0
    end
  end
end
if #timed == 0 then return {'renewed', 0} end
add_in_flight(tokens, count)
if #changed > 0 then call('HSET', bookings, unpack(changed)) end
call('ZADD', deadlines, 'XX', unpack(timed))
return {'renewed', #timed / 2}
