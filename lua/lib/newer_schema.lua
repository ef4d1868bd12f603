-- newer_schema: the reply for a pool that a newer release has written, or nil.
local function newer_schema()
  local schema = call('HGET', pool, 'schema')
  if schema and tonumber(schema) > SCHEMA then return {'newer_schema', schema} end
end
