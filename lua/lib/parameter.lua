-- parameter: a number of a policy, as `balancer policy POOL NAME k=v` has set it for the pool, else its default.
local function parameter(name, default)
  return tonumber(call('HGET', pool, name)) or default
end
