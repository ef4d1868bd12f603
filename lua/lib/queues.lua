-- queues: an index of the eligible ranks by requests (held + in flight), of equals the fullest first, kept only where the
-- envelope wants it. A score is requests * 10^10 - load; counts beyond LONGEST and FULLEST stand as these. The pool's field
-- `queue_sums` is TOKENS REQUESTS RANKS FEWEST: sums over the index, and requests that no rank has fewer of; it is there
-- where the index is kept, and outlasts one whose time is over until the next life begins. Whoever changes what a rank
-- holds, has in flight or may be given tells index_queues.
local QUEUE, FULLEST, LONGEST = 1e10, 1e10 - 1, 1e5

local function queue_score(load, count)
  return math.min(count, LONGEST) * QUEUE - math.min(load, FULLEST)
end

-- queue_counts: load and requests of a score.
local function queue_counts(score)
  score = tonumber(score)
  local count = math.ceil(score / QUEUE)
  return count * QUEUE - score, count
end

local function read_queue_sums(note)
  local tokens, count, ranks, fewest = string.match(note or '', '^(%d+) (%d+) (%d+) (%d+)$')
  return tonumber(tokens), tonumber(count), tonumber(ranks), tonumber(fewest)
end

local function queue_sums(tokens, count, ranks, fewest)
  return string.format('%d %d %d %d', tokens, count, ranks, fewest)
end

local function index_queues(ranks)
  local tokens, count, size = read_queue_sums(call('HGET', pool, 'queue_sums'))
  if not size or #ranks == 0 then return end
  local held, queued = call('HMGET', requests, unpack(ranks)), call('HMGET', in_flight_requests, unpack(ranks))
  local now, before = call('ZMSCORE', loads, unpack(ranks)), call('ZMSCORE', queues, unpack(ranks))
  local entering, leaving = {}, {}
  for i, rank in ipairs(ranks) do
    if before[i] then
      local load, waiting = queue_counts(before[i])
      tokens, count, size = tokens - load, count - waiting, size - 1
    end
    if now[i] then
      local score = queue_score(tonumber(now[i]), (tonumber(held[i]) or 0) + (tonumber(queued[i]) or 0))
      local load, waiting = queue_counts(score)
      tokens, count, size = tokens + load, count + waiting, size + 1
      entering[#entering + 1], entering[#entering + 2] = decimal(score), rank
    elseif before[i] then
      leaving[#leaving + 1] = rank
    end
  end
  if #entering > 0 then call('ZADD', queues, unpack(entering)) end
  if #leaving > 0 then call('ZREM', queues, unpack(leaving)) end
  local _, fewest = queue_counts(call('ZRANGE', queues, '0', '0', 'WITHSCORES')[2] or 0)
  call('HSET', pool, 'queue_sums', queue_sums(tokens, count, size, fewest))
end
