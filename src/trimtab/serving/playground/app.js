// The playground: what the buttons do.

import { models, ServerError, stream, useKey } from "./client.js";
import { $, copy, say, save } from "./dom.js";
import { Answer, Exchange } from "./exchange.js";
import { answerNames, formOf, lanes, mode, model, serve, show } from "./lanes.js";
import { differences, makeRequest, readForm } from "./settings.js";
import { asCurl, asPython } from "./snippets.js";

let exchanges = [];
let cleared = [];
let running = null; // the AbortController of the answers being written

const shown = () => exchanges.filter((one) => one.mode === mode());

// ---- the server ----

async function connect() {
  try {
    const list = await models();
    serve(list);
    notice(list.length ? "" : "The server lists no model.");
  } catch (error) {
    notice(error.message, error.status === 401);
    // Still loading, or restarting.
    if (error.status === 503) setTimeout(connect, 1500);
  }
}

function notice(text, wantsKey = false) {
  $("notice").hidden = !text;
  $("notice-text").textContent = text;
  $("key-form").hidden = !wantsKey;
  $("try-again").hidden = wantsKey;
  if (text) say(text);
  if (wantsKey) $("key").focus();
}

// ---- asking ----

/** The request of each column for this prompt, or null after saying what is wrong with the settings. */
function requests(prompt, history = shown()) {
  const made = [];
  for (const lane of lanes()) {
    const settings = readForm(formOf(lane));
    if (settings.problem) return complain(settings);
    if (!model(lane)) return complain({ problem: "No model to ask: the server has not answered yet." });
    // A column that was opened later goes on from the first one's answers.
    const past = history.map((one) => [one.prompt, one.answers[lane] ?? one.answers[0]]);
    const turns = past.filter(([, answer]) => answer.usable).flatMap(([asked, answer]) => [
      { role: "user", content: asked },
      { role: "assistant", content: answer.text },
    ]);
    made.push(makeRequest(mode(), model(lane).id, settings, prompt, turns));
  }
  return made;
}

function complain({ problem, input }) {
  $("problem").textContent = problem;
  $("problem").hidden = false;
  say(problem);
  if (input) {
    input.setAttribute("aria-invalid", "true");
    for (let box = input.closest("details"); box; box = box.parentElement.closest("details")) box.open = true;
    settings(true);
    input.focus();
  }
  return null;
}

async function ask(prompt) {
  if (running || !prompt.trim()) return $("prompt").focus();
  $("problem").hidden = true;
  const asked = requests(prompt);
  if (!asked) return;
  const bodies = asked.map((one) => one.body);
  const note = asked.length === 2 ? sharedSeed(bodies) : "";
  const about = asked.length === 2 ? differences(bodies) : [""];
  const names = answerNames();
  const answers = asked.map((one, i) => new Answer(names[i], about[i], one, i, mode() === "text" ? prompt : ""));
  const exchange = new Exchange(mode(), prompt, answers, note);
  exchanges.push(exchange);
  $("log").append(exchange.element);
  type("");
  refresh();
  document.scrollingElement.scrollTop = document.scrollingElement.scrollHeight;

  running = new AbortController();
  const signal = running.signal;
  state(true);
  if ($("in-turn").checked) for (const answer of answers) await write(answer, signal);
  else await Promise.all(answers.map((answer) => write(answer, signal)));
  running = null;
  exchange.close(goOn);
  state(false);
  if (answers.every((one) => !one.usable) && !$("prompt").value) type(prompt);
  say(answers.map((one) => `${one.name}: ${one.error ?? one.text}`).join("\n"));
}

/** Two columns without a seed draw the same numbers, so that chance is not what sets them apart. */
function sharedSeed(bodies) {
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

const stop = () => running?.abort();

function goOn(text) {
  type(text);
  $("prompt").focus();
}

// ---- the page ----

function type(text) {
  $("prompt").value = text;
  grow();
}

function grow() {
  const box = $("prompt");
  box.rows = Math.min(8, Math.max(1, box.value.split("\n").length));
  // A long line wraps: rows alone would hide it.
  while (box.rows < 8 && box.scrollHeight > box.clientHeight + 2) box.rows++;
}

function state(writing) {
  $("send").hidden = writing;
  $("stop").hidden = !writing;
  if (writing) say("Writing.");
  refresh();
  if (document.activeElement === document.body) $("prompt").focus();
}

function refresh() {
  for (const one of exchanges) one.element.hidden = one.mode !== mode();
  const none = shown().length === 0;
  $("empty").hidden = !none;
  $("again").disabled = none || running !== null;
  $("export").disabled = none;
  $("clear").disabled = running !== null || (none && cleared.length === 0);
  $("clear").textContent = none && cleared.length ? "Undo clear" : "Clear";
}

function settings(open) {
  document.body.classList.toggle("settings-open", open);
  $("open-settings").setAttribute("aria-expanded", String(open));
}

async function copied(button, text) {
  if (text === null) return;
  const label = button.textContent;
  const done = await copy(text);
  say(done ? "Copied." : "The browser does not allow copying here.");
  button.textContent = done ? "Copied" : "Not allowed";
  setTimeout(() => (button.textContent = label), 1500);
}

/** What Send would send now; with nothing typed, what was sent last. */
function current() {
  const prompt = $("prompt").value;
  const last = shown().at(-1);
  return prompt.trim() || !last ? requests(prompt) : last.answers.map((answer) => answer.request);
}

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  ask($("prompt").value);
});
$("prompt").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  ask($("prompt").value);
});
$("prompt").addEventListener("input", grow);
$("stop").addEventListener("click", stop);
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  if (running) stop();
  else if (document.body.classList.contains("settings-open")) close();
});

$("again").addEventListener("click", () => {
  const last = shown().at(-1);
  exchanges = exchanges.filter((one) => one !== last);
  last.element.remove();
  ask(last.prompt);
});
$("clear").addEventListener("click", () => {
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
  $("prompt").focus();
});
$("export").addEventListener("click", () => {
  const now = new Date().toISOString();
  const kept = { made_with: "trimtab playground", at: now, server: location.origin, exchanges: shown() };
  save(`trimtab-${now.slice(0, 19).replaceAll(":", "-")}.json`, JSON.stringify(kept, null, 2));
});
$("copy-curl").addEventListener("click", (event) => {
  const made = current();
  copied(event.currentTarget, made && made.map(asCurl).join("\n"));
});
$("copy-python").addEventListener("click", (event) => {
  const made = current();
  copied(event.currentTarget, made && asPython(made));
});

function close() {
  settings(false);
  $("open-settings").focus();
}
$("open-settings").addEventListener("click", () => {
  settings(!document.body.classList.contains("settings-open"));
  if (document.body.classList.contains("settings-open")) $("close-settings").focus();
});
$("close-settings").addEventListener("click", close);
for (const id of ["mode", "columns", "model-0", "model-1"]) $(id).addEventListener("change", refresh);
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  useKey($("key").value);
  $("key").value = "";
  connect().then(() => $("notice").hidden && $("prompt").focus());
});
$("try-again").addEventListener("click", connect);

show();
refresh();
connect();
if (matchMedia("(pointer: fine)").matches) $("prompt").focus({ preventScroll: true });
