-- configure: what all dispatchers and engines of the pool agree on. Values come checked (balancer/pool_settings.py). A
-- pool that does not exist yet begins with the defaults and these changes. Repeating changes nothing.
--
-- KEYS     the pool's, in the order of lib/keys.lua
-- ARGV     setting, value, setting, value, ...
-- RETURNS  {'configured'} or {'newer_schema', schema}
--@include keys, check_types, newer_schema, open_pool, withdraw_ordinary
local refusal = newer_schema()
if refusal then return refusal end
check_types()
open_pool()
call('HSET', pool, unpack(ARGV))
withdraw_ordinary()
call('HDEL', pool, 'queue_sums')
call('UNLINK', queues)
return {'configured'}
