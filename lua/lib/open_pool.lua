-- open_pool: the settings of a pool that has none, written once. The defaults live here only. A pool without settings is no
-- pool: where somebody has deleted them, the rest goes too, and engines join again by their next report.
local function open_pool()
  if call('HEXISTS', pool, 'schema') == 1 then return end
  call('UNLINK', engines, leases, loads, holding, requests, in_flight, in_flight_requests, bookings, deadlines,
    capacity, queues, pressure)
  call('HSET', pool, 'schema', SCHEMA, 'policy', 'envelope',
    'engine_lease_ms', '5000', 'booking_lease_ms', '60000', 'forget_ms', '3600000',
    'when_silent', 'refuse', 'when_full', 'refuse', 'slow_start_ms', '0', 'weights', 'equal', 'lives', '0')
end
