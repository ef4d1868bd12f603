-- avoid: ranks that this dispatch must not choose leave the loads index, and come back with `readmit` in the same script:
-- nobody else sees them gone. Linear in the ranks named.
local avoided = {}

local function avoid(ranks)
  for rank in string.gmatch(ranks, '%S+') do
    local load = call('ZSCORE', loads, rank)
    if load then
      avoided[#avoided + 1], avoided[#avoided + 2] = load, rank
      call('ZREM', loads, rank)
    end
  end
end

local function readmit()
  if #avoided > 0 then call('ZADD', loads, unpack(avoided)) end
end
