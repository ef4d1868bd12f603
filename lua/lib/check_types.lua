-- check_types: raises WRONGTYPE before anything is written where one of the pool's keys is not ours. Redis undoes
-- nothing, so a script that writes has read every key first, or calls this.
local function check_types()
  for _, key in ipairs({pool, engines, holding, requests, in_flight, in_flight_requests, bookings, capacity}) do
    call('HLEN', key)
  end
  for _, key in ipairs({leases, loads, deadlines}) do call('ZCARD', key) end
end
