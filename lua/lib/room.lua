-- room: the guard on capacity that holds for every policy. place_with_room returns the chosen place if its rank has
-- room for the tokens, else the least loaded place that has, else nil. A rank without a known limit has room.
local guarded, limits = nil, {}

local function has_room(place, tokens)
  local seen = view[place]
  if limits[seen.rank] == nil then limits[seen.rank] = call('HGET', capacity, seen.rank) end
  return not limits[seen.rank] or seen.load + tokens <= tonumber(limits[seen.rank])
end

local function place_with_room(chosen, tokens)
  if guarded == nil then guarded = call('EXISTS', capacity) == 1 end
  if not guarded or has_room(chosen, tokens) then return chosen end
  look_at_all()
  for place = 1, #view do
    if has_room(place, tokens) then return place end
  end
end
