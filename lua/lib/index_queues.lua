-- index_queues: the index of queues follows what has become of some ranks. Whoever changes what a rank holds, has in flight
-- or may be given calls it.
local function queue_counts(score)
  local count = math.ceil(score / QUEUE)
  return count * QUEUE - score, count
end

local function index_queues(ranks)
  local sums, policy = unpack(call('HMGET', pool, 'queue_sums', 'policy'))
  local tokens, count, size = string.match(sums or '', QUEUE_SUMS)
  if not size or #ranks == 0 then return end
  local held, queued = call('HMGET', requests, unpack(ranks)), call('HMGET', in_flight_requests, unpack(ranks))
  local now, before = call('ZMSCORE', loads, unpack(ranks)), call('ZMSCORE', queues, unpack(ranks))
  local pending = policy == 'pending_envelope' and call('HMGET', in_flight, unpack(ranks)) or {}
  local entering, leaving = {}, {}
  for i, rank in ipairs(ranks) do
    local score = tonumber(before[i])
    if score and score < PENDING then
      local load, waiting = queue_counts(score)
      tokens, count, size = tokens - load, count - waiting, size - 1
    end
    if now[i] then
      score = PENDING + (tonumber(pending[i]) or 0)
      if score == PENDING then
        local load = math.min(tonumber(now[i]), FULLEST)
        local waiting = math.min((tonumber(held[i]) or 0) + (tonumber(queued[i]) or 0), LONGEST)
        score, tokens, count, size = waiting * QUEUE - load, tokens + load, count + waiting, size + 1
      end
      entering[#entering + 1], entering[#entering + 2] = decimal(score), rank
    elseif before[i] then
      leaving[#leaving + 1] = rank
    end
  end
  if #entering > 0 then call('ZADD', queues, unpack(entering)) end
  if #leaving > 0 then call('ZREM', queues, unpack(leaving)) end
  local lowest = tonumber(call('ZRANGE', queues, '0', '0', 'WITHSCORES')[2]) or PENDING
  local fewest = lowest < PENDING and math.ceil(lowest / QUEUE) or 0
  call('HSET', pool, 'queue_sums', string.format('%d %d %d %d', tokens, count, size, fewest))
end
