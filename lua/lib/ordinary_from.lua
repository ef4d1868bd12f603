-- ordinary_from: from when (ms) the note of what is ordinary in a pool holds and until when, see ordinary_note.
local function ordinary_from()
  local from, until_ms = string.match(call('HGET', pool, 'ordinary') or '', ORDINARY)
  return tonumber(from), tonumber(until_ms)
end
