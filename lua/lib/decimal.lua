-- decimal: a whole number as text; Lua's own tostring turns large ones into 1.79e+15.
local function decimal(number)
  return string.format('%d', number)
end
