-- ordinary: what place_one has to know of a pool, noted in its `ordinary` field as FROM UNTIL LEASE LIVES K: from FROM to
-- before UNTIL (ms) nothing ends, neither a lease nor a booking; the booking lease in ms; the lives begun; the envelope's
-- k, or - for minimum_tokens. It is there only where dispatch is ordinary: one of these policies, ranks of equal weight,
-- none with a capacity. Whoever changes one of these withdraws it, and the next general dispatch notes it anew. No score
-- in leases or deadlines is ever below UNTIL, for what is added after FROM ends a whole lease later; a report or renewal
-- that finds the clock before FROM withdraws it.
local function withdraw_ordinary()
  call('HDEL', pool, 'ordinary')
end

local function read_ordinary()
  local schema, note, sums, largest = unpack(call('HMGET', pool, 'schema', 'ordinary', 'queue_sums', 'largest'))
  if not note or tonumber(schema) ~= SCHEMA then return end
  local from, until_ms, lease_ms, lives, k = string.match(note, '^(%d+) (%d+) (%d+) (%d+) (%S+)$')
  return tonumber(from), tonumber(until_ms), tonumber(lease_ms), lives, k, sums, largest
end
