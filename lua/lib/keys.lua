-- keys: every key of one pool, by name, and the one schema number that they share.
--
-- KEYS  pool                hash        settings: schema, policy, leases (ms), when_*;
--                                       counters: expired, turn, lives, last_epoch; notes: ordinary, largest, queue_sums
--       engines             hash        engine, or engine/index for a rank that reports alone -> its record
--       leases              sorted set  the same names by the ms at which their silence counts
--       loads               sorted set  eligible rank by its load: holding + in-flight tokens (an index)
--       holding             hash        rank -> tokens held, as last reported
--       requests            hash        rank -> requests held, as last reported
--       in_flight           hash        rank -> in-flight tokens: the sum of its bookings
--       in_flight_requests  hash        rank -> number of its bookings
--       bookings            hash        in-flight id -> rank, tokens, life, dispatcher, request id
--       deadlines           sorted set  in-flight id by the ms at which its booking ends
--       capacity            hash        rank -> tokens it can hold; absent where no limit is known
--       queues              sorted set  eligible rank by its requests, then its load (an index, see lib/queue_sums.lua)
--       pressure            hash        rank -> pending tokens, KV usage in thousandths, - for unknown; absent where its
--                                       engine reports neither
local pool, engines, leases, loads, holding, requests, in_flight, in_flight_requests,
  bookings, deadlines, capacity, queues, pressure = unpack(KEYS)
local call, try = redis.call, redis.pcall
local SCHEMA = 1
