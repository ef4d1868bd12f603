-- queue_sums: how ranks stand in the index of queues, and what the pool's field of that name says of them.
--
-- The index has the eligible ranks by requests (held + in flight), of equals the fullest first: requests * 10^10 - load.
-- Counts beyond LONGEST and FULLEST stand as these. Under pending_envelope a rank with tokens in flight comes behind all
-- that have none: PENDING + these tokens. The index is kept only while the policy is one of these envelopes.
--
-- The field is TOKENS REQUESTS RANKS FEWEST: sums over the ranks below PENDING, and requests that none of them has fewer
-- of. It is there where the index is kept, and outlasts one whose time is over until the next life begins.
local QUEUE, FULLEST, LONGEST, PENDING, BELOW_PENDING = 1e10, 1e10 - 1, 1e5, 2e15, '1999999999999999'
local QUEUE_SUMS = '^(%d+) (%d+) (%d+) (%d+)$'
local DECAY = 0.999  -- of the largest prompt of late, with each request
