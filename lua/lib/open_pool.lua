-- open_pool: the settings of a pool that has none, written once. The defaults live here only. Where somebody has deleted
-- them under living engines, lives are counted on from the latest.
local function open_pool()
  if call('HEXISTS', pool, 'schema') == 1 then return end
  local lives = 0
  for _, record in ipairs(call('HVALS', engines)) do
    lives = math.max(lives, tonumber(string.match(record, ' life=(%d+) ')) or 0)
  end
  call('HSET', pool, 'schema', SCHEMA, 'policy', 'minimum_tokens',
    'engine_lease_ms', '5000', 'booking_lease_ms', '60000', 'forget_ms', '3600000',
    'when_silent', 'refuse', 'when_full', 'refuse', 'lives', lives)
end

-- newer_schema: the reply for a pool that a newer release has written, or nil.
local function newer_schema()
  local schema = call('HGET', pool, 'schema')
  if schema and tonumber(schema) > SCHEMA then return {'newer_schema', schema} end
end
