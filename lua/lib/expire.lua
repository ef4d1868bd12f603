-- expire: bookings past their deadline end, the oldest first, at most `most` at a time; nobody waits for a sweep.
local function expire(now, most)
  local due = call('ZRANGEBYSCORE', deadlines, '-inf', decimal(now), 'LIMIT', '0', most)
  if #due == 0 then return end
  check_types()
  call('HINCRBY', pool, 'expired', end_bookings(due))
end
