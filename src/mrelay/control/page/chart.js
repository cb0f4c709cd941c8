// Rates over the last minutes, as a small line chart.

import { h, s, setAttr, setText } from "./dom.js";
import { duration, time } from "./format.js";

const [WIDTH, HEIGHT] = [600, 90];
const POINTS = 120; // that the relay keeps

/** The chart's element, and `draw({step, end}, [{name, values, kind}])`; null in values is a gap. `show` makes text. */
export function chart(title, show, least = 1) {
  const lines = s("g", {});
  const cursor = s("line", { class: "cursor", y1: 0, y2: HEIGHT, visibility: "hidden" });
  const svg = s("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img" }, grid(), lines, cursor);
  const [top, from, now] = [h("span", { class: "top" }), h("span", {}), h("span", {}, "now")];
  const last = h("span", { class: "last" });
  const read = h("p", { class: "read", "aria-hidden": "true" });
  const box = h("figure", { class: "chart" }, h("figcaption", {}, h("span", {}, title), last), h("div", { class: "plot" }, svg, top), h("p", { class: "axis", "aria-hidden": "true" }, from, read, now));
  let shown = null;
  box.draw = (frame, found) => {
    const series = found.map((one) => ({ ...one, values: padded(one.values) }));
    shown = { frame, series };
    const length = series[0].values.length;
    const most = niceAbove(Math.max(least, ...series.flatMap((one) => one.values.map((value) => value || 0))));
    lines.replaceChildren(...series.map((one) => s("path", { class: `series ${one.kind}`, d: pathOf(one.values, most) })));
    setText(top, show(most));
    setText(from, `${duration(length * frame.step)} ago`);
    setText(last, series.map((one) => `${one.name ? `${one.name} ` : ""}${shownAt(one.values, length - 1)}`).join(" · "));
    setAttr(svg, "aria-label", spoken(title, frame, series));
  };
  const shownAt = (values, at) => (values[at] === null || values[at] === undefined ? "–" : show(values[at]));
  const spoken = (name, frame, series) => `${name}, the last ${duration(POINTS * frame.step)}: ${series.map(summary).join("; ")}`;
  const summary = (one) => {
    const known = one.values.filter((value) => value !== null);
    if (!known.length) return "no figures yet";
    return `${one.name ? `${one.name} ` : ""}now ${show(known.at(-1))}, lowest ${show(Math.min(...known))}, highest ${show(Math.max(...known))}`;
  };
  svg.addEventListener("pointermove", (event) => {
    const length = shown?.series[0].values.length;
    if (!length) return;
    const at = Math.min(length - 1, Math.max(0, Math.round((event.offsetX / svg.clientWidth) * (length - 1))));
    const x = length > 1 ? (at / (length - 1)) * WIDTH : 0;
    for (const name of ["x1", "x2"]) setAttr(cursor, name, x);
    setAttr(cursor, "visibility", "visible");
    const when = time(shown.frame.end - (length - 1 - at) * shown.frame.step);
    setText(read, `${when}: ${shown.series.map((one) => `${one.name ? `${one.name} ` : ""}${shownAt(one.values, at)}`).join(" · ")}`);
  });
  svg.addEventListener("pointerleave", () => { setAttr(cursor, "visibility", "hidden"); setText(read, ""); });
  return box;
}

function grid() {
  return s("g", { class: "grid" }, ...[0.5, HEIGHT / 2, HEIGHT - 0.5].map((y) => s("line", { x1: 0, x2: WIDTH, y1: y, y2: y })));
}

/** Where there are no figures yet there is nothing to see. */
const padded = (values) => [...Array(Math.max(0, POINTS - values.length)).fill(null), ...values];

/** 1, 2 or 5 times a power of ten, not below `value`. */
function niceAbove(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].map((factor) => factor * power).find((nice) => nice >= value);
}

function pathOf(values, most) {
  let path = "";
  let gap = true;
  values.forEach((value, at) => {
    if (value === null) {
      gap = true;
      return;
    }
    const x = values.length > 1 ? (at / (values.length - 1)) * WIDTH : WIDTH;
    path += `${gap ? "M" : "L"}${x.toFixed(1)} ${(HEIGHT - 1 - (value / most) * (HEIGHT - 4)).toFixed(1)}`;
    gap = false;
  });
  return path;
}
