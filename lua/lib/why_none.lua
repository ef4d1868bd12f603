-- why_none: the reason for which no rank is eligible. Linear in the engines.
local function why_none()
  local names = call('HKEYS', engines)
  for _, name in ipairs(names) do
    if read_engine(name).state == 'up' then return 'all_draining' end
  end
  return #names == 0 and 'nobody_joined' or 'all_silent'
end

-- no_pool: the whole reply of a dispatch to a pool that nobody has opened. Nothing is written.
local function no_pool()
  local reply = {'dispatched', 0}
  for _ = 3, #ARGV, 3 do
    for _, field in ipairs({'no_rank', 'nobody_joined', '0'}) do reply[#reply + 1] = field end
  end
  return reply
end
