-- begin_epoch: an engine's new life. Whatever an earlier one left on the same ranks goes, in either form (the whole
-- engine, or ranks that report alone); the ranks start empty, eligible once they enter the loads index.
local function begin_epoch(engine, capacity_tokens)
  local name = string.match(engine.name, '^[^/]+')
  local alone = name ~= engine.name
  for _, other in ipairs(call('HKEYS', engines)) do
    local same_form = other == engine.name
    local other_form = alone and other == name or not alone and string.sub(other, 1, #name + 1) == name .. '/'
    if same_form or other_form then remove_engine(read_engine(other)) end
  end
  local zeros, limits = {}, {}
  for _, rank in ipairs(ranks_of(engine)) do
    zeros[#zeros + 1], limits[#limits + 1] = rank, rank
    zeros[#zeros + 1], limits[#limits + 1] = '0', capacity_tokens
    epochs[rank] = engine.epoch
  end
  for _, key in ipairs({holding, requests, in_flight, in_flight_requests}) do
    call('HSET', key, unpack(zeros))
  end
  if capacity_tokens ~= '0' then call('HSET', capacity, unpack(limits)) end
end
