-- why_none: the reason for which no rank may be chosen. Linear in the engines.
local function why_none()
  local reason = 'nobody_joined'
  for _, name in ipairs(call('HKEYS', engines)) do
    if may_see(name) then
      if read_engine(name).state == 'up' then return 'all_draining' end
      reason = 'all_silent'
    end
  end
  return reason
end

-- no_pool: the whole reply of a dispatch to a pool that nobody has opened. Nothing is written.
local function no_pool()
  local reply = {'dispatched', 0}
  for _ = 4, #ARGV, 3 do
    for _, field in ipairs({'no_rank', 'nobody_joined', '0'}) do reply[#reply + 1] = field end
  end
  return reply
end
