-- least: the place in the view, or of these places, whose cost is least; of equals, by name, the one whose turn it is.
local function least(request, cost, places)
  local found, lowest = {}, math.huge
  for at = 1, places and #places or #view do
    local place = places and places[at] or at
    local value = cost(view[place])
    if value < lowest then found, lowest = {place}, value
    elseif value == lowest then found[#found + 1] = place end
  end
  if #found == 1 then return found[1] end
  table.sort(found, function(one, other) return view[one].rank < view[other].rank end)
  return found[turn_of(request) % #found + 1]
end
