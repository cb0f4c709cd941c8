// What the page knows of the relay: asked for again and again while somebody looks, and told to whoever draws.

import { get, NoAnswer, Refused } from "./api.js";

const EVERY = 1000; // milliseconds between two looks, and more when answers are long
const MANY = 500; // rules; above that their states are looked at less often
const FLOWS = 300; // the busiest are enough for a picture
const LEAST = 0.5; // seconds that a rate is taken over

/** rules, totals, flows, health, access, what `reasons` mean; `since` when the relay stopped answering; `ready` after the first answers. */
export const state = { ready: false, since: null, access: null, reasons: null, health: null, rules: [], byName: new Map(), flows: [], streams: [], totals: null };

const listeners = new Set();
let before = []; // counters of the last looks
let timer = 0;
let looks = 0;
let asking = null;

/** Call `listener()` after each look; what is returned ends that. */
export function listen(listener) {
  listeners.add(listener);
  return () => listeners.delete(listener);
}

/** Look now, and go on looking. */
export function look() {
  clearTimeout(timer);
  asking ||= round().finally(() => { asking = null; });
  return asking;
}

/** Look at all of it, after something was changed: what is being asked may be from before. */
export async function lookAnew() {
  await asking;
  looks = 0;
  await look();
}

export function stop() {
  clearTimeout(timer);
  before = [];
  Object.assign(state, { ready: false, since: null, access: null, reasons: null });
}

async function round() {
  const began = performance.now();
  try {
    await fill();
    state.since = null;
  } catch (error) {
    if (error instanceof Refused && error.status === 401) state.access = { look: false };
    else if (error instanceof NoAnswer || error instanceof Refused) state.since ||= Date.now();
    else throw error;
    before = [];
  }
  if (state.access && !state.access.look) {
    stop();
    dispatchEvent(new Event("token-needed"));
    return;
  }
  for (const listener of listeners) listener();
  const took = performance.now() - began;
  if (!document.hidden) timer = setTimeout(look, Math.max(EVERY - took, 3 * took, state.since ? 2 * EVERY : 0));
}

document.addEventListener("visibilitychange", () => { if (!document.hidden && (state.ready || state.since)) look(); });

async function fill() {
  state.access ||= await get("v1/access");
  if (!state.access.look) return;
  state.reasons ||= await get("v1/reasons");
  const often = state.rules.length < MANY || looks % 5 === 0;
  looks += 1;
  const measured = state.rules.some((rule) => rule.health);
  const [stats, rules, flows, health, streams] = await Promise.all([
    get("v1/stats"),
    often ? get("v1/rules") : null,
    often ? get(`v1/flows?limit=${FLOWS}`) : null,
    often ? get("v1/health") : null,
    often && measured ? get("v1/streams") : null,
  ]);
  if (rules) state.texts = new Map(rules.rules.map((rule) => [rule.name, rule]));
  if (flows) state.flows = flows.flows;
  if (health) state.health = health;
  if (often) state.streams = streams?.streams || [];
  if (often) state.alarms = new Map([...(streams?.rules || []), ...state.streams].filter((one) => one.alarms.length).map((one) => [one.rule, one.alarms]));
  merge(stats);
  state.ready = true;
}

function merge(stats) {
  const then = before.findLast((look) => stats.time - look.time >= LEAST); // by the relay's clock: answers take longer and shorter
  const grown = (key, value) => (then && key in then.counts ? Math.max(0, value - then.counts[key]) / (stats.time - then.time) : 0);
  const counts = { received: stats.received };
  const dropRates = {};
  for (const [reason, value] of Object.entries(stats.drops)) dropRates[reason] = grown(`drop ${reason}`, (counts[`drop ${reason}`] = value));
  state.rules = stats.rules.filter((rule) => state.texts.has(rule.name)).map((rule) => view(rule, state.texts.get(rule.name), counts, grown));
  state.byName = new Map(state.rules.map((rule) => [rule.name, rule]));
  state.totals = {
    ...stats,
    dropRates,
    dropped: stats.received - stats.matched,
    receivedRate: grown("received", stats.received),
    matchedRate: grown("matched", (counts.matched = stats.matched)),
    dropRate: Object.values(dropRates).reduce((sum, value) => sum + value, 0),
    outRate: state.rules.reduce((sum, rule) => sum + rule.outputs.reduce((all, output) => all + output.pps, 0), 0),
    bps: state.rules.reduce((sum, rule) => sum + rule.bps, 0),
  };
  before = [...before.slice(-3), { time: stats.time, counts }];
}

function view(rule, text, counts, grown) {
  const outputs = rule.outputs.map((output) => {
    const key = `${rule.name} ${output.to}`;
    counts[`${key} packets`] = output.packets;
    counts[`${key} errors`] = output.errors;
    return { ...output, pps: grown(`${key} packets`, output.packets), errorRate: grown(`${key} errors`, output.errors) };
  });
  const dropRates = {};
  for (const [reason, value] of Object.entries(rule.drops)) dropRates[reason] = grown(`${rule.name} drop ${reason}`, (counts[`${rule.name} drop ${reason}`] = value));
  const errorRate = outputs.reduce((sum, output) => sum + output.errorRate, 0);
  const errors = outputs.reduce((sum, output) => sum + output.errors, 0);
  const found = { ...text, ...rule, outputs, dropRates, errorRate, errors, alarms: state.alarms.get(rule.name) || [] };
  return { ...found, kind: kindOf(found) };
}

/** How a rule is: forwarding, silent, starting, waiting or error. */
function kindOf(rule) {
  if (rule.state === "waiting: starting") return "starting";
  if (rule.state.startsWith("error")) return "error";
  if (rule.state !== "up") return "waiting";
  if (rule.errorRate > 0) return "error";
  if (rule.alarms.length) return "waiting";
  return rule.pps > 0 ? "forwarding" : "silent";
}

/** In words, beside the mark. */
export function wordsOf(rule) {
  if (rule.state !== "up") return rule.state;
  if (rule.errorRate > 0) return "up, but not all is sent";
  if (rule.alarms.length) return `up, but alarm: ${rule.alarms.join(", ")}`;
  return rule.pps > 0 ? "forwarding" : "up, silent";
}

export const MARKS = { forwarding: "●", silent: "○", starting: "…", waiting: "▲", error: "✕" };

export const troubled = (rule) => rule.kind === "waiting" || rule.kind === "error";
