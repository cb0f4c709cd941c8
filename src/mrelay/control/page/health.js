// A rule's streams as a listener has them, where the rule asks for that: what is lost, out of order, late.

import { chart } from "./chart.js";
import { h, setAttr, setText, sync } from "./dom.js";
import { count } from "./format.js";
import { endpoint, row, section, table, text } from "./parts.js";
import { state } from "./store.js";

const POINTS = 120;
const STEP = 2; // seconds from one point to the next

const percent = (ratio) => `${(ratio * 100).toFixed(ratio < 0.1 ? 2 : 1)} %`;
const milliseconds = (seconds) => `${(seconds * 1000).toFixed(seconds < 0.01 ? 2 : 0)} ms`;
const or = (value, show) => (value === null ? "–" : show(value));

/** The section, and `update(rule)`; the charts begin when it is made, for nobody keeps these figures. */
export function healthOf(name) {
  const body = h("tbody", {});
  const none = h("p", { class: "quiet" });
  const charts = { loss: chart("Lost, since this page was opened", percent, 0.001), jitter: chart("Jitter, since this page was opened", milliseconds, 0.001) };
  const series = { loss: [], jitter: [] };
  const panels = Object.fromEntries(Object.entries(charts).map(([key, one]) => [key, h("div", { class: "panel", hidden: true }, one)]));
  const drawn = h("div", { class: "charts" }, ...Object.values(panels));
  const tableNode = table("Stream health", [{ name: "Source" }, { name: "Format" }, { name: "Lost lately", number: true }, { name: "Lost", number: true }, { name: "Reordered", number: true }, { name: "Twice", number: true }, { name: "Jitter", number: true }, { name: "Silent for", number: true }, { name: "Alarms" }], body);
  const node = section("Stream health", none, drawn, tableNode);
  let due = 0;
  function note(streams) {
    if (Date.now() < due) return;
    due = Date.now() + STEP * 1000;
    for (const [key, values] of Object.entries(series)) {
      const known = streams.map((stream) => stream[key]).filter((value) => value !== null);
      values.push(known.length ? Math.max(...known) : null);
      if (values.length > POINTS) values.shift();
      panels[key].hidden = values.every((value) => value === null); // not every format tells of it
      charts[key].draw({ step: STEP, end: Date.now() / 1000 }, [{ name: "", values, kind: key === "loss" ? "bad" : "good" }]);
    }
  }
  function update(rule) {
    node.hidden = !rule.health;
    if (!rule.health) return;
    const streams = state.streams.filter((stream) => stream.rule === name);
    setText(none, streams.length ? "" : "No stream of this rule has been heard.");
    tableNode.hidden = drawn.hidden = !streams.length;
    sync(body, streams, (stream) => `${stream.interface} ${stream.vlan} ${stream.source} ${stream.group} ${stream.port}`, streamRow);
    note(streams);
  }
  return { node, update };
}

function streamRow(stream) {
  const cells = Object.fromEntries(["format", "loss", "lost", "reordered", "duplicates", "jitter", "silence", "alarms"].map((key) => [key, text()]));
  const made = row(["Source", endpoint(`${stream.source} ${stream.group}:${stream.port}`)], ["Format", cells.format], ["Lost lately", cells.loss, true], ["Lost", cells.lost, true], ["Reordered", cells.reordered, true], ["Twice", cells.duplicates, true], ["Jitter", cells.jitter, true], ["Silent for", cells.silence, true], ["Alarms", cells.alarms]);
  made.update = (now) => {
    cells.format.set(now.seen === "all" ? now.format : `${now.format}, ${now.seen}`);
    for (const key of ["lost", "reordered", "duplicates"]) cells[key].set(or(now[key], count));
    cells.loss.set(or(now.loss, percent));
    cells.jitter.set(or(now.jitter, milliseconds));
    cells.silence.set(now.silence < 1 ? "–" : `${now.silence.toFixed(0)} s`);
    cells.alarms.set(now.alarms.length ? `▲ ${now.alarms.join(", ")}` : "none");
    setAttr(cells.alarms, "class", now.alarms.length ? "bad" : null);
  };
  return made;
}
