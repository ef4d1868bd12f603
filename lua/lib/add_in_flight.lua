-- add_in_flight: tokens and requests enter the in-flight sums of some ranks (negative: they leave), and with them the
-- indices. What may be foreign is read before anything is written, and changes nothing; what index_queues reads after it,
-- the caller's check_types has seen.
local function add_in_flight(tokens, count)
  local ranks = {}
  for rank in pairs(tokens) do ranks[#ranks + 1] = rank end
  if #ranks == 0 then return end
  local flying, queued = call('HMGET', in_flight, unpack(ranks)), call('HMGET', in_flight_requests, unpack(ranks))
  local scores = call('ZMSCORE', loads, unpack(ranks))
  local tokens_now, requests_now, loads_now = {}, {}, {}
  for i, rank in ipairs(ranks) do
    tokens_now[2 * i - 1], requests_now[2 * i - 1] = rank, rank
    tokens_now[2 * i] = decimal((flying[i] or 0) + tokens[rank])
    requests_now[2 * i] = decimal((queued[i] or 0) + count[rank])
    if scores[i] then loads_now[#loads_now + 1], loads_now[#loads_now + 2] = decimal(scores[i] + tokens[rank]), rank end
  end
  call('HSET', in_flight, unpack(tokens_now))
  call('HSET', in_flight_requests, unpack(requests_now))
  if #loads_now > 0 then call('ZADD', loads, unpack(loads_now)) end
  index_queues(ranks)
end
