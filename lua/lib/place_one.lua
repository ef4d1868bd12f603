-- place_one: the ordinary dispatch, as nearly all are: one new request, nothing due, one rank with the least load and
-- with room. It does what the general rule would, without its lists, at half the cost. Where anything is out of the
-- ordinary it returns nothing and has changed nothing, and the general rule decides.
local function place_one(dispatcher, want_loads, id, tokens, request_id)
  local schema, policy, booking_lease_ms, lives = unpack(call('HMGET', pool, 'schema', 'policy', 'booking_lease_ms', 'lives'))
  local is_plain = tonumber(schema) == SCHEMA and policy == 'minimum_tokens' and booking_lease_ms and want_loads == '0'
  if not is_plain then return end
  local now = now_ms()
  local until_now, deadline = decimal(now), decimal(now + booking_lease_ms)
  if call('ZCOUNT', leases, '-inf', until_now) > 0 or call('ZCOUNT', deadlines, '-inf', until_now) > 0 then return end
  if call('HGET', bookings, id) or call('PTTL', bookings) < 0 then return end
  local rank, load, _, next_load = unpack(call('ZRANGE', loads, '0', '1', 'WITHSCORES'))
  if not rank or load == next_load then return end
  local limit = call('HGET', capacity, rank)
  if limit and load + tokens > tonumber(limit) then return end
  local queued = tonumber(call('HGET', in_flight_requests, rank) or 0)
  if not queued or not tonumber(lives) then return end

  call('HINCRBY', in_flight, rank, tokens)  -- first, for it alone can fail (foreign value): nothing changes then
  call('HSET', in_flight_requests, rank, decimal(queued + 1))
  call('ZADD', loads, decimal(load + tokens), rank)
  call('HSET', bookings, id, rank .. ' ' .. tokens .. ' ' .. lives .. ' ' .. dispatcher .. ' ' .. request_id)
  call('ZADD', deadlines, deadline, id)
  return {'dispatched', 0, 'placed', rank, load}
end
