// The settings' forms, and the requests made of them. A field left empty is not sent: the server's own holds.

import { $ } from "./dom.js";

const NUMBERS = [
  "temperature", "top_p", "min_p", "top_k", "max_tokens", "seed",
  "presence_penalty", "frequency_penalty", "repetition_penalty",
];
const SHAPES = {
  json: ["JSON schema", '{"type": "object", ...}'],
  regex: ["Regular expression", "[A-Z][a-z]+"],
  choice: ["Choices", "one a line"],
};

/** Two forms from the page's template, for the left and the right column. */
export function makeForms() {
  return [0, 1].map((number) => {
    const form = $("settings-form").content.firstElementChild.cloneNode(true);
    for (const node of form.querySelectorAll("[data-id]")) node.id = `${node.dataset.id}-${number}`;
    for (const node of form.querySelectorAll("[data-for]")) node.htmlFor = `${node.dataset.for}-${number}`;
    form.addEventListener("submit", (event) => event.preventDefault());
    form.addEventListener("input", (event) => {
      const slides = event.target.dataset.slides;
      if (slides) form.elements[slides].value = event.target.value;
      event.target.removeAttribute("aria-invalid");
      show(form);
    });
    form.addEventListener("reset", () => setTimeout(() => show(form)));
    show(form);
    return form;
  });
}

/** Copies one form's values to another. */
export function copyForm(from, to) {
  for (const field of from.elements) if (field.name) to.elements[field.name].value = field.value;
  show(to);
}

/** Sliders follow their numbers; the box below the structured output's kind has that kind's name. */
function show(form) {
  for (const slider of form.querySelectorAll("[data-slides]")) {
    const number = form.elements[slider.dataset.slides];
    slider.value = number.value === "" ? number.placeholder : number.value;
    slider.classList.toggle("unset", number.value === "");
  }
  const kind = SHAPES[form.elements.form.value];
  const box = form.querySelector("[data-shape]");
  box.hidden = !kind;
  if (kind) {
    box.querySelector("label").textContent = kind[0];
    box.querySelector("textarea").placeholder = kind[1];
  }
}

/** A form as request fields, or a `problem` with the input it is about. */
export function readForm(form) {
  const fields = {};
  const wrong = (input, problem) => ({ input, problem });
  for (const name of NUMBERS) {
    const input = form.elements[name];
    const label = form.querySelector(`label[for="${input.id}"]`).textContent;
    if (input.validity.badInput) return wrong(input, `${label} is not a number.`);
    if (input.value === "") continue;
    const value = Number(input.value);
    if (Number.isInteger(value) && !Number.isSafeInteger(value)) {
      return wrong(input, `${label} is ${input.value}; a browser keeps whole numbers below 2^53 only.`);
    }
    fields[name] = value;
  }
  const stops = lines(form.elements.stop.value).map(unescaped);
  if (stops.length) fields.stop = stops;

  const kind = form.elements.form.value;
  const shape = form.elements.shape;
  if (kind === "json_object") fields.structured_outputs = { json_object: true };
  else if (kind) {
    if (!shape.value.trim()) return wrong(shape, `${SHAPES[kind][0]} is empty; write one, or choose free text.`);
    try {
      const read = { json: JSON.parse, regex: (text) => text, choice: lines }[kind];
      fields.structured_outputs = { [kind]: read(shape.value) };
    } catch (error) {
      return wrong(shape, `The JSON schema is not JSON: ${error.message}.`);
    }
  }
  return { fields, system: form.elements.system.value };
}

/** The request for one column: where it goes and its body, without what only streaming needs. */
export function makeRequest(mode, model, settings, prompt, history) {
  if (mode === "text") return { path: "v1/completions", body: { model, prompt, ...settings.fields } };
  const system = settings.system.trim() ? [{ role: "system", content: settings.system }] : [];
  const messages = [...system, ...history, { role: "user", content: prompt }];
  return { path: "v1/chat/completions", body: { model, messages, ...settings.fields } };
}

/** The fields in which the two requests differ, as words for each. */
export function differences(bodies) {
  const apart = ["model", "prompt", "messages"];
  const names = [...new Set(bodies.flatMap((body) => Object.keys(body)))]
    .filter((name) => !apart.includes(name))
    .filter((name) => JSON.stringify(bodies[0][name]) !== JSON.stringify(bodies[1][name]));
  const system = (body) => body.messages?.find((message) => message.role === "system")?.content;
  const words = bodies.map((body) => names.map((name) => {
    const value = body[name];
    return `${name} ${value === undefined ? "unset" : typeof value === "number" ? value : JSON.stringify(value)}`;
  }));
  if (system(bodies[0]) !== system(bodies[1])) {
    bodies.forEach((body, i) => words[i].unshift(system(body) ? "system message" : "no system message"));
  }
  return words.map((parts) => parts.join(", "));
}

const lines = (text) => text.split("\n").filter((line) => line !== "");
const unescaped = (text) =>
  text.replace(/\\(n|t|\\)/g, (_, letter) => ({ n: "\n", t: "\t", "\\": "\\" })[letter]);
