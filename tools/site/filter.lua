-- What Quarto's markdown has and pandoc's has not: callouts, tabsets, references to figures.
local titles = {note = "Note", tip = "Tip", warning = "Warning", caution = "Caution",
                important = "Important"}
local number = {} -- of each figure that has a label, in reading order
local labelled = 0

local function html(text) return pandoc.RawBlock("html", text) end

local function callout(div, kind)
  local title = pandoc.Inlines(titles[kind])
  if div.attributes.title then
    title = pandoc.utils.blocks_to_inlines(pandoc.read(div.attributes.title, "markdown").blocks)
  elseif div.content[1] and div.content[1].t == "Header" then
    title = div.content:remove(1).content
  end
  local collapse = div.attributes.collapse
  local tag, head = "div", "div"
  if collapse then tag, head = "details", "summary" end
  local open = string.format('<%s class="callout %s"%s>', tag, kind,
                             collapse == "false" and " open" or "")
  local blocks = pandoc.Blocks{html(open), html("<" .. head .. ' class="callout-title">'),
                               pandoc.Plain(title), html("</" .. head .. ">")}
  blocks:extend(div.content)
  blocks:insert(html("</" .. tag .. ">"))
  return blocks
end

-- Each heading of the level of the first one starts a tab; the page's script draws the buttons.
local function tabset(div)
  local first = div.content[1]
  if not first or first.t ~= "Header" then error("a panel-tabset must begin with a heading") end
  local blocks = pandoc.Blocks{html('<div class="tabset">')}
  for _, block in ipairs(div.content) do
    if block.t == "Header" and block.level == first.level then
      if #blocks > 1 then blocks:insert(html("</div>")) end
      blocks:insert(html('<div class="tab"><p class="tab-title">'))
      blocks:insert(pandoc.Plain(block.content))
      blocks:insert(html("</p>"))
    else
      blocks:insert(block)
    end
  end
  blocks:extend{html("</div>"), html("</div>")}
  return blocks
end

local function div(el)
  for _, class in ipairs(el.classes) do
    local kind = class:match("^callout%-(%a+)$")
    if kind and titles[kind] then return callout(el, kind) end
    if class == "panel-tabset" then return tabset(el) end
  end
end

local function image(el)
  el.attributes.alt = el.attributes["fig-alt"]
  el.attributes["fig-alt"] = nil
  return el
end

local function figure(el)
  -- The picture in a paragraph of its own, as Quarto has it: that scrolls, the caption does not.
  el.content = el.content:map(function(b) return b.t == "Plain" and pandoc.Para(b.content) or b end)
  if not el.identifier:match("^fig%-") then return el end
  labelled = labelled + 1
  number[el.identifier] = labelled
  local caption = el.caption.long
  local text = pandoc.Inlines("Figure " .. labelled .. ": ")
  text:extend(pandoc.utils.blocks_to_inlines(caption))
  el.caption.long = pandoc.Blocks{pandoc.Plain(text)}
  return el
end

local function cite(el)
  local label = el.citations[1].id
  if not number[label] then error("@" .. label .. " refers to no figure of this page") end
  return pandoc.Link("Figure " .. number[label], "#" .. label)
end

return {{Figure = figure, Image = image}, {Cite = cite}, {Div = div}}
