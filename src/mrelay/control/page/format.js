// Numbers and times as people read them.

const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const short = new Intl.NumberFormat("en", { maximumSignificantDigits: 3 });
const clock = new Intl.DateTimeFormat("en-GB", { hour: "2-digit", minute: "2-digit", second: "2-digit" });
const day = new Intl.DateTimeFormat("en-GB", { day: "2-digit", month: "short" });

export const count = (value) => whole.format(value);

function scaled(value, units, step = 1000) {
  let at = 0;
  while (value >= step * 0.9995 && at < units.length - 1) {
    value /= step;
    at += 1;
  }
  const text = value >= 100 ? whole.format(value) : short.format(value < 0.05 ? 0 : value);
  return [text, units[at]];
}

/** Datagrams a second: 201, 1.2 k, 3.4 M. */
export function rate(pps) {
  if (pps >= 0.05 && pps < 1) return short.format(Math.round(pps * 10) / 10);
  if (pps < 10000) return whole.format(Math.round(pps));
  return scaled(pps, ["", "k", "M", "G"]).join(" ");
}

/** With its unit, for a picture or a sentence. */
export const perSecond = (pps) => `${rate(pps)}/s`;

export const bits = (bps) => scaled(bps, ["bit/s", "kbit/s", "Mbit/s", "Gbit/s", "Tbit/s"]).join(" ");

export const bytes = (value) => scaled(value, ["B", "kB", "MB", "GB", "TB", "PB"]).join(" ");

export const plural = (number, word, words = `${word}s`) => `${count(number)} ${number === 1 ? word : words}`;

export function duration(seconds) {
  const parts = [[86400, "d"], [3600, "h"], [60, "min"], [1, "s"]];
  const found = [];
  for (const [size, unit] of parts) {
    const number = Math.floor(seconds / size);
    seconds -= number * size;
    if (number || (unit === "s" && !found.length)) found.push(`${number} ${unit}`);
  }
  return found.slice(0, 2).join(" ");
}

/** Of the day, with the date unless that is today. */
export function time(seconds) {
  const at = new Date(seconds * 1000);
  const today = at.toDateString() === new Date().toDateString();
  return today ? clock.format(at) : `${day.format(at)} ${clock.format(at)}`;
}
