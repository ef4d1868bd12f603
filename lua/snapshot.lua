-- snapshot: everything about a pool at one moment, but for the single bookings. Writes nothing. Linear in the ranks.
--
-- KEYS     the pool's, in the order of lib/keys.lua
-- ARGV     none
-- RETURNS  {'snapshot', now (ms), pool, engines, holding, requests, in_flight, in_flight_requests, capacity,
--          bookings counted, {} or {the next booking to end, its deadline (ms)}, pressure}; hashes as flat lists
--          or {'newer_schema', schema} or {'unknown_pool'}
--@include keys, now_ms, newer_schema
local refusal = newer_schema()
if refusal then return refusal end
if call('HEXISTS', pool, 'schema') == 0 then return {'unknown_pool'} end
return {
  'snapshot', now_ms(), call('HGETALL', pool), call('HGETALL', engines), call('HGETALL', holding),
  call('HGETALL', requests), call('HGETALL', in_flight), call('HGETALL', in_flight_requests),
  call('HGETALL', capacity), call('HLEN', bookings), call('ZRANGE', deadlines, '0', '0', 'WITHSCORES'),
  call('HGETALL', pressure),
}
