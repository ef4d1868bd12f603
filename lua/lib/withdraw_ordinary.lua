-- withdraw_ordinary: the note of what is ordinary in a pool holds no more, see ordinary_note.
local function withdraw_ordinary()
  call('HDEL', pool, 'ordinary')
end
