// What was dropped and why: of the relay, or of one rule.

import { h, setAttr, sync } from "./dom.js";
import { count, rate } from "./format.js";
import { row, section, table, text } from "./parts.js";
import { state } from "./store.js";

/** The section, and `update(drops, rates)`, both by reason; `nothing` is said while there are none. */
export function dropsTable(nothing) {
  const body = h("tbody", {});
  const none = h("p", { class: "quiet" }, nothing);
  const tableNode = table("Dropped datagrams by reason", [{ name: "Reason" }, { name: "Means" }, { name: "Per second", number: true }, { name: "In all", number: true }], body);
  const node = section("Dropped", none, tableNode);
  function update(drops, rates) {
    const reasons = Object.entries(drops).filter(([, value]) => value > 0).sort((a, b) => b[1] - a[1]);
    none.hidden = reasons.length > 0;
    tableNode.hidden = !reasons.length;
    sync(body, reasons.map(([reason, value]) => [reason, value, rates[reason] || 0]), ([reason]) => reason, dropRow);
  }
  return { node, update };
}

function dropRow([reason]) {
  const [now, all] = [text(), text()];
  const made = row(["Reason", h("code", {}, reason)], ["Means", state.reasons.drops[reason]], ["Per second", now, true], ["In all", all, true]);
  made.update = ([, value, perSecond]) => {
    now.set(rate(perSecond));
    setAttr(now, "class", perSecond > 0 ? "bad" : null);
    all.set(count(value));
  };
  return made;
}
