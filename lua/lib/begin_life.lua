-- begin_life: an engine becomes known, by joining or by a report that Redis did not expect. Whatever earlier lives left
-- on the same ranks goes; the ranks start empty, eligible once they enter the loads index. Lives are counted, so that a
-- booking of an earlier one is known. An epoch is Redis' time in ms, or more: the pool never gives one twice, whatever its
-- clock does, and an epoch means something to a Redis that has lost its data.
local function begin_life(engine, capacity_tokens, now)
  local earlier = overlapping(engine.name)
  engine.life = call('HINCRBY', pool, 'lives', 1)
  withdraw_ordinary()
  if call('ZCARD', queues) == 0 then call('HDEL', pool, 'queue_sums') end  -- its time is over, or nobody is left in it
  for _, other in ipairs(earlier) do remove_engine(other) end
  local last_epoch = tonumber(call('HGET', pool, 'last_epoch')) or 0
  engine.epoch = engine.epoch or math.max(now, last_epoch + 1)
  call('HSET', pool, 'last_epoch', decimal(math.max(last_epoch, engine.epoch)))
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
