// One rule: how it is, where it goes, what it carries, what happened to it; and its removal.

import { ask, get, NoAnswer, Refused, ruleUrl, sentence } from "./api.js";
import { chart } from "./chart.js";
import { h, say, setAttr, setText, sync } from "./dom.js";
import { dropsTable } from "./drops.js";
import { eventList } from "./events.js";
import { healthOf } from "./health.js";
import { bits, count, perSecond, rate } from "./format.js";
import { badge, endpoint, kindOfOutput, row, ruleBadge, ruleHref, section, table, text } from "./parts.js";
import { picture } from "./picture.js";
import { lookAnew, state } from "./store.js";

const HISTORY = 5000; // milliseconds

export function rulePage(name) {
  const mark = ruleBadge();
  const facts = h("dl", { class: "facts" });
  const actions = h("p", { class: "buttons" });
  const drawing = picture("h-path");
  const charts = { pps: chart("Datagrams a second", perSecond), bps: chart("Payload", bits), errors: chart("Not sent, datagrams a second", perSecond) };
  const outputs = outputTable();
  const drops = dropsTable("This rule passed on all that it took.");
  const flows = flowTable();
  const health = healthOf(name);
  const happened = eventList((event) => event.rule === name);
  const whole = h("div", {}, h("div", { class: "panel" }, facts), section("Path", h("div", { class: "panel" }, h("div", {}, drawing))), section("Last ten minutes", h("div", { class: "charts" }, ...Object.values(charts).map((one) => h("div", { class: "panel" }, one)))), health.node, outputs.node, drops.node, flows.node, section("Events", h("div", { class: "panel" }, happened.node)));
  const gone = h("p", { class: "panel empty" }, `There is no rule ${name}.`);
  const node = h("div", {}, h("p", { class: "back" }, h("a", { href: "#/" }, "All rules")), h("div", { class: "heading" }, h("h1", {}, name), mark, actions), gone, whole);
  let due = 0;
  async function history() {
    if (Date.now() < due) return;
    due = Date.now() + HISTORY;
    const found = await get(ruleUrl(name, "/history")).catch(() => null);
    if (found) for (const [key, one] of Object.entries(charts)) one.draw(found, [{ name: "", values: found[key], kind: key === "errors" ? "bad" : "good" }]);
  }
  return {
    title: name,
    node,
    update() {
      const rule = state.byName.get(name);
      gone.hidden = Boolean(rule);
      whole.hidden = actions.hidden = mark.hidden = !rule;
      if (!rule) return;
      mark.updateRule(rule);
      if (!actions.childElementCount) actions.append(...buttonsOf(rule));
      drawFacts(facts, rule);
      drawing.draw([rule], state.flows);
      outputs.update(rule);
      drops.update(rule.drops, rule.dropRates);
      flows.update(rule);
      health.update(rule);
      history();
    },
    close: happened.stop,
  };
}

function buttonsOf(rule) {
  const why = h("a", { class: "button", href: `${ruleHref(rule.name)}/why` }, "Why?");
  if (!state.access.change) return [h("span", { class: "quiet" }, "You may only look"), why];
  return [why, h("a", { class: "button", href: `${ruleHref(rule.name)}/edit` }, "Edit"), h("button", { type: "button", class: "danger", onclick: () => confirmRemoval(state.byName.get(rule.name) || rule) }, "Remove")];
}

function drawFacts(list, rule) {
  const allowed = [rule.link_local && "link-local groups", rule.allow_loop && "loops"].filter(Boolean).join(", ");
  const facts = [["From", rule.from], ["Now", `${perSecond(rule.pps)}, ${bits(rule.bps)}`], ["In all", `${count(rule.packets)} datagrams`], ["Rate limit", rule.rate], ["Health", rule.health], ["Allowed", allowed]].filter(([, value]) => value);
  sync(list, facts, ([term]) => term, ([term]) => {
    const value = h("dd", {});
    return Object.assign(h("div", {}, h("dt", {}, term), value), { update: ([, now]) => setText(value, now) });
  });
}

function outputTable() {
  const body = h("tbody", {});
  const node = section("Outputs", table("Outputs", [{ name: "To" }, { name: "State" }, { name: "Packets/s", number: true }, { name: "Sent", number: true }, { name: "Not sent", number: true }], body));
  const update = (rule) => sync(body, rule.outputs, (output) => output.to, (output) => {
    const mark = badge();
    const [now, sent, errors] = [text(), text(), text()];
    const made = row(["To", endpoint(output.to)], ["State", mark], ["Packets/s", now, true], ["Sent", sent, true], ["Not sent", errors, true]);
    made.update = (latest) => {
      mark.update(kindOfOutput(latest), latest.state);
      now.set(rate(latest.pps));
      sent.set(count(latest.packets));
      errors.set(count(latest.errors));
      setAttr(errors, "class", latest.errorRate > 0 ? "bad" : null);
    };
    return made;
  });
  return { node, update };
}

function flowTable() {
  const body = h("tbody", {});
  const none = h("p", { class: "quiet" }, "No flow of this rule is among the busiest of the relay.");
  const tableNode = table("Flows", [{ name: "Source" }, { name: "To" }, { name: "Packets/s", number: true }, { name: "Bitrate", number: true }, { name: "Carried by" }], body);
  const node = section("Flows", none, tableNode);
  const keyOf = (flow) => `${flow.interface} ${flow.vlan} ${flow.source} ${flow.group} ${flow.port} ${flow.worker}`;
  const update = (rule) => {
    const mine = state.flows.filter((flow) => flow.rules.includes(rule.name)).slice(0, 50);
    none.hidden = mine.length > 0;
    tableNode.hidden = !mine.length;
    sync(body, mine, keyOf, (flow) => {
      const [now, payload, engine] = [text(), text(), text()];
      const group = flow.group.includes(":") ? `[${flow.group}]` : flow.group;
      const made = row(["Source", h("code", {}, flow.source)], ["To", endpoint(`${flow.interface}:${group}:${flow.port}${flow.vlan ? `,vlan=${flow.vlan}` : ""}`)], ["Packets/s", now, true], ["Bitrate", payload, true], ["Carried by", engine]);
      made.update = (latest) => {
        now.set(rate(latest.pps));
        payload.set(bits(latest.bps));
        engine.set(latest.why ? `${latest.engine}: ${latest.why}` : latest.engine);
      };
      return made;
    });
  };
  return { node, update };
}

// ---- removal -----------------------------------------------------------------------------------

function confirmRemoval(rule) {
  const wrong = h("p", { class: "wrong", role: "alert" });
  const go = h("button", { type: "submit", class: "danger" }, "Remove it");
  const stay = h("button", { type: "button", autofocus: true, onclick: () => dialog.close() }, "Keep it");
  const what = rule.kind === "forwarding" ? `It forwards ${perSecond(rule.pps)} now. ` : "";
  const form = h("form", { method: "dialog" }, h("h2", { id: "remove" }, `Remove ${rule.name}?`), h("p", {}, `${what}What goes to ${rule.to.length === 1 ? rule.to[0] : `its ${rule.to.length} outputs`} by this rule alone ends at once.`), wrong, h("p", { class: "buttons" }, stay, go));
  const dialog = h("dialog", { "aria-labelledby": "remove", onclose: () => dialog.remove() }, form);
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    go.disabled = true;
    const whole = plain(rule.name);
    try {
      await ask("DELETE", ruleUrl(rule.name));
      dialog.close();
      location.hash = "#/";
      say(`Rule ${rule.name} was removed.`, ["Put it back", () => putBack(whole)]);
      lookAnew();
    } catch (error) {
      go.disabled = false;
      setText(wrong, explain(error));
    }
  });
  document.body.append(dialog);
  dialog.showModal();
}

/** The rule as the API takes it: what /v1/rules says of it, but for how it is. */
export function plain(name) {
  const { state: _, outputs: __, ...rule } = state.texts.get(name);
  return Object.fromEntries(Object.entries(rule).filter(([, value]) => value !== null));
}

async function putBack(rule) {
  try {
    await ask("POST", "v1/rules", rule);
    say(`Rule ${rule.name} is back.`);
    location.hash = ruleHref(rule.name);
    lookAnew();
  } catch (error) {
    say(`Rule ${rule.name} could not be put back: ${explain(error)}`);
  }
}

export function explain(error) {
  if (error instanceof Refused) return error.errors.map(sentence).join("; ");
  if (error instanceof NoAnswer) return `${error.message}; nothing is known to have changed, try again`;
  throw error;
}
