// The overview: is it working, and if not, what isn't.

import { get } from "./api.js";
import { chart } from "./chart.js";
import { h, setAttr, setText, sync } from "./dom.js";
import { dropsTable } from "./drops.js";
import { bits, count, perSecond, plural, rate } from "./format.js";
import { badge, endpoint, row, ruleBadge, ruleHref, section, table, text } from "./parts.js";
import { picture } from "./picture.js";
import { state, troubled, wordsOf } from "./store.js";

const PAGE = 50; // rows of the table at a time
const HISTORY = 5000; // milliseconds

export function overview() {
  const heading = h("h1", {});
  const trouble = h("ul", { class: "trouble" });
  const tiles = tilesOf();
  const drawing = picture("h-streams");
  const rates = chart("Datagrams a second", perSecond);
  const rules = rulesTable();
  const drops = dropsTable("Nothing was dropped since the relay started.");
  const hasRules = [section("Streams", h("div", { class: "panel" }, h("div", {}, drawing))), section("Last ten minutes", h("div", { class: "panel" }, rates)), rules.node];
  const none = h("div", { class: "panel empty" }, h("p", {}, "No rules yet. A rule says which stream to take in, and where to send it."), h("p", {}, h("a", { class: "button primary", href: "#/add" }, "Add a rule")));
  const node = h("div", {}, h("div", { class: "verdict" }, heading), trouble, tiles.node, none, ...hasRules, drops.node);
  let due = 0;
  async function history() {
    if (Date.now() < due) return;
    due = Date.now() + HISTORY;
    const found = await get("v1/history").catch(() => null);
    if (found) rates.draw(found, seriesOf(found));
  }
  return {
    title: "Overview",
    node,
    update() {
      const wrong = state.rules.filter(troubled);
      setText(heading, verdict(state.rules, wrong));
      setAttr(heading.parentNode, "class", `verdict ${wrong.length ? "waiting" : state.rules.length ? "forwarding" : "silent"}`);
      sync(trouble, wrong.slice(0, 5), (rule) => rule.name, troubleItem);
      none.hidden = state.rules.length > 0;
      for (const part of hasRules) part.hidden = !state.rules.length;
      tiles.update();
      rules.update();
      drops.update(state.totals.drops, state.totals.dropRates);
      if (state.rules.length) {
        drawing.draw(state.rules, state.flows);
        history();
      }
    },
  };
}

function verdict(rules, wrong) {
  if (!rules.length) return "Nothing to forward";
  if (wrong.length) return `${count(wrong.length)} of ${plural(rules.length, "rule")} ${wrong.length === 1 ? "needs" : "need"} attention`;
  const silent = rules.filter((rule) => rule.kind === "silent").length;
  if (silent === rules.length) return `${rules.length === 1 ? "The rule is" : `All ${count(rules.length)} rules are`} up, nothing arrives`;
  const all = rules.length === 1 ? "The rule is" : `All ${count(rules.length)} rules are`;
  return silent ? `${all} up; ${count(silent)} of them ${silent === 1 ? "is" : "are"} silent` : `${all} forwarding`;
}

function troubleItem(rule) {
  const state_ = badge(rule.kind);
  const node = h("li", {}, h("a", { href: ruleHref(rule.name) }, rule.name), state_, h("a", { href: `${ruleHref(rule.name)}/why`, "aria-label": `Why? (${rule.name})` }, "Why?"));
  node.update = (now) => state_.update(now.kind, wordsOf(now));
  return node;
}

function seriesOf(found) {
  const drops = found.received.map((_, at) => Object.values(found.drops).reduce((sum, values) => sum + values[at], 0));
  return [{ name: "matched", values: found.matched, kind: "good" }, { name: "dropped", values: drops, kind: "bad" }];
}

function tilesOf() {
  const made = [["Received", ""], ["Sent", ""], ["Dropped", ""], ["Flows", ""]].map(([name]) => ({ name, value: h("dd", {}), note: h("dd", { class: "note" }) }));
  const node = h("dl", { class: "tiles" }, ...made.map((tile) => h("div", {}, h("dt", {}, tile.name), tile.value, tile.note)));
  const show = (at, value, note, kind = "") => {
    setText(made[at].value, value);
    setText(made[at].note, note);
    setAttr(made[at].value.parentNode, "class", kind);
  };
  return {
    node,
    update() {
      const all = state.totals;
      show(0, perSecond(all.receivedRate), `${count(all.received)} in all`);
      show(1, perSecond(all.outRate), `to ${plural(state.rules.reduce((sum, rule) => sum + rule.outputs.length, 0), "output")}`);
      const share = all.received ? all.dropped / all.received : 0;
      show(2, perSecond(all.dropRate), all.dropped ? `${count(all.dropped)} in all, ${share < 0.001 ? "under 0.1" : (share * 100).toFixed(1)}\u00a0%` : "none so far", all.dropRate > 0 ? "alert" : "");
      const kernel = (all.engines.ebpf || 0) + (all.engines.xdp || 0);
      show(3, count(all.flows), kernel ? `${count(kernel)} in the kernel` : `engine ${state.health.engine}`);
    },
  };
}

// ---- the rules ---------------------------------------------------------------------------------

const COLUMNS = [
  { key: "name", name: "Rule", of: (rule) => rule.name },
  { key: "state", name: "State", of: (rule) => WORST.indexOf(rule.kind) },
  { key: "from", name: "From", of: (rule) => rule.from },
  { key: "to", name: "To", of: (rule) => rule.to.join(" ") },
  { key: "pps", name: "Packets/s", number: true, of: (rule) => rule.pps },
  { key: "bps", name: "Bitrate", number: true, of: (rule) => rule.bps },
  { key: "errors", name: "Not sent", number: true, of: (rule) => rule.errors },
];

const WORST = ["error", "waiting", "starting", "forwarding", "silent"];
const order = { key: "state", down: false, filter: "", most: PAGE }; // as the reader left it: what is wrong comes first

function rulesTable() {
  const body = h("tbody", {});
  const search = h("input", { type: "search", id: "filter", value: order.filter, autocomplete: "off", spellcheck: "false", oninput: () => { order.filter = search.value; order.most = PAGE; update(); } });
  const found = h("p", { class: "quiet", id: "found" });
  const more = h("button", { type: "button", onclick: () => { order.most += PAGE; update(); } });
  const heads = COLUMNS.map((column) => ({ ...column, head: h("button", { type: "button", onclick: () => sortBy(column) }, column.name, h("span", { class: "arrow", "aria-hidden": "true" })) }));
  const node = section("Rules", h("p", { class: "filter" }, h("label", { for: "filter" }, "Filter"), search), table("Rules", heads, body), found, more);
  function sortBy(column) {
    order.down = order.key === column.key ? !order.down : Boolean(column.number);
    order.key = column.key;
    update();
  }
  function update() {
    const words = order.filter.toLowerCase().split(/\s+/).filter(Boolean);
    const shown = state.rules.filter((rule) => words.every((word) => `${rule.name} ${rule.state} ${wordsOf(rule)} ${rule.from} ${rule.to.join(" ")}`.toLowerCase().includes(word)));
    const column = COLUMNS.find((one) => one.key === order.key);
    const sign = order.down ? -1 : 1;
    shown.sort((a, b) => sign * compare(column.of(a), column.of(b)) || compare(a.name, b.name));
    for (const one of heads) {
      setAttr(one.head.parentNode, "aria-sort", one.key === order.key ? (order.down ? "descending" : "ascending") : null);
      setText(one.head.lastChild, one.key === order.key ? (order.down ? "▼" : "▲") : "");
    }
    sync(body, shown.slice(0, order.most), (rule) => rule.name, ruleRow);
    more.hidden = shown.length <= order.most;
    setText(more, `Show ${Math.min(PAGE, shown.length - order.most)} more`);
    setText(found, shown.length === state.rules.length && more.hidden ? "" : `${count(Math.min(order.most, shown.length))} of ${plural(shown.length, "rule")} shown${words.length ? `, of ${count(state.rules.length)}` : ""}`);
  }
  return { node, update };
}

const compare = (a, b) => (typeof a === "number" ? a - b : a.localeCompare(b, "en", { numeric: true }));

function ruleRow(first) {
  const [pps, bps, errors] = [text(), text(), text()];
  const from = endpoint(first.from);
  const to = h("span", { class: "list" });
  const mark = ruleBadge();
  const node = row(["Rule", h("a", { href: ruleHref(first.name) }, first.name)], ["State", mark], ["From", from], ["To", to], ["Packets/s", pps, true], ["Bitrate", bps, true], ["Not sent", errors, true]);
  let last = "";
  node.update = (rule) => {
    mark.updateRule(rule);
    from.update(rule.from);
    if (last !== rule.to.join()) {
      last = rule.to.join();
      to.replaceChildren(...rule.to.slice(0, 3).map(endpoint), rule.to.length > 3 ? h("span", { class: "quiet" }, `and ${rule.to.length - 3} more`) : "");
    }
    pps.set(rate(rule.pps));
    bps.set(bits(rule.bps));
    errors.set(count(rule.errors));
    setAttr(errors, "class", rule.errorRate > 0 ? "bad" : null);
  };
  return node;
}
