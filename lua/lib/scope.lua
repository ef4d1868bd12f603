-- scope: the ranks that a dispatch may choose: any, or those that it names, and never those that it names behind a minus. A
-- block of dispatch; names_all is there where it is scoped.
local is_scoped, names, among, avoided, names_all = #ARGV[2] > 1, 0
if is_scoped then
  avoided = {}
  for sign, rank in string.gmatch(ARGV[2], ' (%-?)([^ ]+)') do
    if sign == '-' then
      avoided[rank] = true
    else
      names, among = names + 1, among or {}
      among[rank] = true
    end
  end

  -- names_all: whether every eligible rank is named, as where a server is alone in its pool. A dispatch that names all is
  -- decided as one that names none.
  function names_all()
    if not among or next(avoided) or names < call('ZCARD', loads) then return false end
    for _, rank in ipairs(call('ZRANGE', loads, '0', '-1')) do
      if not among[rank] then return false end
    end
    return true
  end
end
