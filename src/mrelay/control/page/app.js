// The page from its start: which part is shown, who may be there, and whether the relay still answers.

import { token } from "./api.js";
import { h, setText } from "./dom.js";
import { eventsPage } from "./events.js";
import { addPage, editPage } from "./form.js";
import { time } from "./format.js";
import { loginPage } from "./login.js";
import { overview } from "./overview.js";
import { relayPage } from "./relaypage.js";
import { rulePage } from "./rule.js";
import { listen, look, state, stop, wordsOf } from "./store.js";
import { whyPage } from "./why.js";

const [main, nav, link, stale, actions] = ["main", "nav", "link", "stale", "actions"].map((id) => document.getElementById(id));
let shown = null; // the page that is shown, and whether it was drawn
let known = new Map(); // by rule: its state, to tell when it changes

const ROUTES = [
  [/^#?\/?$/, overview],
  [/^#\/add$/, addPage],
  [/^#\/events$/, eventsPage],
  [/^#\/relay$/, relayPage],
  [/^#\/rule\/([^/]+)$/, rulePage],
  [/^#\/rule\/([^/]+)\/edit$/, editPage],
  [/^#\/rule\/([^/]+)\/why$/, whyPage],
];

function lost() {
  return { title: "Not found", node: h("div", {}, h("h1", {}, "There is no such page"), h("p", {}, h("a", { href: "#/" }, "Overview"))), update() {} };
}

function route() {
  if (takeToken() || !state.ready) return; // drawn when the relay has answered
  for (const [pattern, page] of ROUTES) {
    const found = pattern.exec(location.hash);
    if (found) {
      show(page(...found.slice(1).map(decodeURIComponent)));
      return;
    }
  }
  show(lost());
}

/** An address that ends in `#token=…` opens the page with that token, which then leaves the address bar. */
function takeToken() {
  const given = /^#token=([\w.~+/=-]+)$/.exec(location.hash);
  if (!given) return false;
  token.set(given[1]);
  history.replaceState(null, "", "#/");
  stop();
  look();
  return true;
}

function show(page) {
  const first = shown === null;
  shown?.close?.();
  shown = page;
  main.replaceChildren(page.node);
  page.update();
  draw();
  document.title = `${page.title} · mrelay`;
  for (const one of nav.querySelectorAll("a")) {
    if (one.hash === (location.hash || "#/")) one.setAttribute("aria-current", "page");
    else one.removeAttribute("aria-current");
  }
  if (first) return;
  scrollTo(0, 0);
  const heading = page.node.querySelector("h1");
  heading.tabIndex = -1;
  heading.focus({ preventScroll: true });
}

function draw() {
  nav.hidden = Boolean(shown.login);
  const add = !shown.login && state.access?.change;
  actions.replaceChildren(add ? h("a", { class: "button", href: "#/add" }, "Add rule") : "");
}

/** Have somebody show a token. */
function askForToken() {
  stop();
  setText(link, "");
  show({ ...loginPage(look), login: true });
}

listen(() => {
  const { health, since } = state;
  setText(link, since ? "no answer" : health.ready ? "live" : "starting");
  link.className = `link ${since ? "off" : "on"}`;
  setText(stale, since ? `No answer from the relay since ${time(since / 1000)}. What is shown is as of then; trying again.` : "");
  document.body.classList.toggle("old", Boolean(since));
  if (!state.ready) return;
  if (!since) tell();
  if (!shown || shown.login) route();
  else shown.update();
});

/** To a screen reader: rules whose state changed, and nothing else. */
function tell() {
  const changed = state.rules.filter((rule) => known.has(rule.name) && known.get(rule.name) !== rule.state);
  known = new Map(state.rules.map((rule) => [rule.name, rule.state]));
  const spoken = changed.slice(0, 3).map((rule) => `${rule.name}: ${wordsOf(rule)}`).join(". ");
  if (spoken) setText(document.getElementById("spoken"), changed.length > 3 ? `${spoken}, and ${changed.length - 3} more rules` : spoken);
}

document.getElementById("skip").addEventListener("click", (event) => { event.preventDefault(); main.focus(); });
addEventListener("hashchange", route);
addEventListener("token-needed", askForToken);
let width = innerWidth;
addEventListener("resize", () => { if (width !== innerWidth && state.ready) { width = innerWidth; shown.update(); } });
if (!takeToken()) look();
