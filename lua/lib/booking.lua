-- booking: the record of one in-flight id as text that a person can read, and back:
--   e0/3 812 1790000000000 gateway-7 req-1: rank, tokens, life, dispatcher, request id
-- It counts only for the life of the rank's engine in which it was made; when that has ended, it counts for nobody.
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
  return rank, tonumber(tokens), tonumber(life) == life_of(rank)
end

local function booking_record(request, rank, dispatcher)
  local life = life_of(rank) or error('CORRUPT loads lists ' .. rank .. ', which no engine reports')
  return table.concat({rank, decimal(request.tokens), decimal(life), dispatcher, request.request_id}, ' ')
end
