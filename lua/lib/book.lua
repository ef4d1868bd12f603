-- book: placed requests enter the in-flight set on the ranks chosen for them; `timed` lists deadline and id, for these
-- and for bookings that are repeated.
local function book(placed, timed, dispatcher, lives)
  if #placed > 0 and not tonumber(lives) then error('CORRUPT the pool has not counted its lives') end
  local of_all = ' ' .. tostring(lives) .. ' ' .. dispatcher .. ' '  -- see booking
  local records, tokens, count = {}, {}, {}
  for i, request in ipairs(placed) do
    local rank = request.rank
    records[2 * i - 1] = request.id
    records[2 * i] = rank .. ' ' .. ARGV[request.at + 1] .. of_all .. ARGV[request.at + 2]
    tokens[rank] = (tokens[rank] or 0) + request.tokens
    count[rank] = (count[rank] or 0) + 1
  end
  add_in_flight(tokens, count)
  if #timed > 0 then call('ZADD', deadlines, unpack(timed)) end
  if #placed == 0 then return end
  call('HSET', bookings, unpack(records))
  end_with_pool()
end
