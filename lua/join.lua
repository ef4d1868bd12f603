-- join: an engine, or one of its ranks that reports alone, begins a new life; its epoch is given by Redis' clock and
-- fences every earlier one. What earlier lives left on its ranks goes. Joining again with the same nonce changes nothing
-- and returns the same epoch, so a join may be repeated without harm.
--
-- KEYS     the pool's, in the order of lib/keys.lua
-- ARGV     name             text     engine, or engine/index for a rank that reports alone
--          size             integer  ranks it reports
--          nonce            text     tells this life from others
--          address          text     where dispatchers reach it, may be empty
--          capacity_tokens  integer  tokens each rank can hold, 0 for no limit
-- RETURNS  {'joined', epoch (ms)}, {'wrong_size', the size it has joined with} or {'newer_schema', schema}
--@include keys, check_types, newer_schema, now_ms, decimal, queue_sums, index_queues, engine_record, eligible
--@include booking, remove_engine, open_pool, overlapping, withdraw_ordinary, begin_life, keep_alive
local name, size, nonce, address, capacity_tokens = unpack(ARGV)

local refusal = newer_schema()
if refusal then return refusal end
check_types()
open_pool()
local earlier = read_engine(name)
if earlier and earlier.nonce == nonce then
  if earlier.size ~= tonumber(size) then return {'wrong_size', decimal(earlier.size)} end
  return {'joined', decimal(earlier.epoch)}
end

local now = now_ms()
local engine = {
  name = name, state = 'up', step = 0, size = tonumber(size), reported_ms = now, draining = '-', nonce = nonce,
  address = address,
}
begin_life(engine, capacity_tokens, now)
write_engine(engine)
enter_loads(engine)
call('ZADD', leases, decimal(now + call('HGET', pool, 'engine_lease_ms')), name)
keep_alive()
return {'joined', decimal(engine.epoch)}
