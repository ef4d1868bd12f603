-- now_ms: Redis' own clock, in whole ms. No other clock counts.
local function now_ms()
  local time = call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end
