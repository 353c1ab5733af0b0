// Talks to the server this page came from. Addresses are relative, so that a prefix in a proxy does no harm.

const KEY = "trimtab.key";
let key = remembered();

/** What the server, or the way to it, said went wrong. `status` is 0 where no answer came. */
export class ServerError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

export const address = (path) => new URL(path, document.baseURI).href;
export const hasKey = () => key !== "";

/** The key goes into this tab's storage; where storage is forbidden it lives until the page is left. */
export function useKey(value) {
  key = value.trim();
  try {
    if (key) sessionStorage.setItem(KEY, key);
    else sessionStorage.removeItem(KEY);
  } catch { /* kept in memory only */ }
}

function remembered() {
  try {
    return sessionStorage.getItem(KEY) ?? "";
  } catch {
    return "";
  }
}

/** The served models, as `/v1/models` lists them. */
export async function models() {
  const answer = await send("v1/models", {});
  try {
    return (await answer.json()).data;
  } catch {
    throw new ServerError("The list of models that the server sent is not JSON.", answer.status);
  }
}

/** The chunks of a streamed completion, as they come. Aborting `signal` ends the request on the server. */
export async function* stream(path, body, signal) {
  const answer = await send(path, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
    signal,
  });
  for await (const data of events(answer.body.pipeThrough(new TextDecoderStream()).getReader(), signal)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ServerError(sentence(chunk.error), 200);
    yield chunk;
  }
  throw new ServerError("The connection ended before the answer did.", answer.status);
}

async function send(path, options) {
  let answer;
  try {
    const headers = { ...options.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
    answer = await fetch(address(path), { ...options, headers });
  } catch (error) {
    if (options.signal?.aborted) throw error;
    throw new ServerError(`The server at ${location.host} does not answer.`);
  }
  if (answer.ok) return answer;
  let said = "";
  try {
    const body = await answer.json();
    said = sentence(body.error ?? body.detail);
  } catch { /* not JSON: a proxy's page, perhaps */ }
  const wait = answer.headers.get("Retry-After");
  const later = wait && answer.status !== 401 ? ` (Retry after ${wait} s.)` : "";
  throw new ServerError((said || `The server answered with status ${answer.status}.`) + later, answer.status);
}

function sentence(error) {
  const said = typeof error === "string" ? error : error?.message;
  return typeof said === "string" ? said : JSON.stringify(error ?? "");
}

/** The `data` of each server-sent event. */
async function* events(reader, signal) {
  let rest = "";
  try {
    for (;;) {
      let part;
      try {
        part = await reader.read();
      } catch (error) {
        if (signal?.aborted) throw error;
        throw new ServerError("The connection to the server broke.");
      }
      if (part.done) return;
      // A \r at the end may be half of a line's end.
      const lines = (rest + part.value).split(/\r\n|\n|\r(?!$)/);
      rest = lines.pop();
      for (const line of lines) {
        if (line.startsWith("data:")) yield line.slice(5).trimStart();
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
