// The current request as code to take away. The key is never written out: both read it from the environment.

import { address, hasKey } from "./client.js";

// What the openai package knows by name; the rest goes through its extra_body.
const KNOWN = new Set([
  "model", "messages", "prompt", "temperature", "top_p", "max_tokens", "seed", "stop", "presence_penalty",
  "frequency_penalty", "stream",
]);

export function asCurl({ path, body }) {
  const key = hasKey() ? ' \\\n  -H "Authorization: Bearer $TRIMTAB_API_KEY"' : "";
  const data = JSON.stringify({ ...body, stream: true }, null, 2).replaceAll("'", "'\\''");
  return `curl -N ${quoted(address(path))} \\\n  -H 'Content-Type: application/json'${key} \\\n  -d '${data}'\n`;
}

const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;

/** One program for all columns. */
export function asPython(requests) {
  const key = hasKey() ? 'os.environ["TRIMTAB_API_KEY"]' : '"none"';
  const client = `client = OpenAI(base_url=${literal(address("v1"))}, api_key=${key})`;
  const head = `${hasKey() ? "import os\n\n" : ""}from openai import OpenAI\n\n${client}\n`;
  return head + requests.map(call).join("\nprint()\n");
}

function call({ path, body }) {
  const chat = path.includes("chat");
  const all = Object.entries({ ...body, stream: true });
  const own = all.filter(([name]) => KNOWN.has(name)).map(([name, value]) => `    ${name}=${literal(value, 1)},\n`);
  const extra = Object.fromEntries(all.filter(([name]) => !KNOWN.has(name)));
  if (Object.keys(extra).length) own.push(`    extra_body=${literal(extra, 1)},\n`);
  const piece = chat ? 'chunk.choices[0].delta.content or ""' : "chunk.choices[0].text";
  return `stream = client.${chat ? "chat.completions" : "completions"}.create(\n${own.join("")})\n`
    + `for chunk in stream:\n    if chunk.choices:\n        print(${piece}, end="", flush=True)\n`;
}

/** A JSON value as a Python literal. JSON's string escapes all mean the same in Python. */
function literal(value, depth = 0) {
  if (value === null || value === undefined) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (typeof value !== "object") return JSON.stringify(value);
  const list = Array.isArray(value);
  const items = list
    ? value.map((item) => literal(item, depth + 1))
    : Object.entries(value).map(([name, item]) => `${JSON.stringify(name)}: ${literal(item, depth + 1)}`);
  const [open, close] = list ? "[]" : "{}";
  if (items.join(", ").length < 70 && !items.some((item) => item.includes("\n"))) return open + items.join(", ") + close;
  const indent = "    ".repeat(depth);
  return `${open}\n${items.map((item) => `${indent}    ${item},\n`).join("")}${indent}${close}`;
}
