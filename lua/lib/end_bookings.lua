-- end_bookings: bookings leave the in-flight set, by acknowledgement, release or deadline; unknown ids, and ids named
-- twice, are no error, so that every end may be repeated. At most MOST_ENDED ids at a time. Returns how many there were.
local MOST_ENDED = 1000

local function end_bookings(ids)
  if #ids == 0 then return 0 end
  local tokens, count, ended, seen = {}, {}, {}, {}
  for i, record in ipairs(call('HMGET', bookings, unpack(ids))) do
    if record and not seen[ids[i]] then
      local rank, booked, counts = read_booking(record)
      if counts then
        tokens[rank] = (tokens[rank] or 0) - booked
        count[rank] = (count[rank] or 0) - 1
      end
      seen[ids[i]] = true
      ended[#ended + 1] = ids[i]
    end
  end
  if #ended == 0 then return 0 end
  add_in_flight(tokens, count)
  call('ZREM', deadlines, unpack(ended))
  return call('HDEL', bookings, unpack(ended))
end
