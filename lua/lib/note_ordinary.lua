-- note_ordinary: see ordinary_note. The end of a dispatch that was not; nothing is due any more, or it is and UNTIL says so.
local HAVE_SHORT_WAY = {['minimum_tokens'] = true, ['envelope'] = true, ['pending_envelope'] = true}

local function note_ordinary(now)
  local from, until_ms = ordinary_from()
  if from and from <= now and now < until_ms then return end
  local policy, lives, booking_ms, engine_ms, forget_ms =
    unpack(call('HMGET', pool, 'policy', 'lives', 'booking_lease_ms', 'engine_lease_ms', 'forget_ms'))
  booking_ms, engine_ms, forget_ms = tonumber(booking_ms), tonumber(engine_ms), tonumber(forget_ms)
  local is_ours = tonumber(lives) and booking_ms and engine_ms and forget_ms  -- else whoever needs them says so
  if not HAVE_SHORT_WAY[policy] or is_weighed or not is_ours or call('EXISTS', capacity) == 1 then
    return from and withdraw_ordinary()
  end
  if policy ~= 'minimum_tokens' then keep_queues() end
  until_ms = now + math.min(booking_ms, engine_ms, forget_ms)
  for _, key in ipairs({leases, deadlines}) do
    until_ms = math.min(until_ms, tonumber(call('ZRANGE', key, '0', '0', 'WITHSCORES')[2]) or until_ms)
  end
  local note = {decimal(now), decimal(until_ms), decimal(booking_ms), lives, policy, parameter(policy .. '.k', 0.25)}
  call('HSET', pool, 'ordinary', table.concat(note, ' '))
end
