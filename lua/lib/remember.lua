-- remember: what a policy remembers from one dispatch to the next, in fields of the pool's hash. Written when all is booked:
-- what could still be refused until then must find nothing changed.
local remembered = {}

local function remember(field, value)
  remembered[#remembered + 1], remembered[#remembered + 2] = field, value
end

local function write_remembered()
  if #remembered > 0 then call('HSET', pool, unpack(remembered)) end
end
