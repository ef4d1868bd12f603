-- within_envelope: the choice of policies/envelope for one request, found in the index of queues in a few looks whatever
-- the number of ranks. Returns rank, load, and what is to be done once the request is booked there; nothing where the policy
-- itself has to look at all ranks.
local DECAY = 0.999
local MOST_LOOKS = 16

-- fitting: the first that fits, by requests and then the fullest, with its load and requests; or nil, and whether that is
-- because nobody does. The fullest rank of all, which is never below the mean, is asked for only where it may matter.
local function fitting(tokens, mean, reach, waiting)
  local most, ceiling = mean, mean + reach
  for _ = 1, MOST_LOOKS do
    if ceiling < tokens then return nil, true end
    local at = decimal(waiting * QUEUE - math.floor(ceiling - tokens))  -- of so many requests what fits, and all with more
    local rank, score = unpack(call('ZRANGEBYSCORE', queues, at, '+inf', 'LIMIT', '0', '1', 'WITHSCORES'))
    if not rank then return nil, true end
    local load
    load, waiting = queue_counts(score)
    if load > most then most = load end
    local after = load + tokens
    if after <= ceiling and after > most then
      most = tonumber(call('ZRANGE', loads, '-1', '-1', 'WITHSCORES')[2])
      ceiling = math.min(ceiling, most)
    end
    if after <= ceiling then return rank, load, waiting end
  end
end

local function within_envelope(k, sums, largest)
  local tokens = tonumber(ARGV[4])
  local all, count, ranks, fewest = read_queue_sums(sums)
  if not ranks or ranks == 0 then return end
  largest = math.max(tokens, (tonumber(largest) or 0) * DECAY)
  local rank, load, waiting = fitting(tokens, all / ranks, k * largest, fewest)
  if not rank then
    if not load then return end
    local _, next_load
    rank, load, _, next_load = unpack(call('ZRANGE', loads, '0', '1', 'WITHSCORES'))
    local score = rank and call('ZSCORE', queues, rank)
    if not score then return end
    _, waiting = queue_counts(score)
    local is_least = load ~= next_load and (waiting + 1) / math.max(count, 1) <= (load + tokens) / math.max(all, 1)
    if not is_least then return end
  end
  if load + tokens > FULLEST or waiting >= LONGEST then return end
  return rank, load, function()
    call('ZADD', queues, decimal(queue_score(load + tokens, waiting + 1)), rank)
    call('HSET', pool, 'queue_sums', queue_sums(all + tokens, count + 1, ranks, fewest),
      'largest', string.format('%.17g', largest))
  end
end
