-- begin_life: an engine becomes known, by joining or by a report that Redis did not expect. Whatever earlier lives left
-- on the same ranks goes; the ranks start empty, eligible once they enter the loads index. The life's number is Redis'
-- time in ms, or more: the pool never gives one twice, whatever its clock does. It is the epoch of a life that has none.
local function begin_life(engine, capacity_tokens, now)
  for _, other in ipairs(overlapping(engine.name)) do remove_engine(other) end
  local last_life = tonumber(call('HGET', pool, 'last_life')) or 0
  engine.life = math.max(now, last_life + 1, engine.epoch or 0)
  engine.epoch = engine.epoch or engine.life
  call('HSET', pool, 'last_life', decimal(engine.life))
  local zeros, limits = {}, {}
  for _, rank in ipairs(ranks_of(engine)) do
    zeros[#zeros + 1], limits[#limits + 1] = rank, rank
    zeros[#zeros + 1], limits[#limits + 1] = '0', capacity_tokens
    lives[rank] = engine.life
  end
  for _, key in ipairs({holding, requests, in_flight, in_flight_requests}) do
    call('HSET', key, unpack(zeros))
  end
  if capacity_tokens ~= '0' then call('HSET', capacity, unpack(limits)) end
end
