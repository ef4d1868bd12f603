-- envelope: even numbers of requests below a ceiling in tokens. A step pays for both. Among the ranks that stay within
-- the envelope the one with the fewest requests, of these the fullest. The envelope is the fullest rank's load, but at
-- most k times the largest prompt of late above the mean: a giant gives the others room, and no licence to pile up.
-- Where nobody fits: the rank with the least tokens.
--
--   k  height above the mean, in largest prompts of late
local function envelope_among(places, request, reach, most)
  local tokens = 0
  for _, place in ipairs(places) do tokens = tokens + view[place].load / view[place].weight end
  local ceiling = math.min(most, tokens / #places + reach)
  local best, fewest, fullest
  for _, place in ipairs(places) do
    local seen = view[place]
    local load, queued = seen.load / seen.weight, seen.requests / seen.weight
    local is_better = not best or queued < fewest or queued == fewest and load > fullest
    if is_better and load + request.tokens / seen.weight <= ceiling then best, fewest, fullest = place, queued, load end
  end
  return best or least(request, function(seen) return (seen.load + request.tokens) / seen.weight end, places)
end

local function envelope(batch)
  local k, places = parameter('envelope.k', 0.25), {}
  check_types()
  look_closely()
  note_largest(batch)
  for place = 1, #view do places[place] = place end
  return function(request)
    local most = 0
    for _, seen in ipairs(view) do most = math.max(most, seen.load / seen.weight) end
    return envelope_among(places, request, k * request.largest, most)
  end
end
