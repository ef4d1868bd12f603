-- booking: the record of one in-flight id as text that a person can read, and back:
--   e0/3 812 7 gateway-7 req-1: rank, tokens, lives begun in the pool by then, dispatcher, request id
-- It counts only for the life of the rank's engine in which it was made: where no later life of that engine has begun.
local lives = {}

-- life_of: the life of the engine that a rank belongs to, or nil.
local function life_of(rank)
  if lives[rank] == nil then
    local record = call('HGET', engines, string.match(rank, '^[^/]+')) or call('HGET', engines, rank)
    if not record then return nil end
    lives[rank] = tonumber(string.match(record, ' life=(%d+) '))
      or error('CORRUPT the record of the engine of ' .. rank .. ' is not one of ours')
  end
  return lives[rank]
end

-- read_booking: rank, tokens, and whether it counts.
local function read_booking(record)
  local rank, tokens, life = string.match(record, '^(%S+) (%d+) (%d+) ')
  if not rank then error('CORRUPT a booking is not one of ours: ' .. record) end
  return rank, tonumber(tokens), tonumber(life) >= (life_of(rank) or math.huge)
end
