// Two finished answers beside each other: where their texts part, ratios of their figures, bytes over tokens.

import { el, shape } from "./dom.js";
import { bytes, count, times } from "./words.js";

/** The place of the first character in which the texts differ, or -1 if they are the same. */
export function firstDifference(a, b) {
  if (a === b) return -1;
  const end = Math.min(a.length, b.length);
  let at = 0;
  while (at < end && a.charCodeAt(at) === b.charCodeAt(at)) at++;
  // Not inside a character of two units.
  if (at > 0 && at < Math.max(a.length, b.length) && isLowHalf(a, at, b)) at--;
  return at;
}

const isLowHalf = (a, at, b) => [a, b].some((text) => (text.charCodeAt(at) & 0xfc00) === 0xdc00);

/** The text cut in three: what both share, the first word that differs, the rest. */
export function cut(text, at) {
  const start = at - /\S*$/.exec(text.slice(0, at))[0].length;
  const length = /^\s*\S*/.exec(text.slice(start))[0].length;
  return [text.slice(0, start), text.slice(start, start + length), text.slice(start + length)];
}

/** The sentences below two answers: the right one's figures over the left one's, and where the texts part. */
export function comparison(left, right, names) {
  const ratio = (figure) => figure(right) / figure(left);
  const tokens = (answer) => answer.usage?.completion_tokens;
  const rows = (answer) => answer.usage?.prompt_tokens + tokens(answer);
  const parts = [["KV bytes", times(ratio((a) => a.stats.kv_bytes_held))]];
  if (tokens(left) !== tokens(right)) {
    parts.push(["per token", times(ratio((a) => a.stats.kv_bytes_held / rows(a)))]);
  }
  parts.push(
    ["tokens/s", times(ratio((a) => a.tokensPerSecond))],
    ["first token", times(ratio((a) => a.firstToken))],
  );
  const at = firstDifference(left.text, right.text);
  const common = [...left.text.slice(0, at)].length;
  const texts = at < 0
    ? "Both wrote the same text."
    : at === 0
      ? "The texts differ from the first word."
      : `The texts are the same for ${count(common, "character")}; the first word that differs is marked.`;
  return el("div", { class: "comparison" },
    el("p", { class: "ratios" },
      el("b", {}, names[1]), " against ", el("b", {}, names[0]), " ",
      ...parts.flatMap(([name, value]) => [el("span", {}, `${name} `, el("b", {}, value)), " "])),
    el("p", {}, texts));
}

/** Bytes held over tokens known, one line an answer, drawn on the same scales. */
export function chart(answers) {
  const all = answers.flatMap((answer) => answer.series);
  const width = Math.max(...all.map(([tokens]) => tokens));
  const height = Math.max(...all.map(([, held]) => held));
  if (!(width > 0 && height > 0) || answers.some((answer) => answer.series.length < 2)) return null;
  const start = Math.min(...all.map(([tokens]) => tokens));
  const place = ([tokens, held]) =>
    `${(100 * (tokens - start) / Math.max(1, width - start)).toFixed(2)},${(38 - 35 * held / height).toFixed(2)}`;
  const lines = answers.map((answer, i) =>
    shape("polyline", { class: `line-${i}`, points: answer.series.map(place).join(" ") }));
  return el("figure", {},
    el("figcaption", {}, `KV bytes as tokens come: up to ${bytes(height)} at ${count(width, "token")}`),
    shape("svg", { viewBox: "0 0 100 40", preserveAspectRatio: "none", "aria-hidden": "true" },
      shape("line", { class: "ground", x1: 0, x2: 100, y1: 38, y2: 38 }), ...lines));
}
