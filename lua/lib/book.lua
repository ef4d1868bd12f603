-- book: placed requests enter the in-flight set on the ranks chosen for them; with them, bookings that are repeated begin
-- their lease anew.
local function book(placed, repeated, deadline, dispatcher, lives)
  if #placed > 0 and not tonumber(lives) then error('CORRUPT the pool has not counted its lives') end
  local of_all = ' ' .. tostring(lives) .. ' ' .. dispatcher .. ' '  -- what all records share, see booking
  local records, timed, tokens, count = {}, {}, {}, {}
  for i, id in ipairs(repeated) do timed[2 * i - 1], timed[2 * i] = deadline, id end
  local before = #timed
  for i, request in ipairs(placed) do
    local rank, id, at = request.rank, request.id, 2 * i
    records[at - 1], records[at] = id, rank .. ' ' .. ARGV[request.at + 1] .. of_all .. ARGV[request.at + 2]
    timed[before + at - 1], timed[before + at] = deadline, id
    tokens[rank] = (tokens[rank] or 0) + request.tokens
    count[rank] = (count[rank] or 0) + 1
  end
  add_in_flight(tokens, count)
  if #timed > 0 then call('ZADD', deadlines, unpack(timed)) end
  if #placed == 0 then return end
  call('HSET', bookings, unpack(records))
  end_with_pool()
end
