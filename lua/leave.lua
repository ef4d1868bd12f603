-- leave: an engine that shuts down takes its ranks with it. Bookings on them count for nobody any more. Leaving again
-- changes nothing; a newer life of the engine is not touched.
--
-- KEYS     the pool's, in the order of lib/keys.lua
-- ARGV     name   text     engine, or engine/index for a rank that reports alone
--          epoch  integer  as given by join
-- RETURNS  {'left'}, {'fenced', epoch} or {'newer_schema', schema}
--@include keys, check_types, decimal, queue_sums, index_queues, engine_record, eligible, booking, remove_engine, newer_schema
local name, epoch = unpack(ARGV)

local refusal = newer_schema()
if refusal then return refusal end
check_types()
local engine = read_engine(name)
if engine and engine.epoch > tonumber(epoch) then return {'fenced', decimal(engine.epoch)} end
if engine then remove_engine(engine) end
return {'left'}
