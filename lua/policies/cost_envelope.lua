-- cost_envelope: an envelope over what a rank costs a step, requests included. The cost is its tokens and request_tokens
-- for each of its requests. Within the envelope, of the ranks with at most `slack` requests more than the fewest, the
-- dearest: what is left low is kept for giants. Where nobody fits: the rank that costs least.
--
--   k               height above the mean, in largest prompts of late
--   request_tokens  tokens that cost as much as one request: 900 to 2,200
--   slack           requests more than the fewest, and as good
local function cost_envelope(batch)
  local k, slack = parameter('cost_envelope.k', 0.25), parameter('cost_envelope.slack', 2)
  local request_tokens = parameter('cost_envelope.request_tokens', 1500)
  check_types()
  look_closely()
  note_largest(batch)
  local function cost_of(seen) return (seen.load + request_tokens * seen.requests) / seen.weight end
  return function(request)
    local most, total, fewest = 0, 0, math.huge
    for _, seen in ipairs(view) do most, total = math.max(most, cost_of(seen)), total + cost_of(seen) end
    local ceiling = math.min(most, total / #view + k * request.largest)
    local fitting = {}
    for place, seen in ipairs(view) do
      if cost_of(seen) + (request.tokens + request_tokens) / seen.weight <= ceiling then
        fitting[#fitting + 1], fewest = place, math.min(fewest, seen.requests / seen.weight)
      end
    end
    if #fitting == 0 then return least(request, cost_of) end
    local best
    for _, place in ipairs(fitting) do
      local one, other = view[place], view[best]
      local is_dearer = not best or cost_of(one) > cost_of(other) or cost_of(one) == cost_of(other) and one.rank < other.rank
      if is_dearer and one.requests / one.weight <= fewest + slack then best = place end
    end
    return best
  end
end
