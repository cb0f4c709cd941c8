// What happened lately, as it happens.

import { get, stream } from "./api.js";
import { h, setText } from "./dom.js";
import { time } from "./format.js";
import { ruleHref } from "./parts.js";

const KEPT = 300; // rows
const AGAIN = 3000; // milliseconds until a stream that broke off is asked for again
const BAD = new Set(["rule_waiting", "interface_down", "worker_died", "drops_rising"]);
const GOOD = new Set(["rule_up", "interface_up", "worker_started", "drops_settled"]);

function kindOf(event) {
  if (event.type === "alarm") return event.raised ? "bad" : "good";
  if (event.type === "output_state") return event.state === "up" ? "good" : "bad";
  return BAD.has(event.type) ? "bad" : GOOD.has(event.type) ? "good" : "mere";
}

const MARKS = { bad: "▲", good: "●", mere: "·" };

/** A list that follows the events for which `wanted(event)`, newest first, until `stop`. */
export function eventList(wanted = () => true) {
  const list = h("ol", { class: "events" });
  const none = h("p", { class: "quiet" }, "Nothing yet.");
  const ending = new AbortController();
  let held = null; // what comes while the list stands still
  function add(events) {
    const rows = events.filter(wanted).slice(-KEPT).reverse();
    if (held) {
      held.unshift(...rows);
      return rows.length;
    }
    list.prepend(...rows.map(item));
    while (list.childElementCount > KEPT) list.lastElementChild.remove();
    none.hidden = list.childElementCount > 0;
    return rows.length;
  }
  const node = h("div", {}, none, list);
  follow(add, ending.signal);
  return {
    node,
    stop: () => ending.abort(),
    pause() { held = []; },
    resume() { const rows = held; held = null; add(rows.reverse()); },
    held: () => (held ? held.length : 0),
  };
}

function item(event) {
  const kind = kindOf(event);
  const words = event.rule && !event.type.startsWith("rule_removed") ? withLink(event) : [event.text];
  return h("li", { class: kind }, h("time", { datetime: new Date(event.time * 1000).toISOString() }, time(event.time)), h("span", { class: "mark", "aria-hidden": "true" }, MARKS[kind]), h("span", {}, ...words));
}

function withLink(event) {
  const [before, after] = event.text.split(`'${event.rule}'`);
  return after === undefined ? [event.text] : [before, h("a", { href: ruleHref(event.rule) }, event.rule), after];
}

/** All events that are kept, then each new one; again after a break. */
async function follow(add, signal) {
  let place = null;
  while (!signal.aborted) {
    try {
      if (place === null) {
        const page = await get("v1/events");
        add(page.events);
        place = `${page.run}:${page.last}`;
      }
      for await (const message of stream(`v1/events/stream?since=${place}`, signal)) {
        if (message.type === "hello" && message.data.restarted) place = null;
        if (message.type !== "hello") add([message.data]);
        if (place === null) break;
        place = message.id;
      }
    } catch (error) {
      if (signal.aborted) return;
      if (error.status === 401) return;
    }
    await new Promise((done) => { setTimeout(done, place === null ? 0 : AGAIN); });
  }
}

export function eventsPage() {
  const list = eventList();
  const button = h("button", { type: "button", "aria-pressed": "false" }, "Hold still");
  let paused = false;
  button.addEventListener("click", () => {
    paused = !paused;
    if (paused) list.pause();
    else list.resume();
    button.setAttribute("aria-pressed", paused);
    update();
  });
  function update() {
    const count = list.held();
    setText(button, paused ? `Go on${count ? `, ${count} new` : ""}` : "Hold still");
  }
  const node = h("div", {}, h("div", { class: "heading" }, h("h1", {}, "Events"), h("p", { class: "buttons" }, button)), h("div", { class: "panel" }, list.node));
  return { title: "Events", node, update, close: list.stop };
}
