-- ordinary_note: what the short way of dispatch has to know of a pool, noted in its `ordinary` field as FROM UNTIL LEASE
-- LIVES POLICY K: from FROM to before UNTIL (ms) nothing ends, neither a lease nor a booking; the booking lease in ms; the
-- lives begun; the policy and, if it has an envelope, that one's k. It is there only where dispatch is ordinary: a policy
-- with a short way, ranks of equal weight, none with a capacity. Whoever changes one of these withdraws it, and the next
-- general dispatch notes it anew. No score in leases or deadlines is ever below UNTIL, for what is added after FROM ends a
-- whole lease later; a report or renewal that finds the clock before FROM withdraws it.
local ORDINARY = '^(%d+) (%d+) (%d+) (%d+) (%S+) (%S+)$'
