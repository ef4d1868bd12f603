-- why_none: the reason for which no rank is eligible. Linear in the engines.
local function why_none()
  local names = call('HKEYS', engines)
  for _, name in ipairs(names) do
    if read_engine(name).state == 'up' then return 'all_draining' end
  end
  return #names == 0 and 'nobody_joined' or 'all_silent'
end
