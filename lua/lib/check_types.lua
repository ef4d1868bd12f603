-- check_types: raises WRONGTYPE before anything is written where one of the pool's keys is not ours, or CORRUPT where a
-- lease is no number. Redis undoes nothing, so a script that writes has read every key first, or calls this.
local function check_types()
  for _, key in ipairs({pool, engines, holding, requests, in_flight, in_flight_requests, bookings, capacity, pressure}) do
    call('HLEN', key)
  end
  for _, key in ipairs({leases, loads, deadlines, queues}) do call('ZCARD', key) end
  local schema, engine_lease_ms, booking_lease_ms, forget_ms =
    unpack(call('HMGET', pool, 'schema', 'engine_lease_ms', 'booking_lease_ms', 'forget_ms'))
  if schema and not (tonumber(engine_lease_ms) and tonumber(booking_lease_ms) and tonumber(forget_ms)) then
    error('CORRUPT the leases in the pool\'s settings are not ours')
  end
end
