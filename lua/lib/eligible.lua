-- enter_loads, leave_loads: which ranks dispatch may choose. The loads index holds exactly those whose engine's
-- lease is fresh and which are not draining, each by holding + in-flight tokens; `held` are the former where the
-- caller is about to write them: then it indexes the queues when it has.
local function enter_loads(engine, held)
  local ranks = ranks_of(engine)
  local flying = call('HMGET', in_flight, unpack(ranks))
  local counts = held or call('HMGET', holding, unpack(ranks))
  local entering, leaving = {}, {}
  for i, rank in ipairs(ranks) do
    if drains(engine, rank) then
      leaving[#leaving + 1] = rank
    else
      entering[#entering + 1] = decimal((counts[i] or 0) + (flying[i] or 0))
      entering[#entering + 1] = rank
    end
  end
  if #entering > 0 then call('ZADD', loads, unpack(entering)) end
  if #leaving > 0 then call('ZREM', loads, unpack(leaving)) end
  if not held then index_queues(ranks) end
end

local function leave_loads(engine)
  local ranks = ranks_of(engine)
  call('ZREM', loads, unpack(ranks))
  index_queues(ranks)
end
