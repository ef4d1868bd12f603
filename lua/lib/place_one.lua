-- place_one: the ordinary dispatch, as nearly all are: one new request, nothing that ends, one rank that is the choice. It
-- does what the general rule would, with half the calls. Where anything is out of the ordinary it returns nothing and
-- has changed nothing, and the general rule decides.
local function least_loaded()
  local rank, load, _, next_load = unpack(call('ZRANGE', loads, '0', '1', 'WITHSCORES'))
  if load ~= next_load then return rank, load end
end

local function place_one(deadline, lives, rank, load, index)
  if not rank then return end
  local dispatcher, _, id, tokens, request_id = unpack(ARGV)
  local record = rank .. ' ' .. tokens .. ' ' .. lives .. ' ' .. dispatcher .. ' ' .. request_id
  if call('HSETNX', bookings, id, record) == 0 then return end

  local timed = try('ZADD', deadlines, decimal(deadline), id)
  local flying = try('HINCRBY', in_flight, rank, tokens)
  local queued = try('HINCRBY', in_flight_requests, rank, '1')
  local loaded = try('ZADD', loads, decimal(load + tokens), rank)
  if type(timed) == 'table' or type(flying) == 'table' or type(queued) == 'table' or type(loaded) == 'table' then
    -- a key or value is not ours
    if type(timed) ~= 'table' then call('ZREM', deadlines, id) end
    if type(flying) ~= 'table' then call('HINCRBY', in_flight, rank, '-' .. tokens) end
    if type(queued) ~= 'table' then call('HINCRBY', in_flight_requests, rank, '-1') end
    if type(loaded) ~= 'table' then call('ZADD', loads, decimal(load), rank) end
    call('HDEL', bookings, id)
    return
  end
  if index then index() end
  if queued == 1 then end_with_pool() end  -- else there are older bookings, and the keys are not new
  return {'dispatched', 0, 'placed', rank, load}
end
