// Is it forwarding, and if not, where does it stop: what the relay finds when it looks.

import { get, ruleUrl } from "./api.js";
import { h, setAttr, setText } from "./dom.js";
import { ruleHref } from "./parts.js";
import { explain } from "./rule.js";

const MARKS = { ok: "✓", failed: "✕", unknown: "?", skipped: "·" };
const WORDS = { ok: "in order", failed: "stops here", unknown: "not known", skipped: "not looked at" };
const KINDS = { forwarding: "forwarding", partly: "waiting", "not forwarding": "error" };

export function whyPage(name) {
  const verdict = h("h2", {});
  const summary = h("p", {});
  const remedy = h("p", { class: "remedy" });
  const head = h("div", { class: "verdict silent" }, verdict, summary);
  const stages = h("ol", { class: "stages" });
  const again = h("button", { type: "button", onclick: look }, "Look again");
  const said = h("p", { class: "quiet", role: "status" });
  const node = h("div", {}, h("p", { class: "back" }, h("a", { href: ruleHref(name) }, name)), h("div", { class: "heading" }, h("h1", {}, `Why ${name}?`), h("p", { class: "buttons" }, again)), said, head, remedy, stages);
  async function look() {
    again.disabled = true;
    setText(said, "Looking at its traffic for a few seconds…");
    try {
      draw(await get(ruleUrl(name, "/why")));
    } catch (error) {
      head.hidden = remedy.hidden = stages.hidden = true;
      setText(said, `That could not be told: ${explain(error)}.`);
    } finally {
      again.disabled = false;
    }
  }
  function draw(found) {
    head.hidden = stages.hidden = false;
    setAttr(head, "class", `verdict ${KINDS[found.verdict]}`);
    setText(verdict, found.verdict.charAt(0).toUpperCase() + found.verdict.slice(1));
    setText(summary, found.summary);
    const stop = found.stages.find((stage) => stage.stage === found.stage);
    remedy.hidden = !stop?.remedy;
    remedy.replaceChildren(h("b", {}, "What to do: "), stop?.remedy || "");
    stages.replaceChildren(...found.stages.map(item));
    setText(said, `Looked for ${found.seconds.toFixed(1)} s.`);
  }
  head.hidden = remedy.hidden = stages.hidden = true;
  look();
  return { title: `Why ${name}?`, node, update() {} };
}

function item(stage) {
  const evidence = stage.evidence.length ? h("ul", {}, ...stage.evidence.map((one) => h("li", {}, one))) : null;
  return h("li", { class: stage.status }, h("span", { class: "mark", "aria-hidden": "true" }, MARKS[stage.status]), h("div", {}, h("h3", {}, stage.stage.charAt(0).toUpperCase() + stage.stage.slice(1), h("span", { class: "status" }, ` ${WORDS[stage.status]}`)), stage.status === "skipped" ? null : h("p", {}, stage.text), evidence));
}
