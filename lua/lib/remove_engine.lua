-- remove_engine: an engine and its ranks leave every key but the bookings. A booking on them counts for nobody any
-- more (its life is nobody's) and goes at its deadline, so that removing stays cheap however many there are.
local function remove_engine(engine)
  local ranks = ranks_of(engine)
  leave_loads(engine)
  for _, rank in ipairs(ranks) do lives[rank] = nil end
  for _, key in ipairs({holding, requests, in_flight, in_flight_requests, capacity, pressure}) do
    call('HDEL', key, unpack(ranks))
  end
  call('ZREM', leases, engine.name)
  call('HDEL', engines, engine.name)
end
