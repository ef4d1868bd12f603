-- keep_queues: begin to keep the index of queues. Linear in the ranks; the next configure ends it.
local function keep_queues()
  if string.find(call('HGET', pool, 'queue_sums') or '', QUEUE_SUMS) then return end
  call('UNLINK', queues)
  call('HSET', pool, 'queue_sums', '0 0 0 0')
  local ranks = call('ZRANGE', loads, '0', '-1')
  for from = 1, #ranks, 1000 do index_queues({unpack(ranks, from, math.min(from + 999, #ranks))}) end
  call('PEXPIRE', queues, call('PTTL', loads))
end
