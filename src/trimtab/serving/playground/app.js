// The playground: what the buttons and keys do.

import { models, useKey } from "./client.js";
import { grow, notice, settingsShown, showSettings } from "./composer.js";
import { again, ask, clear, current, refresh, shown, stop, writing } from "./conversation.js";
import { $, copy, save, say } from "./dom.js";
import { serve, show } from "./lanes.js";
import { asCurl, asPython } from "./snippets.js";

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

const on = (id, event, act) => $(id).addEventListener(event, act);

// ---- asking ----

on("composer", "submit", (event) => {
  event.preventDefault();
  ask($("prompt").value);
});
on("prompt", "keydown", (event) => {
  // Enter that ends an input method's composition belongs to it.
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  ask($("prompt").value);
});
on("prompt", "input", grow);
on("stop", "click", stop);
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  if (writing()) stop();
  else if (settingsShown()) closeSettings();
});

// ---- tools ----

on("again", "click", again);
on("clear", "click", () => {
  clear();
  $("prompt").focus();
});
on("export", "click", () => {
  const now = new Date().toISOString();
  const kept = { made_with: "trimtab playground", at: now, server: location.origin, exchanges: shown() };
  save(`trimtab-${now.slice(0, 19).replaceAll(":", "-")}.json`, JSON.stringify(kept, null, 2));
});
on("copy-curl", "click", () => copied("copy-curl", "curl", (made) => made.map(asCurl).join("\n")));
on("copy-python", "click", () => copied("copy-python", "Python", asPython));

async function copied(id, label, write) {
  const made = current();
  if (!made) return;
  const done = await copy(write(made));
  say(done ? "Copied." : "The browser does not allow copying here.");
  $(id).textContent = done ? "Copied" : "Not allowed";
  setTimeout(() => ($(id).textContent = label), 1500);
}

// ---- the page ----

function closeSettings() {
  showSettings(false);
  $("open-settings").focus();
}
on("open-settings", "click", () => {
  showSettings(!settingsShown());
  if (settingsShown()) $("close-settings").focus();
});
on("close-settings", "click", closeSettings);
on("key-form", "submit", async (event) => {
  event.preventDefault();
  useKey($("key").value);
  $("key").value = "";
  await connect();
  if ($("notice").hidden) $("prompt").focus();
});
on("try-again", "click", connect);
for (const id of ["mode", "columns", "model-0", "model-1"]) on(id, "change", refresh);

show();
refresh();
connect();
if (matchMedia("(pointer: fine)").matches) $("prompt").focus({ preventScroll: true });
