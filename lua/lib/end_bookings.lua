-- end_bookings: bookings leave the in-flight set, by acknowledgement, release or deadline; unknown ids are no error,
-- so that every end may be repeated. At most MOST_ENDED ids at a time. Returns how many there were.
local MOST_ENDED = 1000
local epochs = {}

-- epoch_of: the epoch of the engine that a rank belongs to, or 0. A booking of another epoch counts for nobody.
local function epoch_of(rank)
  if not epochs[rank] then
    local record = call('HGET', engines, string.match(rank, '^[^/]+')) or call('HGET', engines, rank)
    epochs[rank] = record and tonumber(string.match(record, ' epoch=(%d+) ')) or 0
  end
  return epochs[rank]
end

local function read_booking(record)
  local rank, tokens, epoch = string.match(record, '^(%S+) (%d+) (%d+) ')
  if not rank then error('CORRUPT a booking is not one of ours: ' .. record) end
  return rank, tonumber(tokens), tonumber(epoch)
end

local function end_bookings(ids)
  if #ids == 0 then return 0 end
  local tokens, count, ended = {}, {}, {}
  for i, record in ipairs(call('HMGET', bookings, unpack(ids))) do
    if record then
      local rank, booked, epoch = read_booking(record)
      if epoch == epoch_of(rank) then
        tokens[rank] = (tokens[rank] or 0) + booked
        count[rank] = (count[rank] or 0) + 1
      end
      ended[#ended + 1] = ids[i]
    end
  end
  if #ended == 0 then return 0 end
  for rank, sum in pairs(tokens) do
    call('HINCRBY', in_flight_requests, rank, -count[rank])
    call('HINCRBY', in_flight, rank, decimal(-sum))
    call('ZADD', loads, 'XX', 'INCR', decimal(-sum), rank)
  end
  call('ZREM', deadlines, unpack(ended))
  return call('HDEL', bookings, unpack(ended))
end
