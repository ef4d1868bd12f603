-- minimum_requests: the shortest queue, requests held + in flight, whatever their size. Right where all prompts are alike.
local function minimum_requests()
  look_closely()
  return function(request)
    return least(request, function(seen) return (seen.requests + 1) / seen.weight end)
  end
end
