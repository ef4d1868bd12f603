-- keep_alive: an abandoned pool ends by itself. All its keys but the settings live for two forget_ms after the last
-- report; they are renewed together, when half of that has passed or one of them is new.
local function keep_alive()
  local forget_ms = tonumber(call('HGET', pool, 'forget_ms'))
  local is_due = call('PTTL', loads) < forget_ms or call('PTTL', engines) < forget_ms
  if is_due or call('PTTL', capacity) == -1 or call('PTTL', queues) == -1 then
    for _, key in ipairs({engines, leases, loads, holding, requests, in_flight, in_flight_requests,
      bookings, deadlines, capacity, queues}) do
      call('PEXPIRE', key, 2 * forget_ms)
    end
  end
end
