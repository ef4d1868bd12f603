-- minimum_tokens: the rank with the least load in tokens, holding + in-flight. The seed's rule (SGLang PR 7379), on
-- counts that are never old. Reads as many ranks as there are requests, whatever the size of the pool.
local function minimum_tokens(batch)
  look_at_least(#batch, tonumber(string.sub(batch[1].id, -6)))
  return function() return 1 end
end
