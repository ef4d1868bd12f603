-- largest_first: the order in which the requests of a list are placed; of equals the one that was named first.
local function largest_first(batch)
  table.sort(batch, function(one, other)
    return one.tokens > other.tokens or one.tokens == other.tokens and one.at < other.at
  end)
end
