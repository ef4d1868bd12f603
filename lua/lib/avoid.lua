-- avoid: ranks that this dispatch must not choose leave the loads index, and come back with `readmit` in the same script:
-- nobody else sees them gone. Linear in the ranks named.
local avoided, lasting_ms = {}, 0

local function avoid(ranks)
  if ranks == '' then return end
  lasting_ms = call('PTTL', loads)
  for rank in string.gmatch(ranks, '%S+') do
    local load = call('ZSCORE', loads, rank)
    if load then
      avoided[#avoided + 1], avoided[#avoided + 2] = load, rank
      call('ZREM', loads, rank)
    end
  end
end

local function readmit()
  if #avoided == 0 then return end
  call('ZADD', loads, unpack(avoided))
  if lasting_ms > 0 then call('PEXPIRE', loads, lasting_ms) end  -- an emptied key has forgotten when it ends
end
