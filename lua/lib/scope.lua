-- scope: the ranks that a dispatch may choose: those it names, or any, and never those that it names behind a minus.
local is_scoped, among, avoided = false, nil, {}

local function look_within(named)
  for sign, rank in string.gmatch(named, ' (%-?)(%S+)') do
    if sign == '-' then
      avoided[rank], is_scoped = true, true
    else
      among, is_scoped = among or {}, true
      among[rank] = true
    end
  end
end

local function is_among(rank)
  return not among or among[rank]
end

local function may_see(rank)
  return is_among(rank) and not avoided[rank]
end
