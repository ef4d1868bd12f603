-- why_none: the reason for which no rank may be chosen. Only an engine whose lease lasts can be said to drain. Linear in the
-- engines, or, where a dispatch names ranks, in the ranks.
local function why_none(now)
  local reason = 'nobody_joined'
  for _, name in ipairs(call('HKEYS', engines)) do
    local engine = read_engine(name)
    local is_theirs = not among
    for _, rank in ipairs(among and ranks_of(engine) or {}) do is_theirs = is_theirs or among[rank] end
    if is_theirs then
      local lease_ends = tonumber(call('ZSCORE', leases, name) or 0)
      if engine.state == 'up' and lease_ends > now then return 'all_draining' end
      reason = 'all_silent'
    end
  end
  return reason
end
