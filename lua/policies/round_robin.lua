-- round_robin: each eligible rank in turn, blind to load; the baseline. The turn is the pool's, not a dispatcher's.
local function round_robin(batch)
  check_types()
  look_at_all()
  local ranks = {}
  for place, seen in ipairs(view) do ranks[place] = seen.rank end
  table.sort(ranks)
  local turn = call('HINCRBY', pool, 'turn', #batch) - #batch
  return function()
    turn = turn + 1
    local rank = ranks[turn % #ranks + 1]
    for place, seen in ipairs(view) do
      if seen.rank == rank then return place end
    end
  end
end
