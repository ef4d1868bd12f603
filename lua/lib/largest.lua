-- largest: the decayed maximum of the pool's prompt sizes, for the envelopes; each request of the batch learns what it is
-- when its turn comes. Kept in the pool's hash, shared by all dispatchers.
local function note_largest(batch)
  local largest = tonumber(call('HGET', pool, 'largest')) or 0
  for _, request in ipairs(batch) do
    largest = math.max(request.tokens, largest * DECAY)  -- as in within_envelope
    request.largest = largest
  end
  remember('largest', string.format('%.17g', largest))
end
