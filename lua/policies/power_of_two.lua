-- power_of_two: of two ranks drawn by chance the one with less load in tokens. What a dispatcher with an old view does
-- well to do; with this exact one, minimum_tokens is better. The chance is the request id's, as in random.
local function power_of_two()
  look_at_all()
  return function(request)
    if #view == 1 then return 1 end
    local turn = turn_of(request)
    local one = turn % #view
    local other = (one + 1 + math.floor(turn / #view) % (#view - 1)) % #view
    return least(request, function(seen) return (seen.load + request.tokens) / seen.weight end, {one + 1, other + 1})
  end
end
