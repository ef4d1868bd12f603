-- minimum_tokens: the rank with the least load in tokens, holding + in-flight. The seed's rule (SGLang PR 7379), on
-- counts that are never old. Reads as many ranks as there are requests, whatever the size of the pool; where ranks weigh
-- unequally, all.
local function minimum_tokens(batch)
  if not is_weighed and not is_scoped then
    look_at_least(#batch, turn_of(batch[1]))
    return function() return 1 end
  end
  look_at_all()
  return function(request)
    return least(request, function(seen) return (seen.load + request.tokens) / seen.weight end)
  end
end
