-- weights: how much of the load a rank should take beside the others; 1 where nobody has said anything. Policies compare
-- what a rank would have divided by its weight. An operator gives them by engine or rank (`weights`: big=2,old/3=0.5);
-- a rank whose engine has joined less than slow_start_ms ago weighs less, growing from a tenth to all of it.
local LEAST_START = 0.1
local weights, starting, is_weighed = {}, {}, false

local function weight_of(rank)
  if not is_weighed then return 1 end
  local engine = string.match(rank, '^[^/]+')
  return (weights[rank] or weights[engine] or 1) * (starting[rank] or starting[engine] or 1)
end

local function read_weights(now)
  local listed, slow_start_ms, last_epoch = unpack(call('HMGET', pool, 'weights', 'slow_start_ms', 'last_epoch'))
  for name, weight in string.gmatch(listed or '', '([^=,]+)=([%d.]+)') do
    weights[name], is_weighed = tonumber(weight), true
  end
  slow_start_ms, last_epoch = tonumber(slow_start_ms) or 0, tonumber(last_epoch) or 0
  if slow_start_ms == 0 or now - last_epoch >= slow_start_ms then return end  -- nobody has joined later than that
  for _, name in ipairs(call('HKEYS', engines)) do
    local share = (now - read_engine(name).epoch) / slow_start_ms
    if share < 1 then starting[name], is_weighed = math.max(LEAST_START, share), true end
  end
end
