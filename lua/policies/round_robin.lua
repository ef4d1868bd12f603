-- round_robin: each eligible rank in turn, blind to load; the baseline. The turn is the pool's, not a dispatcher's. Where
-- ranks weigh unequally, turns fall on them evenly in proportion (steps of the golden ratio around a wheel).
local GOLDEN = (math.sqrt(5) - 1) / 2

local function round_robin(batch)
  check_types()
  look_at_all()
  local ranks, total = {}, 0
  for place, seen in ipairs(view) do ranks[place], total = seen.rank, total + seen.weight end
  table.sort(ranks)
  local turn = tonumber(call('HGET', pool, 'turn') or 0) or error('CORRUPT the pool\'s turn is not a number')
  remember('turn', decimal(turn + #batch))
  return function()
    turn = turn + 1
    local rank = ranks[turn % #ranks + 1]
    if is_weighed then
      local left, at = turn * GOLDEN % 1 * total, 0
      repeat
        at = at + 1
        left = left - weight_of(ranks[at])
      until left < 0 or at == #ranks
      rank = ranks[at]
    end
    for place, seen in ipairs(view) do
      if seen.rank == rank then return place end
    end
  end
end
