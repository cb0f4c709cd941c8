// Who comes over TCP shows a token; it stays in this tab.

import { get, NoAnswer, token } from "./api.js";
import { h, setAttr, setText } from "./dom.js";

/** `done` is called when the relay knows the token. */
export function loginPage(done) {
  const refused = Boolean(token.get());
  token.forget();
  const wrong = h("p", { class: "wrong", id: "token-wrong", role: "alert" });
  const input = h("input", { id: "token", type: "password", name: "token", autocomplete: "current-password", required: true, "aria-describedby": "token-hint token-wrong" });
  const go = h("button", { type: "submit", class: "primary" }, "Open");
  const form = h("form", { class: "panel form", novalidate: true }, h("div", { class: "field" }, h("label", { for: "token" }, "Token"), h("p", { class: "hint", id: "token-hint" }, "One of the file ", h("code", {}, "tokens"), " in the relay's state directory: ", h("code", {}, "sudo cat /var/lib/mrelay/tokens"), ". One of ", h("b", {}, "look"), " shows everything, one of ", h("b", {}, "change"), " also changes rules."), h("div", { class: "line" }, input, go), wrong), h("p", { class: "quiet" }, "It is kept in this tab until you close it."));
  const fail = (text) => {
    setAttr(input, "aria-invalid", "true");
    setText(wrong, text);
    input.focus();
  };
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    if (!input.value.trim()) return fail("A token is needed.");
    go.disabled = true;
    token.set(input.value.trim());
    try {
      if ((await get("v1/access")).look) return done();
      token.forget();
      fail("The relay does not know this token. Look it up again.");
    } catch (error) {
      if (!(error instanceof NoAnswer)) throw error;
      token.forget();
      fail("The relay does not answer. Try again.");
    } finally {
      go.disabled = false;
    }
    return undefined;
  });
  if (refused) queueMicrotask(() => fail("The relay no longer knows the token you had. Look up the new one."));
  return { title: "Token", node: h("div", { class: "login" }, h("h1", {}, "This relay asks for a token"), form), update() {} };
}
