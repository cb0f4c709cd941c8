// The relay's API: requests with the token, answers as JSON, errors as errors.

const KEY = "mrelay-token";
const PATIENCE = 15000; // milliseconds

/** What the relay refused: `status`, and `errors` as {rule, key, problem, remedy}. */
export class Refused extends Error {
  constructor(status, errors) {
    super(errors.map(sentence).join("\n"));
    Object.assign(this, { status, errors });
  }
}

/** The relay can't be reached, or what answers is not it. */
export class NoAnswer extends Error {}

export const sentence = (error) => (error.remedy ? `${error.problem}: ${error.remedy}` : error.problem);

export const token = {
  get: () => sessionStorage.getItem(KEY),
  set: (value) => sessionStorage.setItem(KEY, value),
  forget: () => sessionStorage.removeItem(KEY),
};

function headers(extra) {
  return token.get() ? { ...extra, Authorization: `Bearer ${token.get()}` } : extra;
}

async function send(method, path, init) {
  try {
    return await fetch(path, { method, credentials: "omit", redirect: "error", cache: "no-store", ...init });
  } catch (error) {
    if (init.signal?.aborted && init.signal.reason?.name === "AbortError") throw error;
    throw new NoAnswer("the relay does not answer");
  }
}

async function refusal(response) {
  try {
    return new Refused(response.status, (await response.json()).errors);
  } catch {
    return new NoAnswer(`status ${response.status}, which is not the relay's way to say no`);
  }
}

/** The JSON at `path`, or what became of a change. Throws Refused, NoAnswer. */
export async function ask(method, path, body) {
  const init = { headers: headers(body ? { "Content-Type": "application/json" } : {}), signal: AbortSignal.timeout(PATIENCE) };
  if (body) init.body = JSON.stringify(body);
  const response = await send(method, path, init);
  if (!response.ok) throw await refusal(response);
  if (response.status === 204) return null;
  try {
    return await response.json();
  } catch {
    throw new NoAnswer("the relay's answer broke off");
  }
}

export const get = (path) => ask("GET", path);

export const ruleUrl = (name, rest = "") => `v1/rules/${encodeURIComponent(name)}${rest}`;

/** Server-sent events from `path` (WHATWG HTML §9.2), for EventSource can't send a token; until `signal` aborts. */
export async function* stream(path, signal) {
  const response = await send("GET", path, { headers: headers({ Accept: "text/event-stream" }), signal });
  if (!response.ok) throw await refusal(response);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (text + value.replaceAll("\r\n", "\n")).split("\n\n");
    text = parts.pop();
    for (const part of parts) {
      const fields = Object.fromEntries(part.split("\n").filter((line) => !line.startsWith(":")).map(field));
      if (fields.data) yield { type: fields.event, id: fields.id, data: JSON.parse(fields.data) };
    }
  }
}

function field(line) {
  const colon = line.indexOf(":");
  return [line.slice(0, colon), line.slice(colon + 1).trimStart()];
}
