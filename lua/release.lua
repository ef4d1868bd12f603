-- release: the dispatcher ends bookings that no engine will acknowledge: the send failed, the client is gone, or an
-- engine without a hook has finished. Ids that are not booked are passed over, so a release may be repeated without harm.
--
-- KEYS     the pool's, in the order of lib/keys.lua
-- ARGV     in-flight ids, at most MOST_ENDED
-- RETURNS  {'released', bookings ended} or {'newer_schema', schema}
--@include keys, check_types, decimal, queue_sums, index_queues, booking, add_in_flight, end_bookings, newer_schema
local refusal = newer_schema()
if refusal then return refusal end
check_types()
return {'released', end_bookings(ARGV)}
