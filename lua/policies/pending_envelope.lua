-- pending_envelope: the envelope among ranks with no prompt ahead, for unified engines. A step lasts as long as its longest
-- chunk of prefill, so no prompt should wait behind another while a rank has none: among the ranks with the fewest tokens
-- in flight, which are prompts that no engine has reported yet, the one that the envelope chooses.
--
--   k  height above the mean, in largest prompts of late
local function pending_envelope(batch)
  local k = parameter('pending_envelope.k', 0.25)
  check_types()
  look_closely(true)
  note_largest(batch)
  return function(request)
    local places, lowest = {}, math.huge
    for place, seen in ipairs(view) do
      local pending = seen.in_flight / seen.weight
      if pending < lowest then places, lowest = {place}, pending
      elseif pending == lowest then places[#places + 1] = place end
    end
    return envelope_among(places, request, k * request.largest, math.huge)
  end
end
