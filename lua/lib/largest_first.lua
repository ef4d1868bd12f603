-- largest_first: the order in which the requests of a list are placed; of equals the one that was named first. Sorted are
-- numbers, size before place, for no function of ours is then called for each comparison.
local PLACES = 1e6  -- more than a script has arguments

local function largest_first(batch)
  if #batch < 2 then return end
  local of, order = {}, {}
  for i, request in ipairs(batch) do
    order[i] = request.at - request.tokens * PLACES
    of[order[i]] = request
  end
  table.sort(order)
  for i, key in ipairs(order) do batch[i] = of[key] end
end
