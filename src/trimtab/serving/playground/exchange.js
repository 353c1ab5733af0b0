// One prompt and its answers: what is known of them, and how they stand on the page.

import { chart, comparison, cut, firstDifference, wordStart } from "./compare.js";
import { el, keepingEnd } from "./dom.js";
import { bytes, count, digits, seconds } from "./words.js";

const ENDS = { length: "Ended at the most tokens allowed.", stopped: "Stopped." };

/** One answer while it is written and after. */
export class Answer {
  constructor(name, about, request, column, prompt) {
    Object.assign(this, { name, request, text: "", usage: null, stats: {}, series: [] });
    Object.assign(this, { finish: null, error: null, waiting: "", done: false, began: performance.now() });
    // In completion mode the answer goes on from the prompt, and reads so.
    this.body = el("p", { class: "text" }, prompt ? el("span", { class: "given" }, prompt) : null);
    this.node = this.body.appendChild(document.createTextNode(""));
    this.cells = Object.fromEntries(["speed", "first", "held", "tokens"].map((key) => [key, el("dd", {}, "–")]));
    this.figures = el("dl", { class: "figures" });
    this.below = el("p", { class: "small" });
    const figure = (label, key) => el("div", {}, el("dt", {}, label), this.cells[key]);
    this.figures.append(figure("tokens/s", "speed"), figure("first token", "first"),
      figure("KV bytes", "held"), figure("tokens", "tokens"));
    // Four parts, whatever happens: those of two answers stand in line.
    this.element = el("article", { class: `answer of-${column} writing`, "aria-label": `Answer of ${name}` },
      el("p", { class: "name" }, el("b", {}, name), about ? ` ${about}` : ""),
      el("div", {}, this.body), this.figures, el("div", {}, this.below));
  }

  /** Whether a conversation can go on from it. */
  get usable() {
    return this.text !== "" || this.error === null;
  }

  get firstToken() {
    return this.stats.ttft_s ?? this.clientFirst;
  }

  get tokensPerSecond() {
    const spent = (this.last - this.began) / 1000 - this.clientFirst;
    return this.stats.tokens_per_s ?? (spent > 0 ? (this.usage?.completion_tokens - 1) / spent : undefined);
  }

  /** Takes in one chunk of the stream; the page is written at most once a frame. */
  add(chunk) {
    const choice = chunk.choices?.[0];
    const piece = choice?.delta?.content ?? choice?.text ?? "";
    this.last = performance.now();
    if (piece) this.clientFirst ??= (this.last - this.began) / 1000;
    this.text += piece;
    this.waiting += piece;
    this.finish = choice?.finish_reason ?? this.finish;
    this.usage = chunk.usage ?? this.usage;
    // A server that does not know a figure yet says null.
    for (const [key, value] of Object.entries(chunk.trimtab ?? {})) if (value !== null) this.stats[key] = value;
    const known = this.usage?.prompt_tokens + this.usage?.completion_tokens;
    // The last chunk may come after the blocks were given back.
    if (chunk.trimtab?.kv_bytes_held > 0 && known > (this.series.at(-1)?.[0] ?? 0)) {
      this.series.push([known, chunk.trimtab.kv_bytes_held]);
    }
    this.frame ??= requestAnimationFrame(() => this.write());
  }

  write() {
    cancelAnimationFrame(this.frame);
    this.frame = undefined;
    keepingEnd(() => {
      this.node.appendData(this.waiting);
      this.waiting = "";
      this.cells.speed.textContent = digits(this.tokensPerSecond);
      this.cells.first.textContent = seconds(this.firstToken);
      this.cells.held.textContent = bytes(this.stats.kv_bytes_held);
      this.cells.tokens.textContent = this.usage?.completion_tokens?.toLocaleString("en") ?? "–";
    });
  }

  /** The stream is over: `error` is what went wrong, `finish` may say that the reader stopped it. */
  end({ error = null, finish = this.finish } = {}) {
    Object.assign(this, { error, finish, done: true });
    this.write();
    keepingEnd(() => {
      this.element.classList.remove("writing");
      this.below.textContent = this.notes().join(" ");
      if (error) this.body.after(el("p", { class: "problem" }, error));
      // Refused before it began: there is nothing to measure.
      if (error && !this.text) this.body.hidden = this.figures.hidden = true;
    });
  }

  notes() {
    const { cached_prompt_tokens: cached, kv_bytes_peak: peak, queue_s: queued, preemptions, notes } = this.stats;
    const said = [];
    if (this.finish && this.finish !== "stop") said.push(ENDS[this.finish] ?? `Ended: ${this.finish}.`);
    if (this.usage) {
      const from = cached ? `, ${cached.toLocaleString("en")} of them from the prefix cache` : "";
      said.push(`${count(this.usage.prompt_tokens, "prompt token")}${from}.`);
    }
    if (peak > this.stats.kv_bytes_held) said.push(`Peak ${bytes(peak)}.`);
    if (queued >= 0.001) said.push(`Queued ${seconds(queued)}.`);
    if (preemptions) said.push(`Preempted ${count(preemptions, "time")}.`);
    return [...said, ...(notes ?? [])];
  }

  /** Marks the first word in which the text differs from the other's. */
  mark(start) {
    const [same, word, rest] = cut(this.text, start);
    this.node.replaceWith(same,
      el("mark", {}, el("span", { class: "unseen" }, "[differs from here] "), word || "∎"), rest);
  }

  toJSON() {
    const { name, request, text, finish, error, usage, stats } = this;
    return { name, request: request.body, text, finish_reason: finish, error, usage, trimtab: stats };
  }
}

/** One prompt with one answer, or with two side by side. */
export class Exchange {
  constructor(mode, prompt, answers, note) {
    Object.assign(this, { mode, prompt, answers, at: new Date() });
    this.columns = el("div", { class: `columns by-${answers.length}` }, ...answers.map((answer) => answer.element));
    this.element = el("section", { class: "exchange", "aria-label": "Prompt and answer" },
      mode === "chat" ? el("p", { class: "asked" }, el("span", { class: "unseen" }, "You: "), prompt) : null,
      this.columns,
      note ? el("p", { class: "small drawn" }, note) : null);
  }

  /** What can be said only when all is written. */
  close(goOn) {
    keepingEnd(() => {
      if (this.mode === "text") {
        for (const answer of this.answers.filter((one) => one.text)) {
          const button = el("button", { type: "button", class: "quiet" }, "Go on from here");
          button.addEventListener("click", () => goOn(this.prompt + answer.text));
          answer.below.after(button);
        }
      }
      const [left, right] = this.answers;
      if (!right || left.error || right.error || !(left.text || right.text)) return;
      const at = firstDifference(left.text, right.text);
      if (at >= 0) {
        const start = wordStart(left.text, right.text, at);
        this.answers.forEach((answer) => answer.mark(start));
      }
      this.columns.after(comparison(left, right), chart(this.answers) ?? "");
    });
  }

  toJSON() {
    return { at: this.at.toISOString(), mode: this.mode, prompt: this.prompt, answers: this.answers };
  }
}
