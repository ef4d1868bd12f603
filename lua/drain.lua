-- drain: an engine, or one of its ranks, takes no new requests, or takes them again (undrain). What it holds and what is
-- in flight to it stays. A new life of the engine begins undrained. Repeating changes nothing.
--
-- KEYS     the pool's, in the order of lib/keys.lua
-- ARGV     verb         text  'drain' or 'undrain'
--          engine_name  text  of the engine
--          index        text  the rank's index, or empty for all of the engine's ranks
-- RETURNS  {'drained' or 'undrained', ranks now eligible in the pool}, {'unknown_rank'} or {'newer_schema', schema}
--@include keys, check_types, decimal, queue_sums, index_queues, engine_record, eligible, newer_schema, keep_alive
local verb, engine_name, index = unpack(ARGV)

-- with_index: the list of draining indices with one added or taken away.
local function with_index(engine)
  local listed = {}
  for _, rank in ipairs(ranks_of(engine)) do
    local at = string.match(rank, '%d+$')
    if at == index and verb == 'drain' or at ~= index and drains(engine, rank) then listed[#listed + 1] = at end
  end
  if #listed == engine.size then return 'all' end
  return #listed == 0 and '-' or table.concat(listed, ',')
end

local refusal = newer_schema()
if refusal then return refusal end
check_types()
if call('HEXISTS', pool, 'schema') == 0 then return {'unknown_rank'} end
local found = false
for _, name in ipairs(call('HKEYS', engines)) do
  local engine = read_engine(name)
  local whole = name == engine_name
  local alone = string.sub(name, 1, #engine_name + 1) == engine_name .. '/'
  local has_index = index == '' or alone and name == engine_name .. '/' .. index
    or whole and tonumber(index) < engine.size
  if (whole or alone) and has_index then
    found = true
    if index == '' then
      engine.draining = verb == 'drain' and 'all' or '-'
    else
      engine.draining = with_index(engine)
    end
    write_engine(engine)
    if engine.state == 'up' then enter_loads(engine) end
  end
end
if not found then return {'unknown_rank'} end
keep_alive()
return {verb == 'drain' and 'drained' or 'undrained', call('ZCARD', loads)}
