-- least_loaded: what minimum_tokens chooses for one request, a block of dispatch. Sets rank and load; of equals the policy
-- itself chooses.
local next_load, _
rank, load, _, next_load = unpack(call('ZRANGE', loads, '0', '1', 'WITHSCORES'))
if load == next_load then rank = nil end
