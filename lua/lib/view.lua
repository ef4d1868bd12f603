-- view: what a policy sees. `view` lists ranks by load, the least loaded first and equals by name, and stays in order as
-- requests of the same dispatch are placed on them. Each has rank, load (tokens) and weight; whoever looks closely also
-- sees its requests (held + in flight) and, if it says so, in_flight (tokens).
local view, view_is_whole = {}, false
local TURNS = 1000000

-- turn_of: what decides where ranks are equal or chance is asked for: a number below TURNS, the last digits of the
-- request's in-flight id. It is nobody's choice and the same in every replay; Lua's own random numbers are alike in all runs.
local function turn_of(request)
  return tonumber(string.sub(request.id, -6))
end

local function may_see(rank)
  return (not among or among[rank]) and not avoided[rank]
end

local function read_view(listed)
  view = {}
  for i = 1, #listed, 2 do
    local rank = listed[i]
    if not is_scoped or may_see(rank) then
      view[#view + 1] = {rank = rank, load = tonumber(listed[i + 1]), weight = is_weighed and weight_of(rank) or 1}
    end
  end
end

local function is_before(one, other)
  return one.load < other.load or one.load == other.load and one.rank < other.rank
end

-- look_at_all: every rank that may be chosen, with the loads that this dispatch has changed so far.
local function look_at_all()
  if view_is_whole then return end
  local changed = {}
  for _, seen in ipairs(view) do changed[seen.rank] = seen.load end
  read_view(listed_loads())
  for _, seen in ipairs(view) do seen.load = changed[seen.rank] or seen.load end
  if few or next(changed) then table.sort(view, is_before) end
  view_is_whole = true
end

-- look_at_least: the `count` least loaded ranks. Where more than `count` share the least load, `turn` (any whole
-- number) says at which of them the list begins, so that ties spread.
local function look_at_least(count, turn)
  read_view(call('ZRANGE', loads, '0', decimal(count), 'WITHSCORES'))
  if #view > count and view[count + 1].load == view[1].load then
    local lowest = decimal(view[1].load)
    local start = turn % (call('ZCOUNT', loads, lowest, lowest) - count + 1)
    read_view(call('ZRANGE', loads, decimal(start), decimal(start + count - 1), 'WITHSCORES'))
  end
end

-- sees_none: whether there is nothing to choose from.
local function sees_none()
  if not is_scoped then return call('EXISTS', loads) == 0 end
  look_at_all()
  return #view == 0
end

-- look_closely: every eligible rank with its requests too, and where `with_tokens` with its in-flight tokens.
local function counts_in(key)
  local counts, listed = {}, call('HGETALL', key)
  for i = 1, #listed, 2 do counts[listed[i]] = listed[i + 1] end
  return counts
end

local function look_closely(with_tokens)
  look_at_all()
  local held, queued, flying = counts_in(requests), counts_in(in_flight_requests), with_tokens and counts_in(in_flight)
  for _, seen in ipairs(view) do  -- adding raises what is no number, before anything is written
    seen.requests = (held[seen.rank] or 0) + (queued[seen.rank] or 0)
    seen.in_flight = flying and (flying[seen.rank] or 0) + 0
  end
end

-- add_to: a request on the rank at this place of the view, which moves behind all that are now before it.
local function add_to(place, tokens)
  local seen = view[place]
  seen.load = seen.load + tokens
  if seen.requests then seen.requests = seen.requests + 1 end
  if seen.in_flight then seen.in_flight = seen.in_flight + tokens end
  while view[place + 1] and is_before(view[place + 1], seen) do
    view[place] = view[place + 1]
    place = place + 1
  end
  view[place] = seen
end
