// The relay itself: what it runs on, its workers, and why frames took the slow path.

import { get, token } from "./api.js";
import { h, setText, sync } from "./dom.js";
import { count, duration } from "./format.js";
import { badge, row, section, table, text } from "./parts.js";
import { state } from "./store.js";

export function relayPage() {
  const facts = h("dl", { class: "facts" });
  const forget = token.get() && h("p", { class: "buttons" }, h("button", { type: "button", onclick: () => { token.forget(); dispatchEvent(new Event("token-needed")); } }, "Forget the token"));
  const workers = workerTable();
  const passed = passedTable();
  const node = h("div", {}, h("h1", {}, "Relay"), h("div", { class: "panel" }, facts, forget), workers.node, passed.node);
  return {
    title: "Relay",
    node,
    update() {
      const { health, totals } = state;
      const shown = [
        ["State", health.ready ? "serves its rules" : "starting"],
        ["Version", health.version],
        ["Up for", duration(health.uptime)],
        ["Engine", health.no_fast_path ? `${health.engine}: ${health.no_fast_path}` : health.engine],
        ["Flows", Object.entries(totals.engines).filter(([, number]) => number).map(([engine, number]) => `${count(number)} ${engine}`).join(", ") || "none"],
        ["Sends by", health.egress],
        ["Confined by", health.landlock ? `Landlock ${health.landlock}, seccomp` : "seccomp; this kernel has no Landlock"],
        ["Adds up", `received ${count(totals.received)} = matched ${count(totals.matched)} + dropped ${count(totals.dropped)}`],
        ["You may", state.access.change ? "look and change rules" : `look; ${state.access.problem}`],
      ];
      sync(facts, shown, ([term]) => term, ([term]) => {
        const value = h("dd", {});
        return Object.assign(h("div", {}, h("dt", {}, term), value), { update: ([, now]) => setText(value, now) });
      });
      passed.update();
      workers.update();
    },
  };
}

function workerTable() {
  const body = h("tbody", {});
  const node = section("Workers", table("Workers", [{ name: "Worker" }, { name: "State" }, { name: "Core", number: true }, { name: "Processor", number: true }, { name: "Flows", number: true }, { name: "Received", number: true }, { name: "Restarts", number: true }], body));
  async function update() {
    const found = await get("v1/workers").catch(() => null);
    if (found) sync(body, found.workers, (worker) => worker.worker, workerRow);
  }
  return { node, update };
}

function workerRow(worker) {
  const mark = badge();
  const [core, busy, flows, received, restarts] = [text(), text(), text(), text(), text()];
  const made = row(["Worker", String(worker.worker)], ["State", mark], ["Core", core, true], ["Processor", busy, true], ["Flows", flows, true], ["Received", received, true], ["Restarts", restarts, true]);
  made.update = (now) => {
    mark.update(now.state === "running" ? "forwarding" : "error", now.state);
    core.set(String(now.core));
    busy.set(`${now.cpu_percent.toFixed(0)} %`);
    flows.set(count(now.flows));
    received.set(count(now.received));
    restarts.set(count(now.restarts));
  };
  return made;
}

function passedTable() {
  const body = h("tbody", {});
  const node = section("Slow path", h("p", { class: "quiet" }, "Frames that the kernel's fast path left to the workers or to the host, of all traffic on its interfaces."), table("Frames that the fast path passed on", [{ name: "Reason" }, { name: "Means" }, { name: "Frames", number: true }], body));
  function update() {
    const reasons = Object.entries(state.totals.passed).filter(([, value]) => value > 0);
    node.hidden = !reasons.length;
    sync(body, reasons, ([reason]) => reason, ([reason]) => {
      const all = text();
      return Object.assign(row(["Reason", h("code", {}, reason)], ["Means", state.reasons.passed[reason]], ["Frames", all, true]), { update: ([, value]) => all.set(count(value)) });
    });
  }
  return { node, update };
}
