-- end_leases: what silence means. An engine whose lease has ended leaves the loads index; silent for forget_ms more,
-- it is removed. Returns true where every eligible rank is silent and the pool says to use the last known ones:
-- then they stay. Linear in the engines that have just fallen silent; each falls silent once.
local function end_leases(now)
  local due = call('ZRANGEBYSCORE', leases, '-inf', decimal(now))
  if #due == 0 then return false end
  check_types()
  local forget_ms, when_silent = unpack(call('HMGET', pool, 'forget_ms', 'when_silent'))
  local fallen, ranks_fallen = {}, 0
  for _, name in ipairs(due) do
    local engine = read_engine(name)
    if not engine then
      call('ZREM', leases, name)
    elseif engine.state == 'silent' then
      remove_engine(engine)
    else
      fallen[#fallen + 1] = engine
      for _, rank in ipairs(ranks_of(engine)) do
        if not drains(engine, rank) then ranks_fallen = ranks_fallen + 1 end
      end
    end
  end
  if when_silent == 'last_known' and ranks_fallen == call('ZCARD', loads) then return ranks_fallen > 0 end
  for _, engine in ipairs(fallen) do
    leave_loads(engine)
    engine.state = 'silent'
    write_engine(engine)
    call('ZADD', leases, decimal(now + forget_ms), engine.name)
  end
  return false
end
