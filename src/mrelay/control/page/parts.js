// What several pages draw: states, empty places, reasons, tables.

import { h, setAttr, setText } from "./dom.js";
import { MARKS, wordsOf } from "./store.js";

/** A mark and words: never colour alone. Changes with `update(kind, words)`. */
export function badge(kind = "starting", words = "") {
  const mark = h("span", { class: "mark", "aria-hidden": "true" });
  const text = h("span", {});
  const node = h("span", {}, mark, text);
  node.update = (now, said) => {
    setAttr(node, "class", `badge ${now}`);
    setText(mark, MARKS[now]);
    setText(text, said);
  };
  node.update(kind, words);
  return node;
}

export function ruleBadge() {
  const node = badge();
  return Object.assign(node, { updateRule: (rule) => node.update(rule.kind, wordsOf(rule)) });
}

export const kindOfOutput = (output) => {
  if (output.state !== "up") return output.state.startsWith("error") ? "error" : "waiting";
  if (output.errorRate > 0) return "error";
  return output.pps > 0 ? "forwarding" : "silent";
};

export const ruleHref = (name) => `#/rule/${encodeURIComponent(name)}`;

/** A section with its heading. */
export const section = (title, ...children) => {
  const id = `h-${title.toLowerCase().replaceAll(/[^a-z]+/g, "-")}`;
  return h("section", { "aria-labelledby": id }, h("h2", { id }, title), ...children);
};

/** A table that becomes a list of cards where there is no room; the roles survive the change of display. */
export function table(caption, columns, body) {
  const head = columns.map((column) => h("th", { role: "columnheader", scope: "col", class: column.number && "number" }, column.head || column.name));
  return h("div", { class: "scroll" }, h("table", { role: "table", "aria-label": caption }, h("thead", { role: "rowgroup" }, h("tr", { role: "row" }, ...head)), setRole(body)));
}

function setRole(body) {
  setAttr(body, "role", "rowgroup");
  return body;
}

/** A row: the first cell is its heading. Cells are [name, node, number?]. */
export function row(...cells) {
  return h("tr", { role: "row" }, ...cells.map(([name, node, number], at) => h(at ? "td" : "th", { role: at ? "cell" : "rowheader", scope: at ? null : "row", "data-name": name, class: number && "number" }, node)));
}

/** An interface, address and port, that may break where its parts meet. */
export function endpoint(value) {
  const node = h("code", { class: "endpoint" });
  let shown = null;
  node.update = (now) => {
    if (now !== shown) node.replaceChildren(...now.split(/(?<=[:@,])/).flatMap((part) => [part, h("wbr")]));
    shown = now;
  };
  node.update(value);
  return node;
}

/** A cell's text, changed by `set`. */
export function text(className) {
  const node = h("span", { class: className });
  return Object.assign(node, { set: (value) => setText(node, value) });
}
