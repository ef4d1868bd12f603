-- listed_loads: the ranks that a dispatch may choose with their loads, as ZRANGE lists them. Where it names few of many, these
-- alone are read, whatever the size of the pool, and stand in no order. Hashes are read whole all the same: Redis keeps one of
-- up to 512 ranks as a list, in which it looks for each name from the beginning.
local IN_PASSING = 3  -- ranks that are read with all others in the time that one takes by its name
local few

local function listed_loads()
  if not among or names * IN_PASSING > call('ZCARD', loads) then return call('ZRANGE', loads, '0', '-1', 'WITHSCORES') end
  few = {}
  for rank in pairs(among) do few[#few + 1] = rank end
  local listed = {}
  for i, load in ipairs(call('ZMSCORE', loads, unpack(few))) do
    if load then listed[#listed + 1], listed[#listed + 2] = few[i], load end
  end
  return listed
end
