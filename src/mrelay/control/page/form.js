// A rule, added or changed. What is wrong is said by the relay, which checks it as it checks the config file.

import { ask, Refused, ruleUrl } from "./api.js";
import { h, say, setAttr, setText } from "./dom.js";
import { explain, plain } from "./rule.js";
import { ruleHref } from "./parts.js";
import { lookAnew, state } from "./store.js";

const HINTS = {
  name: "Letters, digits, dots, dashes: studio-a",
  from: "INTERFACE:GROUP:PORT, with SOURCE@ before the group for one source: eth0:10.1.1.9@232.1.1.1:5000",
  to: "INTERFACE:ADDRESS:PORT, a group or a host; options after commas: eth1:239.2.2.2:6000,ttl=8",
  health: "Measures loss, order and jitter: auto, rtp, mpegts; with alarms: rtp,loss=0.1%,silence=5s. Empty: no",
  rate: "What may pass: 10kpps, 50Mbit/s, or both with a comma. Empty: all",
};

export function addPage() {
  return formPage("Add a rule", null);
}

export function editPage(name) {
  return formPage(`Edit ${name}`, name);
}

function formPage(title, name) {
  const heading = h("h1", {}, title);
  const place = h("div", {});
  const node = h("div", {}, h("p", { class: "back" }, h("a", { href: name ? ruleHref(name) : "#/" }, name || "All rules")), heading, place);
  return {
    title,
    node,
    update() {
      if (place.childElementCount) return; // what somebody types stays
      if (!state.access.change) place.append(h("div", { class: "panel" }, h("p", {}, `You can't change anything here: ${state.access.problem}.`), h("p", { class: "quiet" }, `To change that: ${state.access.remedy}.`)));
      else if (name && !state.byName.has(name)) place.append(h("p", { class: "panel empty" }, `There is no rule ${name}.`));
      else place.append(ruleForm(name ? plain(name) : null));
    },
  };
}

function ruleForm(old) {
  const fields = new Map(); // by the relay's keys
  const summary = h("div", { class: "summary", tabindex: "-1", role: "group", "aria-labelledby": "summary", hidden: true });
  const name = field("name", "Name", HINTS.name, old?.name, { readonly: Boolean(old) });
  const from = field("from", "From", HINTS.from, old?.from);
  const outputs = h("div", { class: "outputs" });
  const limit = field("rate", "Rate limit (optional)", HINTS.rate, old?.rate);
  const health = field("health", "Stream health (optional)", HINTS.health, old?.health);
  const local = check("link_local", "Take link-local groups (224.0.0.0/24, ff02::/16)", old?.link_local);
  const loop = check("allow_loop", "Allow that packets go round", old?.allow_loop);
  for (const one of [name, from, limit, health, local, loop]) fields.set(one.key, one);
  const another = h("button", { type: "button", onclick: () => { addOutput("").input.focus(); } }, "Another output");
  const go = h("button", { type: "submit", class: "primary" }, old ? "Save" : "Add the rule");
  const cancel = h("a", { class: "button", href: old ? ruleHref(old.name) : "#/" }, "Cancel");
  let rows = [];
  function addOutput(value) {
    const one = field("to", "To", rows.length ? "" : HINTS.to, value);
    const remove = h("button", { type: "button", class: "plain", onclick: () => { rows = rows.filter((other) => other !== one); one.node.remove(); number(); (rows.at(-1)?.input || another).focus(); } }, "Remove");
    one.remove = remove;
    one.line.append(remove);
    rows.push(one);
    outputs.append(one.node);
    number();
    return one;
  }
  function number() {
    rows.forEach((one, at) => {
      setText(one.label, rows.length > 1 ? `To, output ${at + 1}` : "To");
      setAttr(one.remove, "aria-label", `Remove output ${at + 1}`);
      one.remove.hidden = rows.length === 1;
    });
  }
  for (const to of old?.to || [""]) addOutput(to);
  const form = h("form", { class: "panel form", novalidate: true }, summary, name.node, from.node, h("fieldset", {}, h("legend", {}, "Outputs"), outputs, another), limit.node, health.node, h("fieldset", {}, h("legend", {}, "Refused unless allowed"), local.node, loop.node), h("p", { class: "buttons" }, go, cancel));
  const whole = () => {
    const texts = Object.fromEntries([name, from, limit, health].map((one) => [one.key, one.input.value.trim()]).filter(([key, value]) => value || key === "name" || key === "from"));
    const to = rows.map((one) => one.input.value.trim()).filter((value, at) => value || at === 0);
    return { ...texts, to, link_local: local.input.checked, allow_loop: loop.input.checked };
  };
  function showWrong(errors) {
    const filled = rows.filter((one, at) => one.input.value.trim() || at === 0);
    const all = [...fields.values(), ...rows];
    const said = new Map();
    for (const error of errors) {
      const at = /^to\[(\d+)\]/.exec(error.key);
      const one = at ? filled[Number(at[1])] : error.key.startsWith("to") ? rows[0] : fields.get(/^\w*/.exec(error.key)[0]);
      said.set(one, [...(said.get(one) || []), error]);
    }
    for (const one of all) one.wrong(said.get(one) || []);
    const items = all.filter((one) => said.has(one)).map((one) => h("li", {}, h("a", { href: `#${one.input.id}`, onclick: (event) => { event.preventDefault(); one.input.focus(); } }, `${one.label.textContent}: ${said.get(one).map((error) => error.problem).join("; ")}`)));
    const others = (said.get(undefined) || []).map((error) => h("li", {}, error.remedy ? `${error.problem}: ${error.remedy}` : error.problem));
    summary.hidden = !errors.length;
    summary.replaceChildren(h("h2", { id: "summary" }, old ? "Not saved" : "Not added"), h("ul", {}, ...items, ...others));
    if (errors.length) summary.focus();
  }
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    go.disabled = true;
    try {
      const rule = whole();
      await (old ? ask("PUT", ruleUrl(old.name), rule) : ask("POST", "v1/rules", rule));
      await lookAnew();
      say(`Rule ${rule.name} was ${old ? "saved" : "added"}.`);
      location.hash = ruleHref(rule.name);
    } catch (error) {
      go.disabled = false;
      showWrong(error instanceof Refused ? error.errors : [{ key: "?", problem: explain(error), remedy: "" }]);
    }
  });
  return form;
}

let serial = 0;

/** A labelled input with a hint, and place for what is wrong with it. */
function field(key, name, hint, value, more) {
  const id = `field-${(serial += 1)}`;
  const label = h("label", { for: id }, name);
  const note = h("p", { class: "hint", id: `${id}-hint`, hidden: !hint }, hint);
  const error = h("p", { class: "wrong", id: `${id}-wrong` });
  const input = h("input", { id, name: key, type: "text", autocomplete: "off", autocapitalize: "none", spellcheck: "false", "aria-describedby": `${id}-hint ${id}-wrong`, ...more });
  input.value = value || "";
  const line = h("div", { class: "line" }, input);
  return { key, label, input, line, node: h("div", { class: "field" }, label, note, line, error), wrong: (errors) => showError(input, error, errors) };
}

function check(key, name, value) {
  const id = `field-${(serial += 1)}`;
  const error = h("p", { class: "wrong", id: `${id}-wrong` });
  const input = h("input", { id, name: key, type: "checkbox", "aria-describedby": `${id}-wrong` });
  input.checked = Boolean(value);
  const label = h("label", { for: id }, name);
  return { key, label, input, node: h("div", { class: "check" }, input, label, error), wrong: (errors) => showError(input, error, errors) };
}

function showError(input, place, errors) {
  setAttr(input, "aria-invalid", errors.length ? "true" : null);
  place.replaceChildren(...errors.map((error) => h("span", {}, h("b", {}, `${capital(error.problem)}.`), ` ${capital(error.remedy)}${error.remedy ? "." : ""}`)));
}

const capital = (words) => words.charAt(0).toUpperCase() + words.slice(1);
