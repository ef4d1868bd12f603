-- place_one: the ordinary dispatch, as nearly all are: one new request, nothing that ends, one rank with the least load.
-- It does what the general rule would, with half the calls. Where anything is out of the ordinary it returns nothing and
-- has changed nothing, and the general rule decides.
local function place_one(dispatcher, id, tokens, request_id)
  local from, until_ms, lease_ms, lives = read_ordinary()
  local now = now_ms()
  if not from or now < from or now >= until_ms then return end
  local rank, load, _, next_load = unpack(call('ZRANGE', loads, '0', '1', 'WITHSCORES'))
  if not rank or load == next_load then return end
  local record = rank .. ' ' .. tokens .. ' ' .. lives .. ' ' .. dispatcher .. ' ' .. request_id
  if call('HSETNX', bookings, id, record) == 0 then return end

  local timed = try('ZADD', deadlines, decimal(now + lease_ms), id)
  local flying = try('HINCRBY', in_flight, rank, tokens)
  local queued = try('HINCRBY', in_flight_requests, rank, '1')
  if type(timed) == 'table' or type(flying) == 'table' or type(queued) == 'table' then  -- a key or value that is not ours
    if type(timed) ~= 'table' then call('ZREM', deadlines, id) end
    if type(flying) ~= 'table' then call('HINCRBY', in_flight, rank, '-' .. tokens) end
    if type(queued) ~= 'table' then call('HINCRBY', in_flight_requests, rank, '-1') end
    call('HDEL', bookings, id)
    return
  end
  call('ZADD', loads, decimal(load + tokens), rank)
  if queued == 1 then end_with_pool() end  -- else there are older bookings, and the keys are not new
  return {'dispatched', 0, 'placed', rank, load}
end
