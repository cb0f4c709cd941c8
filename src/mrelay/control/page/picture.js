// The picture: sources, relay and receivers, with rates on the lines between them. A lane for each rule, or, where
// there are too many to read, one lane of interfaces.

import { s, setAttr, setText } from "./dom.js";
import { perSecond, plural } from "./format.js";
import { MARKS, troubled, wordsOf } from "./store.js";

const LANES = 12; // rules; more are drawn by interface
const NODES = 6; // on a side of a lane
const NARROW = 640; // pixels; below that a lane goes down the page
const [BOX, GAP, BETWEEN] = [46, 8, 22]; // heights

/** The picture's element, and `draw(rules, flows)`. */
export function picture(label) {
  const svg = s("svg", { class: "picture", role: "group", "aria-labelledby": label });
  let drawn = "";
  let parts = [];
  svg.draw = (rules, flows) => {
    const width = Math.floor(svg.parentNode.getBoundingClientRect().width);
    if (!width) return;
    const lanes = rules.length > LANES ? [byInterface(rules)] : rules.map((rule) => laneOf(rule, flows));
    const shape = JSON.stringify([width, lanes.map((lane) => [lane.sources, lane.hub, lane.outputs].flat().map(shapeOf))]);
    if (shape !== drawn) {
      drawn = shape;
      parts = layOut(svg, lanes, width);
    }
    [...lanes.flatMap((lane) => [lane.hub, ...lane.sources, ...lane.outputs])].forEach((node, at) => parts[at](node));
  };
  return svg;
}

const shapeOf = (node) => [node.key, node.title, node.href];

function laneOf(rule, flows) {
  const mine = flows.filter((flow) => flow.rules.includes(rule.name));
  const sources = mine.map((flow) => ({ key: `${flow.interface} ${flow.vlan} ${flow.source} ${flow.group} ${flow.port}`, title: flow.source, note: `${flow.interface}${flow.vlan ? `, VLAN ${flow.vlan}` : ""}`, rate: flow.pps, kind: flow.pps > 0 ? "forwarding" : "silent" }));
  const none = [{ key: "none", title: rule.from, note: "nothing arrives", rate: 0, kind: "silent" }];
  const outputs = rule.outputs.map((output) => ({ key: output.to, title: output.to, note: output.state === "up" ? "" : output.state, rate: output.pps, kind: output.state === "up" ? (output.pps > 0 ? "forwarding" : "silent") : "waiting" }));
  const hub = { key: rule.name, title: rule.name, note: troubled(rule) ? wordsOf(rule) : rule.from, rate: rule.pps, kind: rule.kind, href: `#/rule/${encodeURIComponent(rule.name)}` };
  return { hub, sources: few(sources.length ? sources : none, "sources"), outputs: few(outputs, "outputs") };
}

function byInterface(rules) {
  const into = new Map();
  const out = new Map();
  for (const rule of rules) {
    add(into, rule.from.split(":")[0], rule, rule.pps);
    for (const output of rule.outputs) add(out, output.to.split(":")[0], rule, output.pps, output.state !== "up");
  }
  const wrong = rules.filter(troubled).length;
  const hub = { key: "relay", title: plural(rules.length, "rule"), note: wrong ? `${wrong} not as they should be` : "by interface", rate: 0, kind: wrong ? "waiting" : "forwarding" };
  return { hub, sources: few([...into.values()].map(nodeOf("in")), "interfaces"), outputs: few([...out.values()].map(nodeOf("out")), "interfaces") };
}

function add(found, name, rule, pps, wrong = false) {
  const entry = found.get(name) || { name, rules: new Set(), pps: 0, wrong: 0 };
  entry.rules.add(rule.name);
  entry.pps += pps;
  entry.wrong += wrong ? 1 : 0;
  found.set(name, entry);
}

const nodeOf = (side) => (entry) => ({
  key: `${side} ${entry.name}`,
  title: entry.name,
  note: entry.wrong ? `${plural(entry.wrong, "output")} not up` : plural(entry.rules.size, "rule"),
  rate: entry.pps,
  kind: entry.wrong ? "waiting" : entry.pps > 0 ? "forwarding" : "silent",
});

/** No more nodes than can be told apart: the rest as one. */
function few(nodes, what) {
  if (nodes.length <= NODES) return nodes;
  const busiest = [...nodes].sort((a, b) => b.rate - a.rate || (a.kind === "waiting" ? -1 : 0));
  const rest = busiest.slice(NODES - 1);
  const rate = rest.reduce((sum, node) => sum + node.rate, 0);
  const kind = rest.some((node) => node.kind === "waiting") ? "waiting" : rate > 0 ? "forwarding" : "silent";
  return [...busiest.slice(0, NODES - 1).sort((a, b) => a.key.localeCompare(b.key)), { key: "more", title: `${rest.length} more ${what}`, note: "", rate, kind }];
}

// ---- where things go ---------------------------------------------------------------------------

function layOut(svg, lanes, width) {
  const narrow = width < NARROW;
  const place = narrow ? placeDown : placeAcross;
  const nodes = [];
  const lines = [];
  let top = 0;
  const renew = [];
  for (const lane of lanes) {
    const { boxes, height } = place(lane, width, top);
    for (const side of ["sources", "outputs"]) lane[side].forEach((_, at) => lines.push(lineOf(boxes[side][at], boxes.hub, side, narrow)));
    renew.push(nodeUpdater(boxes.hub, lane.hub, nodes));
    for (const side of ["sources", "outputs"]) lane[side].forEach((node, at) => {
      const box = nodeUpdater(boxes[side][at], node, nodes);
      const line = lines[lines.length - lane.sources.length - lane.outputs.length + (side === "sources" ? at : lane.sources.length + at)];
      renew.push((now) => { box(now); line.update(now); });
    });
    top += height + BETWEEN;
  }
  const height = Math.max(0, top - BETWEEN);
  setAttr(svg, "viewBox", `0 0 ${width} ${height}`);
  setAttr(svg, "width", width);
  setAttr(svg, "height", height);
  svg.replaceChildren(...lines.map((line) => line.path), ...nodes, ...lines.map((line) => line.label));
  return renew;
}

const stack = (count) => count * BOX + (count - 1) * GAP;

function placeAcross(lane, width, top) {
  const wide = Math.min(320, Math.round(width * 0.28));
  const height = stack(Math.max(lane.sources.length, lane.outputs.length));
  const column = (x, nodes) => nodes.map((_, at) => ({ x, y: top + (height - stack(nodes.length)) / 2 + at * (BOX + GAP), width: wide, height: BOX }));
  const hub = { ...column((width - wide) / 2, [0])[0] };
  return { boxes: { hub, sources: column(0, lane.sources), outputs: column(width - wide, lane.outputs) }, height };
}

/** Sources above the rule, outputs below it, both set in a little. */
function placeDown(lane, width, top) {
  const inset = 64;
  const rows = (nodes, from) => nodes.map((_, at) => ({ x: inset, y: from + at * (BOX + GAP), width: width - inset, height: BOX }));
  const at = top + stack(lane.sources.length) + GAP;
  const below = at + BOX + GAP;
  const hub = { x: 0, y: at, width, height: BOX };
  return { boxes: { hub, sources: rows(lane.sources, top), outputs: rows(lane.outputs, below) }, height: below + stack(lane.outputs.length) - top };
}

// ---- what is drawn -----------------------------------------------------------------------------

/** As much of the text as fits: letters of one width. */
function fitted(text, width, size = 7.4) {
  const most = Math.floor(width / size);
  return text.length > most ? `${text.slice(0, Math.max(1, most - 1))}…` : text;
}

function nodeUpdater(box, node, nodes) {
  const mark = s("text", { class: "mark", x: box.x + 12 });
  const title = s("text", { x: box.x + 28 }, fitted(node.title, box.width - 36));
  const note = s("text", { class: "note", x: box.x + 28, y: box.y + 37 });
  const whole = s("title", {});
  const group = s(node.href ? "a" : "g", { href: node.href }, whole, s("rect", { ...box, rx: 7 }), mark, title, note);
  nodes.push(group);
  return (now) => {
    setAttr(group, "class", `node ${now.kind}${node.href ? " hub" : ""}`);
    for (const one of [mark, title]) setAttr(one, "y", box.y + (now.note ? 20 : 28));
    setText(mark, MARKS[now.kind]);
    setText(note, fitted(now.note, box.width - 36, 6.7));
    const said = now.note && !node.href ? `: ${now.note}` : "";
    setText(whole, `${now.title}${said}${node.href ? ` from ${now.note}: ${now.kind}, ${perSecond(now.rate)}` : ""}`);
  };
}

function lineOf(box, hub, side, narrow) {
  const inward = side === "sources";
  const [d, x, y] = narrow ? elbow(box, hub, inward) : curve(box, hub, inward);
  const path = s("path", { d, "aria-hidden": "true" });
  const label = s("text", { x, y, "text-anchor": narrow || inward ? "start" : "end" });
  const update = (node) => {
    const speed = node.rate > 0 ? Math.min(3, 1 + Math.floor(Math.log10(node.rate + 1) / 2)) : 0;
    setAttr(path, "class", `line ${node.kind} speed${speed}`);
    setText(label, node.kind === "waiting" || node.title.endsWith("sources") ? "" : perSecond(node.rate));
    setAttr(label, "class", `rate ${node.kind}`);
  };
  return { path, label, update };
}

function curve(box, hub, inward) {
  const [from, to] = inward ? [box, hub] : [hub, box];
  const [x1, y1, x2, y2] = [from.x + from.width, from.y + BOX / 2, to.x, to.y + BOX / 2];
  const middle = (x1 + x2) / 2;
  const [x, y] = inward ? [x1 + 9, y1] : [x2 - 9, y2]; // where the line is still level, beside the outer box
  return [`M${x1} ${y1}C${middle} ${y1} ${middle} ${y2} ${x2} ${y2}`, x, y - 7];
}

function elbow(box, hub, inward) {
  const y = box.y + BOX / 2;
  return inward ? [`M${box.x} ${y}H14V${hub.y}`, 19, y - 6] : [`M14 ${hub.y + BOX}V${y}H${box.x}`, 19, y - 6];
}
