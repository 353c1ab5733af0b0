// Small helpers around the document. Text always becomes text nodes, never markup.

export const $ = (id) => document.getElementById(id);

/** An element: attributes (`class`, `title`, ...; true sets an empty one, false none) and children. */
export function el(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== false && value != null) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child != null));
  return made;
}

/** A shape inside an SVG drawing. */
export function shape(tag, attributes, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

/** Tells people who listen to the page rather than look at it. */
export function say(text) {
  $("said").textContent = text;
}

/** Runs `change`; a reader who was at the end of the page stays there. */
export function keepingEnd(change) {
  const page = document.scrollingElement;
  const atEnd = page.scrollHeight - page.scrollTop - window.innerHeight < 80;
  change();
  if (atEnd) page.scrollTop = page.scrollHeight;
}

/** Puts text on the clipboard; false where the browser forbids it. */
export async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    // Without https, and off this machine, browsers have only the old way.
    const box = el("textarea", { class: "unseen", "aria-hidden": "true" });
    const before = document.activeElement;
    box.value = text;
    document.body.append(box);
    box.select();
    const done = document.execCommand("copy");
    box.remove();
    before?.focus();
    return done;
  }
}

/** Hands the reader a file. */
export function save(name, text) {
  const address = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  el("a", { href: address, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(address), 10_000);
}
