-- engine_record: an entry of the engines hash as a table, and back. One line of text, so that a person can read it:
--   state=up epoch=1790000000000 life=3 step=812 size=16 reported_ms=1790000012345 draining=- nonce=f3a9
--   address=10.0.0.7:30000
-- state is up or silent (its lease has ended); life is its number in this pool, see begin_life; draining is -, all, or
-- the indices: 3,7.
local ENGINE_RECORD = '^state=(%a+) epoch=(%d+) life=(%d+) step=(%d+) size=(%d+) reported_ms=(%d+)'
  .. ' draining=(%S+) nonce=(%S+) address=(%S*)$'

local function read_engine(name)
  local record = call('HGET', engines, name)
  if not record then return nil end
  local state, epoch, life, step, size, reported_ms, draining, nonce, address = string.match(record, ENGINE_RECORD)
  if not state then error('CORRUPT the record of engine ' .. name .. ' is not one of ours') end
  return {
    name = name, state = state, epoch = tonumber(epoch), life = tonumber(life), step = tonumber(step),
    size = tonumber(size), reported_ms = tonumber(reported_ms), draining = draining, nonce = nonce, address = address,
  }
end

local function write_engine(engine)
  call('HSET', engines, engine.name, string.format(
    'state=%s epoch=%d life=%d step=%d size=%d reported_ms=%d draining=%s nonce=%s address=%s',
    engine.state, engine.epoch, engine.life, engine.step, engine.size, engine.reported_ms,
    engine.draining, engine.nonce, engine.address))
end

-- ranks_of: the ranks that an engine reports; a name with an index is one rank that reports alone.
local function ranks_of(engine)
  if string.find(engine.name, '/', 1, true) then return {engine.name} end
  local ranks = {}
  for index = 0, engine.size - 1 do ranks[index + 1] = engine.name .. '/' .. index end
  return ranks
end

-- drains: whether a rank of this engine takes no new requests.
local function drains(engine, rank)
  if engine.draining == '-' then return false end
  local index = string.match(rank, '%d+$')
  return engine.draining == 'all' or string.find(',' .. engine.draining .. ',', ',' .. index .. ',', 1, true) ~= nil
end
