-- view: what a policy sees. `view` lists ranks by load, the least loaded first, and stays in order as requests of the
-- same dispatch are placed on them.
local view, view_is_whole = {}, false

-- among: where a dispatch names the ranks that it may choose, the view holds these and no others, ties in the order in
-- which they are named, beginning at the `turn`-th.
local among

local function choose_among(named)
  for rank in string.gmatch(named, '%S+') do
    among = among or {}
    among[#among + 1] = rank
  end
end

local function is_any_eligible()
  if not among then return call('EXISTS', loads) == 1 end
  for _, load in ipairs(call('ZMSCORE', loads, unpack(among))) do
    if load then return true end
  end
  return false
end

local function read_among(turn)
  local listed = call('ZMSCORE', loads, unpack(among))
  view, view_is_whole = {}, true
  for i = 1, #among do
    local at = (i + turn) % #among + 1
    if listed[at] then view[#view + 1] = {rank = among[at], load = tonumber(listed[at]), order = i} end
  end
  table.sort(view, function(one, other)
    if one.load ~= other.load then return one.load < other.load end
    return one.order < other.order
  end)
end

local function read_view(from, to)
  local listed = call('ZRANGE', loads, from, to, 'WITHSCORES')
  view = {}
  for i = 1, #listed, 2 do view[#view + 1] = {rank = listed[i], load = tonumber(listed[i + 1])} end
end

-- look_at_least: the `count` least loaded ranks. Where more than `count` share the least load, `turn` (any whole
-- number) says at which of them the list begins, so that ties spread.
local function look_at_least(count, turn)
  if among then return read_among(turn) end
  read_view('0', decimal(count))
  if #view > count and view[count + 1].load == view[1].load then
    local least = decimal(view[1].load)
    local start = turn % (call('ZCOUNT', loads, least, least) - count + 1)
    read_view(decimal(start), decimal(start + count - 1))
  end
end

-- look_at_all: every eligible rank, with the loads that this dispatch has changed so far.
local function look_at_all()
  if view_is_whole then return end
  if among then return read_among(0) end
  local changed = {}
  for _, seen in ipairs(view) do changed[seen.rank] = seen.load end
  read_view('0', '-1')
  for _, seen in ipairs(view) do seen.load = changed[seen.rank] or seen.load end
  table.sort(view, function(one, other) return one.load < other.load end)
  view_is_whole = true
end

-- add_to: a request's tokens on the rank at this place of the view, which moves behind all that are now no fuller.
local function add_to(place, tokens)
  local seen = view[place]
  seen.load = seen.load + tokens
  while view[place + 1] and view[place + 1].load <= seen.load do
    view[place] = view[place + 1]
    place = place + 1
  end
  view[place] = seen
end
