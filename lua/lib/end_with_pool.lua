-- end_with_pool: new bookings and deadlines keys end when the pool's other keys do, see keep_alive.
local function end_with_pool()
  if call('PTTL', bookings) < 0 then
    local ttl = call('PTTL', engines)
    call('PEXPIRE', bookings, ttl)
    call('PEXPIRE', deadlines, ttl)
  end
end
