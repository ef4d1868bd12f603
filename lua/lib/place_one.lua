-- place_one: the request of a dispatch of one is booked on `rank`, a block of dispatch. It does what the general way would,
-- with half the calls, and sets `booked` to the requests in flight there. Where the request is booked already, or a key or
-- value is not ours, it has changed nothing, and the general way decides.
local dispatcher, _, id, tokens, request_id = unpack(ARGV)
local record = rank .. ' ' .. tokens .. ' ' .. lives .. ' ' .. dispatcher .. ' ' .. request_id
if call('HSETNX', bookings, id, record) == 1 then
  local timed = tonumber(try('ZADD', deadlines, decimal(now + lease_ms), id))  -- nil for an error, which is a table
  local flying = tonumber(try('HINCRBY', in_flight, rank, tokens))
  local queued = tonumber(try('HINCRBY', in_flight_requests, rank, '1'))
  local loaded = tonumber(try('ZADD', loads, decimal(load + tokens), rank))
  if not (timed and flying and queued and loaded) then
    if timed then call('ZREM', deadlines, id) end
    if flying then call('HINCRBY', in_flight, rank, '-' .. tokens) end
    if queued then call('HINCRBY', in_flight_requests, rank, '-1') end
    if loaded then call('ZADD', loads, decimal(load), rank) end
    call('HDEL', bookings, id)
  else
    booked = queued
    if score then
      call('ZADD', queues, decimal(score), rank)
      call('HSET', pool, 'queue_sums', sums, 'largest', string.format('%.17g', largest))
    end
  end
end
