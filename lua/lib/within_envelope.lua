-- within_envelope: what envelope and pending_envelope choose for one request, found in the index of queues in a few looks
-- whatever the number of ranks, a block of dispatch. Sets rank and load, and what the index is to say once the request is
-- booked there: score and sums. Sets no rank where the policy itself has to look at all of them.
local MOST_LOOKS, LEAST_AT_ONCE, MOST_LEAST = 16, 4, 16
local tokens, is_pending, nobody_fits = tonumber(ARGV[4]), policy == 'pending_envelope', false
local all, count, ranks, fewest = string.match(sums or '', QUEUE_SUMS)
local waiting = fewest
largest = math.max(tokens, (tonumber(largest) or 0) * DECAY)

if ranks and ranks ~= '0' then
  local mean = all / ranks
  local ceiling, most = mean + k * largest, is_pending and math.huge or mean
  for _ = 1, MOST_LOOKS do
    nobody_fits = ceiling < tokens
    if nobody_fits then break end
    local at = decimal(waiting * QUEUE - math.floor(ceiling - tokens))  -- of so many requests what fits, and all with more
    local found, place = unpack(call('ZRANGEBYSCORE', queues, at, BELOW_PENDING, 'LIMIT', '0', '1', 'WITHSCORES'))
    nobody_fits = not found
    if nobody_fits then break end
    waiting = math.ceil(place / QUEUE)
    load = waiting * QUEUE - place
    most = math.max(most, load)
    if load + tokens <= ceiling and load + tokens > most then  -- the fullest rank is asked for only where it may matter
      most = tonumber(call('ZRANGE', loads, '-1', '-1', 'WITHSCORES')[2])
      ceiling = math.min(ceiling, most)
    end
    if load + tokens <= ceiling then
      rank = found
      break
    end
  end
end

if nobody_fits then  -- the one with the least tokens; where there are two of these, the policy chooses
  local is_settled, is_tie
  for from = 0, MOST_LEAST - 1, LEAST_AT_ONCE do
    local listed = call('ZRANGE', loads, decimal(from), decimal(from + LEAST_AT_ONCE - 1), 'WITHSCORES')
    is_settled = #listed < 2 * LEAST_AT_ONCE
    for at = 1, #listed, 2 do
      local held = tonumber(listed[at + 1])
      is_settled = is_settled or rank and held > load
      if rank and held > load then break end
      local place = tonumber(call('ZSCORE', queues, listed[at]))
      if place and place < PENDING then
        is_tie = rank ~= nil
        rank, load, waiting = listed[at], held, math.ceil(place / QUEUE)
      end
    end
    if is_settled or is_tie then break end
  end
  if is_tie or not is_settled then rank = nil end
elseif is_pending and ranks == '0' then
  local found, place, _, next_place = unpack(call('ZRANGE', queues, '0', '1', 'WITHSCORES'))
  load = found and place ~= next_place and call('ZSCORE', loads, found)
  if load then rank, score = found, place + tokens end
end

if rank and not score then
  if load + tokens > FULLEST or waiting + 1 > LONGEST then
    rank = nil
  elseif is_pending then
    score, sums = PENDING + tokens, string.format('%d %d %d %d', all - load, count - waiting, ranks - 1, fewest)
  else
    score = (waiting + 1) * QUEUE - load - tokens
    sums = string.format('%d %d %d %d', all + tokens, count + 1, ranks, fewest)
  end
end
