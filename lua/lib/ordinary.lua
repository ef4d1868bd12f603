-- ordinary: what place_one has to know of a pool, noted in its `ordinary` field as FROM UNTIL LEASE LIVES: from FROM to
-- before UNTIL (ms) nothing ends, neither a lease nor a booking; the booking lease in ms; the lives begun. It is there
-- only where dispatch is ordinary: policy minimum_tokens, no rank with a capacity. Whoever changes one of these withdraws
-- it, and the next general dispatch notes it anew. No score in leases or deadlines is ever below UNTIL, for what is added
-- after FROM ends a whole lease later; a report that finds the clock before FROM withdraws it.
local function withdraw_ordinary()
  call('HDEL', pool, 'ordinary')
end

local function read_ordinary()
  local schema, note = unpack(call('HMGET', pool, 'schema', 'ordinary'))
  if not note or tonumber(schema) ~= SCHEMA then return end
  local from, until_ms, lease_ms, lives = string.match(note, '^(%d+) (%d+) (%d+) (%d+)$')
  return tonumber(from), tonumber(until_ms), tonumber(lease_ms), lives
end
