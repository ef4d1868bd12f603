-- keep_alive: an abandoned pool ends by itself. All its keys but the settings live for two forget_ms and a
-- booking's lease after the last report; they are renewed together, when a forget_ms of that has passed or one of them is new.
local function keep_alive()
  local forget_ms, booking_lease_ms = unpack(call('HMGET', pool, 'forget_ms', 'booking_lease_ms'))
  local left_ms = forget_ms + booking_lease_ms
  local is_due = call('PTTL', loads) < left_ms or call('PTTL', engines) < left_ms
  if is_due or call('PTTL', capacity) == -1 or call('PTTL', queues) == -1 or call('PTTL', pressure) == -1 then
    for _, key in ipairs({engines, leases, loads, holding, requests, in_flight, in_flight_requests,
      bookings, deadlines, capacity, queues, pressure}) do
      call('PEXPIRE', key, decimal(left_ms + forget_ms))
    end
  end
end
