-- overlapping: the known lives that claim a rank which `name` claims too: its own, and those in the other form (the
-- whole engine, or ranks of it that report alone).
local function overlapping(name)
  local engine_name = string.match(name, '^[^/]+')
  local found = {}
  for _, other in ipairs(call('HKEYS', engines)) do
    local same_engine = string.match(other, '^[^/]+') == engine_name
    if same_engine and (other == name or other == engine_name or name == engine_name) then
      found[#found + 1] = read_engine(other)
    end
  end
  return found
end
