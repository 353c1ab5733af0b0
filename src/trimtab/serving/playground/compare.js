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

/** Where the word begins in which the texts first differ at `at`. */
export function wordStart(a, b, at) {
  const between = [a, b].every((text) => !/^\S/.test(text.slice(at)));
  return between ? at : at - /\S*$/.exec(a.slice(0, at))[0].length;
}

/** The text cut in three: what both share, the first word that differs, the rest. */
export function cut(text, start) {
  const end = start + /^\s*\S*/.exec(text.slice(start))[0].length;
  return [text.slice(0, start), text.slice(start, end), text.slice(end)];
}

/** The sentences below two answers: the right one's figures over the left one's, and where the texts part. */
export function comparison(left, right) {
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
  return el("div", { class: "comparison" },
    el("p", { class: "ratios" },
      el("span", {}, el("b", {}, right.name), " against ", el("b", {}, left.name)), " ",
      ...parts.flatMap(([name, value]) => [el("span", {}, `${name} `, el("b", {}, value)), " "])),
    el("p", {}, aboutTexts(left, right), aboutPrefix(left, right)));
}

/** A prompt that one of the two knew already says nothing about how fast the other's plan reads one. */
function aboutPrefix(left, right) {
  const cached = [left, right].map((answer) => answer.stats.cached_prompt_tokens ?? 0);
  if (cached[0] === cached[1]) return "";
  const taken = cached.map((tokens) => tokens.toLocaleString("en"));
  return ` The first tokens do not compare: the prefix cache gave the left ${taken[0]} and the right ${taken[1]} `
    + "of the prompt's tokens.";
}

function aboutTexts(left, right) {
  const at = firstDifference(left.text, right.text);
  if (at < 0) return "Both wrote the same text.";
  const same = `The texts are the same for ${count([...left.text.slice(0, at)].length, "character")}`;
  const ended = [left, right].find((answer) => answer.text.length === at);
  if (ended) return `${same}; then ${ended.name} ends.`;
  return at === 0 ? "The texts differ from the first word." : `${same}; the first word that differs is marked.`;
}

/** Bytes held over tokens known, one line an answer, drawn on the same scales. */
export function chart(answers) {
  const all = answers.flatMap((answer) => answer.series);
  if (answers.some((answer) => answer.series.length < 2)) return null;
  const width = Math.max(...all.map(([tokens]) => tokens));
  const height = Math.max(...all.map(([, held]) => held));
  const start = Math.min(...all.map(([tokens]) => tokens));
  // Memory is taken in blocks, so the lines have steps.
  const steps = (series) => series.flatMap((point, i) => (i ? [[point[0], series[i - 1][1]], point] : [point]));
  const place = ([tokens, held]) =>
    `${(100 * (tokens - start) / (width - start)).toFixed(2)},${(38 - 35 * held / height).toFixed(2)}`;
  const lines = answers.map((answer, i) =>
    shape("polyline", { class: `line-${i}`, points: steps(answer.series).map(place).join(" ") }));
  return el("figure", {},
    el("figcaption", {}, `KV bytes as tokens come: up to ${bytes(height)} at ${count(width, "token")}`),
    shape("svg", { viewBox: "0 0 100 40", preserveAspectRatio: "none", "aria-hidden": "true" },
      shape("line", { class: "ground", x1: 0, x2: 100, y1: 38, y2: 38 }), ...lines));
}
