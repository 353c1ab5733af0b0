// The head of the page: which models and plans there are, which answer, and in how many columns.

import { $, el } from "./dom.js";
import { copyForm, makeForms } from "./settings.js";

const STARTERS = {
  chat: [
    "Tell me a short story about a lighthouse.",
    "Write as JSON: In Oslo lives Paul Fox, a tailor aged 81.",
    "What did the old sailor say to the boy?",
  ],
  text: ["The ship had been at sea", "Once upon a time there was", "The old house stood"],
};
export const SERVE_TWO = "trimtab serve --plan full --plan cache=kivi:bits=2";

export const forms = makeForms();
let served = [];

export const columns = () => ($("columns").querySelector("[value='2']").checked ? 2 : 1);
export const lanes = () => (columns() === 2 ? [0, 1] : [0]);
export const mode = () => ($("mode").querySelector("[value='text']").checked ? "text" : "chat");
export const model = (lane) => served.find((one) => one.id === $(`model-${lane}`).value);
/** The form that holds for a column. */
export const formOf = (lane) => forms[$("same").checked ? 0 : lane];
/** What the answers of the columns are called: by plan, and by side where that is not enough. */
export function answerNames() {
  const names = lanes().map((lane) => model(lane).trimtab?.label ?? model(lane).id);
  return names.length === 2 && names[0] === names[1] ? [`${names[0]}, left`, `${names[1]}, right`] : names;
}

/** Puts the served models into the menus; what was chosen stays chosen where it is still served. */
export function serve(list) {
  served = list;
  for (const lane of [0, 1]) {
    const menu = $(`model-${lane}`);
    const chosen = list.find((one) => one.id === menu.value) ?? list[Math.min(lane, list.length - 1)];
    menu.replaceChildren(...list.map((one) => el("option", { value: one.id }, one.id)));
    if (chosen) menu.value = chosen.id;
  }
  show();
}

/** Makes the page fit what is chosen. */
export function show() {
  const two = columns() === 2;
  const templates = lanes().every((lane) => model(lane)?.trimtab?.chat !== false);
  const chat = $("mode").querySelector("[value='chat']");
  chat.disabled = !templates;
  if (!templates) $("mode").querySelector("[value='text']").checked = true;

  for (const lane of [0, 1]) $(`plan-${lane}`).replaceChildren(...planLine(model(lane)));
  $("model-1").parentElement.hidden = !two;
  $("alone").hidden = two;
  $("beside").hidden = !two;
  document.body.classList.toggle("two", two);
  document.body.classList.toggle("continues", mode() === "text");

  $("pair").hidden = !two;
  $("which").hidden = $("same").checked;
  const shown = !two || $("same").checked ? 0 : Number($("which").querySelector(":checked").value);
  $("forms").replaceChildren(forms[shown]);

  $("prompt").placeholder = mode() === "chat" ? "Write a message" : "Write the text to be continued";
  $("prompt-label").textContent = mode() === "chat" ? "Message" : "Text to be continued";
  $("empty-lead").textContent = two
    ? "One prompt, two answers: bytes, speed and text of both stand beside each other when they are done."
    : "Each answer shows how fast it came and how many bytes its past takes up under the chosen plan.";
  const hints = [...(templates ? [] : ["The model has no chat template, so it continues text. "]), ...hintFor(two)];
  $("hint").hidden = hints.length === 0;
  $("hint").replaceChildren(...hints);
  const starters = STARTERS[mode()].map((text) => {
    const button = el("button", { type: "button" }, text);
    button.addEventListener("click", () => {
      $("prompt").value = text;
      $("prompt").dispatchEvent(new Event("input"));
      $("prompt").focus();
    });
    return el("li", {}, button);
  });
  $("starters").replaceChildren(...starters);
}

/** Why the two columns would show the same, and what to do about it. */
function hintFor(two) {
  if (!two || model(0)?.id !== model(1)?.id) return [];
  if (served.length === 1) {
    return ["This server runs one plan, so the columns compare settings: choose them for left and right under "
      + "Settings. To compare two plans, start it with ", el("code", {}, SERVE_TWO), "."];
  }
  return $("same").checked ? ["Both columns have the same plan and settings: change one of them."] : [];
}

function planLine(one) {
  const about = one?.trimtab;
  if (!about) return [];
  const facts = [about.dtype, about.device, one.max_model_len && `context ${one.max_model_len.toLocaleString("en")}`];
  return [el("code", {}, about.plan ?? about.cache ?? ""), ` ${facts.filter(Boolean).join(" · ")}`];
}

let apart = false; // whether the right form has values of its own

for (const id of ["mode", "columns", "which", "same", "model-0", "model-1"]) {
  $(id).addEventListener("change", () => {
    // With one plan, only settings can differ.
    if (id === "columns" && columns() === 2 && served.length === 1) $("same").checked = false;
    if (!$("same").checked && !apart) copyForm(forms[0], forms[1]);
    apart = !$("same").checked;
    show();
  });
}
