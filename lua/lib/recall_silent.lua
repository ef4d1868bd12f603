-- recall_silent: no fresh rank is left and the pool says to use the last known ones: engines that fell silent earlier
-- come back beside the last to fall, their leases ended as they are. Returns whether any rank is eligible now.
local function recall_silent(now)
  for _, name in ipairs(call('HKEYS', engines)) do
    local engine = read_engine(name)
    if engine.state == 'silent' then
      engine.state = 'up'
      write_engine(engine)
      call('ZADD', leases, decimal(now), name)
      enter_loads(engine)
      withdraw_ordinary()
      keep_alive()
    end
  end
  return call('EXISTS', loads) == 1
end
