// The box in which prompts are written, and where the page says what is wrong.

import { $, say } from "./dom.js";

/** Puts text into the box. */
export function type(text) {
  $("prompt").value = text;
  grow();
}

/** As many lines as the text has, up to eight. */
export function grow() {
  const box = $("prompt");
  box.rows = Math.min(8, Math.max(1, box.value.split("\n").length));
  // A long line wraps: counting line breaks alone would hide it.
  while (box.rows < 8 && box.scrollHeight > box.clientHeight + 2) box.rows++;
}

/** Says what keeps a prompt from being sent, and leads to the field it is about. */
export function complain({ problem, input }) {
  $("problem").textContent = problem;
  $("problem").hidden = false;
  say(problem);
  if (!input) return;
  input.setAttribute("aria-invalid", "true");
  for (let box = input.closest("details"); box; box = box.parentElement.closest("details")) box.open = true;
  showSettings(true);
  input.closest(".field").scrollIntoView({ block: "nearest" });
  input.focus();
}

export function settle() {
  $("problem").hidden = true;
}

export const settingsShown = () => document.body.classList.contains("settings-open");

/** Opens or closes the settings, which lie over a narrow page. */
export function showSettings(open) {
  document.body.classList.toggle("settings-open", open);
  $("open-settings").setAttribute("aria-expanded", String(open));
}

/** What the server said to the page as a whole; empty: all is well. */
export function notice(text, wantsKey = false) {
  $("notice").hidden = !text;
  $("notice-text").textContent = text;
  $("key-form").hidden = !wantsKey;
  $("try-again").hidden = wantsKey;
  if (text) say(text);
  if (wantsKey) $("key").focus();
}
