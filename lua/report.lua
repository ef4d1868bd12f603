-- report: an engine's own counts replace its holding counts, and the bookings that these counts already contain end,
-- in one atomic step. A load is exact at every moment because no other moment lies between the two.
--
-- Repeated on (epoch, step) it changes nothing but the lease. Overtaken by a later step, its received ids are taken and
-- its counts are not. An engine that Redis does not know, or knows in an earlier life (Redis was emptied or restored),
-- joins by its report. What has ended ends, as in dispatch.
--
-- KEYS     the pool's, in the order of lib/keys.lua
-- ARGV     name, size, nonce, address, capacity_tokens  as in join
--          epoch     integer  as given by join
--          step      integer  rising within the epoch
--          then for each rank: holding tokens, requests, pressure (as stored, empty where the engine does not know it);
--          then the received in-flight ids
-- RETURNS  {'applied' or 'repeated' or 'late', bookings ended}, {'fenced', epoch}, {'wrong_size', size}
--          or {'newer_schema', schema}
--@include keys, check_types, newer_schema, now_ms, decimal, queue_sums, index_queues, engine_record, eligible
--@include booking, remove_engine, add_in_flight, end_bookings, end_leases, expire, open_pool, overlapping
--@include ordinary_note, ordinary_from, withdraw_ordinary, begin_life, keep_alive
local EXPIRED_PER_REPORT = 256
local name, size, nonce, address, capacity_tokens, epoch, step = unpack(ARGV, 1, 7)
local FIRST_COUNT = 8
size, epoch, step = tonumber(size), tonumber(epoch), tonumber(step)

local refusal = newer_schema()
if refusal then return refusal end
check_types()
open_pool()
local engine = read_engine(name)
local is_known = engine and engine.epoch == epoch
if is_known and engine.size ~= size then return {'wrong_size', decimal(engine.size)} end
for _, other in ipairs(is_known and {} or overlapping(name)) do
  if other.epoch > epoch then return {'fenced', decimal(other.epoch)} end
end

local now = now_ms()
local from = ordinary_from()
if from and now < from then withdraw_ordinary() end
if not is_known then
  engine = {name = name, epoch = epoch, step = -1, size = size, draining = '-', nonce = nonce, address = address}
  begin_life(engine, capacity_tokens, now)
end

local ended = 0
local ids_from = FIRST_COUNT + 3 * size
for from = ids_from, #ARGV, MOST_ENDED do
  ended = ended + end_bookings({unpack(ARGV, from, math.min(from + MOST_ENDED - 1, #ARGV))})
end
if step < engine.step then return {'late', ended} end

local held, tokens, queued, pressed, unknown = {}, {}, {}, {}, {}
for i, rank in ipairs(ranks_of(engine)) do
  tokens[i] = ARGV[FIRST_COUNT + 3 * i - 3]
  held[2 * i - 1], queued[2 * i - 1] = rank, rank
  held[2 * i], queued[2 * i] = tokens[i], ARGV[FIRST_COUNT + 3 * i - 2]
  local known = ARGV[FIRST_COUNT + 3 * i - 1]
  if known == '' then unknown[#unknown + 1] = rank else pressed[#pressed + 1], pressed[#pressed + 2] = rank, known end
end
enter_loads(engine, tokens)
call('HSET', holding, unpack(held))
call('HSET', requests, unpack(queued))
if #pressed > 0 then call('HSET', pressure, unpack(pressed)) end
if #unknown > 0 then call('HDEL', pressure, unpack(unknown)) end
index_queues(ranks_of(engine))
local outcome = step == engine.step and 'repeated' or 'applied'
engine.state, engine.step, engine.reported_ms = 'up', step, now
write_engine(engine)
call('ZADD', leases, decimal(now + call('HGET', pool, 'engine_lease_ms')), name)
end_leases(now)
expire(now, EXPIRED_PER_REPORT)
keep_alive()
return {outcome, ended}
