// Making and changing elements: no text ever becomes markup. Used by everything that draws.

const SVG = "http://www.w3.org/2000/svg";

function build(node, props, children) {
  for (const [name, value] of Object.entries(props || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

/** An HTML element; attributes by name, listeners as `onclick`; children are nodes or text. */
export const h = (tag, props, ...children) => build(document.createElement(tag), props, children);

/** The same in SVG. */
export const s = (tag, props, ...children) => build(document.createElementNS(SVG, tag), props, children);

/** Set text, but touch nothing when it is there already: a selection or a screen reader's place survives. */
export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

export function setAttr(node, name, value) {
  const now = node.getAttribute(name);
  if (value === null || value === undefined || value === false) {
    if (now !== null) node.removeAttribute(name);
  } else if (now !== String(value)) node.setAttribute(name, value);
}

/** Make `parent`'s children those of `items`, in order: kept by key, made by `make(item)`, renewed by its `.update`. */
export function sync(parent, items, keyOf, make) {
  const known = parent.known || (parent.known = new Map());
  const wanted = new Set();
  let place = parent.firstElementChild;
  for (const item of items) {
    const key = keyOf(item);
    wanted.add(key);
    let node = known.get(key);
    if (!node) known.set(key, (node = make(item)));
    node.update?.(item);
    if (node === place) place = place.nextElementSibling;
    else parent.insertBefore(node, place);
  }
  for (const [key, node] of known) {
    if (!wanted.has(key)) {
      node.remove();
      known.delete(key);
    }
  }
}

/** What happened, to be seen and to be heard, for a while; `action` is [text, function], or nothing. */
export function say(text, action) {
  const box = document.getElementById("said");
  clearTimeout(box.timer);
  const button = action && h("button", { type: "button", onclick: () => { box.replaceChildren(); action[1](); } }, action[0]);
  box.replaceChildren(h("span", {}, text), button || "");
  box.timer = setTimeout(() => { if (!box.contains(document.activeElement)) box.replaceChildren(); }, 12000);
}
