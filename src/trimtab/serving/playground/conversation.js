// What was asked and answered so far, and asking: one request for each column.

import { ServerError, stream } from "./client.js";
import { complain, notice, settle, type } from "./composer.js";
import { $, say } from "./dom.js";
import { Answer, Exchange } from "./exchange.js";
import { answerNames, formOf, lanes, mode, model } from "./lanes.js";
import { differences, makeRequest, readForm } from "./settings.js";

let exchanges = [];
let cleared = [];
let running = null; // the AbortController of the answers being written

/** The exchanges of the present mode. */
export const shown = () => exchanges.filter((one) => one.mode === mode());
export const writing = () => running !== null;
export const stop = () => running?.abort();

/** Asks every column; done when all answers are. */
export async function ask(prompt) {
  if (running || !prompt.trim()) return $("prompt").focus();
  settle();
  const asked = requests(prompt);
  if (!asked) return;
  const bodies = asked.map((one) => one.body);
  const note = asked.length === 2 ? shareSeed(bodies) : "";
  const about = asked.length === 2 ? differences(bodies) : [""];
  const names = answerNames();
  const answers = asked.map((one, i) => new Answer(names[i], about[i], one, i, mode() === "text" ? prompt : ""));
  const exchange = new Exchange(mode(), prompt, answers, note);
  exchanges.push(exchange);
  $("log").append(exchange.element);
  type("");
  running = new AbortController();
  refresh();
  document.scrollingElement.scrollTop = document.scrollingElement.scrollHeight;
  say("Writing.");

  const { signal } = running;
  if ($("in-turn").checked) for (const answer of answers) await write(answer, signal);
  else await Promise.all(answers.map((answer) => write(answer, signal)));
  running = null;
  exchange.close((text) => {
    type(text);
    $("prompt").focus();
  });
  refresh();
  // Nothing came: the prompt can be sent again as it is, or mended.
  if (answers.every((one) => !one.usable) && !$("prompt").value) type(prompt);
  say(answers.map((one) => `${one.name}: ${one.error ?? one.text}`).join("\n"));
}

/** The request of each column for this prompt, or null after saying what is wrong with the settings. */
function requests(prompt) {
  const made = [];
  for (const lane of lanes()) {
    const settings = readForm(formOf(lane));
    const problem = model(lane) ? settings : { problem: "No model to ask: the server has not answered yet." };
    if (problem.problem) {
      complain(problem);
      return null;
    }
    // A column that was opened later goes on from the first one's answers.
    const past = shown().map((one) => [one.prompt, one.answers[lane] ?? one.answers[0]]);
    const turns = past.filter(([, answer]) => answer.usable).flatMap(([asked, answer]) => [
      { role: "user", content: asked },
      { role: "assistant", content: answer.text },
    ]);
    made.push(makeRequest(mode(), model(lane).id, settings, prompt, turns));
  }
  return made;
}

/** What Send would send now; with nothing typed, what was sent last. */
export function current() {
  const prompt = $("prompt").value;
  const last = shown().at(-1);
  return prompt.trim() || !last ? requests(prompt) : last.answers.map((answer) => answer.request);
}

/** Two columns without a seed draw the same numbers, so that chance is not what sets them apart. */
function shareSeed(bodies) {
  if (bodies.some((body) => "seed" in body) || bodies.every((body) => body.temperature === 0)) return "";
  const seed = crypto.getRandomValues(new Uint32Array(1))[0];
  for (const body of bodies) body.seed = seed;
  return `Both drew with seed ${seed}.`;
}

async function write(answer, signal) {
  if (signal.aborted) return answer.end({ finish: "stopped" });
  const { path, body } = answer.request;
  answer.began = performance.now();
  const live = { stream: true, stream_options: { include_usage: true, continuous_usage_stats: true } };
  try {
    for await (const chunk of stream(path, { ...body, ...live }, signal)) answer.add(chunk);
    answer.end();
  } catch (error) {
    if (signal.aborted) return answer.end({ finish: "stopped" });
    if (!(error instanceof ServerError)) console.error(error);
    answer.end({ error: error.message });
    if (error.status === 401) notice(error.message, true);
  }
}

/** Asks the last prompt again in place of what was answered. */
export function again() {
  const last = shown().at(-1);
  exchanges = exchanges.filter((one) => one !== last);
  last.element.remove();
  return ask(last.prompt);
}

/** Empties the conversation; a second call brings it back. */
export function clear() {
  const gone = shown();
  if (gone.length) {
    exchanges = exchanges.filter((one) => !gone.includes(one));
    gone.forEach((one) => one.element.remove());
    cleared = gone;
  } else {
    exchanges.push(...cleared);
    $("log").append(...cleared.map((one) => one.element));
    cleared = [];
  }
  refresh();
}

/** Shows what belongs to the mode, and which buttons have something to do. */
export function refresh() {
  for (const one of exchanges) one.element.hidden = one.mode !== mode();
  const none = shown().length === 0;
  const restorable = none && cleared.some((one) => one.mode === mode());
  $("empty").hidden = !none;
  $("again").disabled = none || writing();
  $("export").disabled = none;
  $("clear").disabled = writing() || (none && !restorable);
  $("clear").textContent = restorable ? "Undo clear" : "Clear";
  // The button that was pressed makes way for the other: the keyboard goes on in the box.
  if ([$("send"), $("stop")].includes(document.activeElement)) $("prompt").focus({ preventScroll: true });
  $("send").hidden = writing();
  $("stop").hidden = !writing();
}
