-- random: any rank, in proportion to its weight, blind to load; a baseline. The chance is the request id's own, so that
-- the same requests on the same pool fall alike.
local function random()
  look_at_all()
  local total = 0
  for _, seen in ipairs(view) do total = total + seen.weight end
  return function(request)
    if not is_weighed then return turn_of(request) % #view + 1 end
    local left = turn_of(request) / TURNS * total
    for place, seen in ipairs(view) do
      left = left - seen.weight
      if left < 0 then return place end
    end
    return #view
  end
end
