
// A chat. Texts of users, models and files go in by textContent alone.
const here = location.pathname.endsWith("/") ? location.pathname : `${location.pathname}/`;
const byId = (id) => document.getElementById(id);
const [DOCUMENT, NOTHING] = byId("chat").dataset.kinds.split(" ");
let key = "";
let chat = null;

class Failure extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

function element(name, classes = "", text = "") {
  const made = document.createElement(name);
  if (classes) made.className = classes;
  made.textContent = text;
  return made;
}

function shown(text) {
  const sign = (found) => String.fromCodePoint(found.charCodeAt(0) < 32 ? 0x2400 + found.charCodeAt(0) : 0xfffd);
  return text.replace(/[\x00-\x08\x0b-\x1f\x7f-\x9f]/g, sign);
}

function fail(error) {
  byId("failure").textContent = error ? error.message : "";
  byId("failure").hidden = !error;
}

// What the server answers; anything that goes wrong is a sentence.
async function request(path, options = {}) {
  const headers = { ...options.headers };
  if (key) headers.authorization = `Bearer ${key}`;
  let response;
  try {
    response = await fetch(here + path, { ...options, headers, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Failure("The server can't be reached; is it still running?");
  }
  if (response.ok) return response;
  let message = "";
  try {
    message = (await response.json()).error.message;
  } catch { /* not the server's own */ }
  throw new Failure(message || `The server refused this (${response.status}).`, response.status);
}

// The pieces of a streamed answer. An error in the midst of it, or an end before its own, is one.
async function* pieces(response) {
  const reader = response.body.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  for (;;) {
    let read;
    try {
      read = await reader.read();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      break;
    }
    if (read.done) break;
    const lines = (rest + decoder.decode(read.value, { stream: true })).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      const piece = JSON.parse(data);
      if (piece.error) throw new Failure(piece.error.message);
      yield piece;
    }
  }
  throw new Failure("The connection ended before the answer did.");
}

const sameToken = (a, b) => a.id === b.id;
const identity = (one) => (one.bytes ? one.bytes.join() : one.token);

// Half the sum of the differences of two distributions, of which the five likeliest tokens are known.
function apart(a, b) {
  const chances = (top) => new Map(top.map((one) => [identity(one), Math.exp(one.logprob)]));
  const [p, q] = [chances(a.top), chances(b.top)];
  let [sum, left] = [0, 0];
  for (const name of new Set([...p.keys(), ...q.keys()])) {
    const difference = (p.get(name) ?? 0) - (q.get(name) ?? 0);
    sum += Math.abs(difference);
    left -= difference;
  }
  return Math.min(1, (sum + Math.abs(left)) / 2);
}

const MOST_CELLS = 4e6;

// The place in b that stands against each place of a, or -1: the first that differs, which comes after the same text;
// behind it those that are the same, and what is between in its order.
function partners(a, b) {
  const found = new Array(a.length).fill(-1);
  let start = 0; // of what has to be found
  while (start < a.length && start < b.length && sameToken(a[start], b[start])) found[start] = start++;
  if (start < Math.min(a.length, b.length)) found[start] = start++;
  const [n, m] = [a.length - start, b.length - start];
  const width = m + 1;
  const same = [];
  if (n * m <= MOST_CELLS) {
    const longest = new Uint16Array((n + 1) * width);
    for (let i = n - 1; i >= 0; i--)
      for (let j = m - 1; j >= 0; j--)
        longest[i * width + j] = sameToken(a[start + i], b[start + j])
          ? longest[(i + 1) * width + j + 1] + 1
          : Math.max(longest[(i + 1) * width + j], longest[i * width + j + 1]);
    for (let i = 0, j = 0; i < n && j < m; ) {
      if (sameToken(a[start + i], b[start + j])) same.push([start + i++, start + j++]);
      else if (longest[(i + 1) * width + j] >= longest[i * width + j + 1]) i++;
      else j++;
    }
  }
  let [i, j] = [start, start];
  for (const [x, y] of [...same, [a.length, b.length]]) {
    while (i < x && j < y) found[i++] = j++;
    if (x < a.length) found[x] = y;
    [i, j] = [x + 1, y + 1];
  }
  return found;
}

// One answer: its tokens as they come, and its place on the page.
class Answer {
  constructor(side, history) {
    Object.assign(this, { side, history, text: "", tokens: [], partners: [], other: null, error: null, usage: null, reason: null });
    this.running = true;
    this.abort = new AbortController();
    this.decoder = new TextDecoder();
    this.box = element("article", "side");
    this.box.style.setProperty("--c", `var(--${side.colour})`);
    const head = element("header");
    this.stop = element("button", "small", "Stop");
    this.stop.type = "button";
    this.stop.setAttribute("aria-label", `Stop the answer of ${side.title}`);
    this.stop.addEventListener("click", () => this.abort.abort());
    head.append(element("h4", "", side.title), this.stop);
    this.words = element("p", "tokens");
    this.words.dir = "auto";
    this.state = element("p", "state", side.wait);
    this.state.setAttribute("role", "status");
    this.box.append(head, this.words, this.state);
  }

  async run(onChange) {
    try {
      const body = JSON.stringify({
        model: this.side.model, messages: this.history, stream: true, stream_options: { include_usage: true },
        logprobs: true, top_logprobs: 5,
      });
      const options = { method: "POST", body, signal: this.abort.signal, headers: { "content-type": "application/json" } };
      const response = await request("v1/chat/completions", options);
      for await (const piece of pieces(response)) {
        this.usage = piece.usage ?? this.usage;
        const choice = piece.choices[0];
        if (!choice) continue;
        this.text += choice.delta.content ?? "";
        this.reason = choice.finish_reason ?? this.reason;
        for (const one of choice.logprobs?.content ?? []) this.add(one);
        onChange();
      }
    } catch (error) {
      if (error.name === "AbortError") this.reason = "stopped";
      else this.error = error;
    }
    this.running = false;
    this.stop.hidden = true;
    onChange();
  }

  add(one) {
    const bytes = one.bytes ? this.decoder.decode(new Uint8Array(one.bytes), { stream: true }) : one.token;
    // Many tokenizers write the blank before the first word, which the text doesn't have.
    const text = !this.tokens.length && !this.text.startsWith(" ") ? bytes.replace(/^ /, "") : bytes;
    const span = element("span", "t");
    if (text) span.textContent = shown(text);
    else if (one.bytes?.length && !bytes) {
      span.append(element("span", "gone", "·"));
      span.title = "a part of the next character";
    }
    span.tabIndex = this.tokens.length ? -1 : 0;
    const token = { id: identity(one), top: one.top_logprobs, span };
    placeOf.set(span, [this, this.tokens.length]);
    this.tokens.push(token);
    this.words.append(span);
  }

  // Marks where it is not what the document's answer is.
  mark(reference, isSame) {
    const [own, their] = [this.tokens, reference.tokens];
    const isEnded = [this, reference].every((one) => !one.running && one.reason !== "stopped");
    let first = 0;
    while (first < own.length && first < their.length && sameToken(own[first], their[first])) first++;
    this.other = reference;
    this.first = first;
    this.isSame = isSame;
    this.partners = isEnded ? partners(own, their) : own.map((_, i) => (i <= first && i < their.length ? i : -1));
    own.forEach((token, i) => {
      const at = this.partners[i];
      const differs = isEnded ? at < 0 || !sameToken(token, their[at]) : i === first && i < their.length;
      const leaves = differs && i === first && this.side.kind !== DOCUMENT;
      token.span.classList.toggle("o", differs && !leaves);
      token.span.classList.toggle("first", leaves);
      if (isSame && i <= first && at >= 0 && this.side.kind !== DOCUMENT)
        token.span.style.setProperty("--h", Math.sqrt(apart(token, their[at])).toFixed(2));
    });
  }

  // Which tokens it has, in a sentence.
  tell() {
    this.state.classList.toggle("error", Boolean(this.error));
    if (this.error) this.state.textContent = this.error.message;
    else if (this.running) this.state.textContent = this.tokens.length ? "…" : this.side.wait;
    else {
      const count = `${this.tokens.length} token${this.tokens.length === 1 ? "" : "s"}${this.usage ? `, ${this.usage.prompt_tokens} read before them` : ""}`;
      const end = { length: "; cut at the most that the server gives", stopped: "; stopped" }[this.reason] ?? "";
      const isDocuments = !this.side.kind && this.usage?.prompt_tokens_details?.context === "full";
      const unsure = isDocuments ? " σ was not sure of its own answer: this one is the document's." : "";
      this.state.textContent = `${count}${end}.${unsure}${this.compared()}`;
    }
  }

  compared() {
    const other = this.other;
    if (!other || this.side.kind === DOCUMENT || other.running || other.error || this.reason === "stopped" || other.reason === "stopped") return "";
    const [n, m] = [this.tokens.length, other.tokens.length];
    if (this.first < n && this.first < m) return ` Leaves the document's answer at token ${this.first + 1}.`;
    if (n === m) return " The same as the document's answer.";
    return n < m ? " Says what the document's answer does, and ends earlier." : " Goes on where the document's answer ends.";
  }

  get hasFailed() {
    return Boolean(this.error) || !this.text;
  }
}

// The box of a token, made when it is pointed at.
const placeOf = new WeakMap();
let pointed = null;

function blanks(text) {
  return shown(text.replaceAll(" ", "␣").replaceAll("\n", "⏎").replaceAll("\t", "⇥")) || "(nothing)";
}

function likeliest(title, token, otherwise = "") {
  const column = element("span");
  column.append(element("span", "head", title));
  for (const one of token ? token.top : []) {
    const pair = element("span", "pair");
    pair.append(element("code", "", blanks(one.token)), `${(100 * Math.exp(one.logprob)).toFixed(1)}%`);
    column.append(pair);
  }
  if (!token) column.append(element("span", "pair", otherwise));
  return column;
}

function point(span) {
  if (pointed === span && span?.querySelector(".tip")) return;
  pointed?.querySelector(".tip")?.remove();
  pointed = span;
  const found = span && placeOf.get(span);
  if (!found) return;
  const [answer, at] = found;
  const { other, partners: against, side, first } = answer;
  const tip = element("span", "tip");
  tip.setAttribute("role", "tooltip");
  const two = element("span", "two");
  two.append(likeliest(side.title, answer.tokens[at]));
  let said = "";
  if (other) {
    const partner = other.tokens[against[at]];
    two.append(likeliest(other.side.title, partner, other.running ? "no token yet" : "no token here"));
    if (partner) said = sameToken(answer.tokens[at], partner) ? "The same token" : "Another token";
    if (said && (at > first || !answer.isSame)) said += "; the texts before it differ";
  }
  if (said) tip.append(element("b", "", said));
  tip.append(two);
  span.append(tip);
  place(span);
}

for (const kind of ["mouseover", "focusin"])
  document.addEventListener(kind, (event) => point(tokenOf(event) ?? document.activeElement?.closest(".t") ?? null), true);

// One chat: each side goes on with its own answers.
class Chat {
  constructor(entry) {
    this.entry = entry;
    const slots = `${entry.prompt_length} slots`;
    this.sides = [
      { kind: "", model: entry.id, title: `σ, ${slots}`, colour: "prompt", wait: "…" },
      { kind: DOCUMENT, model: `${entry.id}:${DOCUMENT}`, title: `document, ${entry.context_tokens} tokens`, colour: "full_context", wait: "… (at the first question the document is read)" },
      { kind: NOTHING, model: `${entry.id}:${NOTHING}`, title: "nothing", colour: "no_context", wait: "…" },
    ].filter((side) => side.kind !== DOCUMENT || !entry.missing);
    for (const side of this.sides) side.history = [];
    this.answers = [];
  }

  get isRunning() {
    return this.answers.some((answer) => answer.running);
  }

  stop() {
    for (const answer of this.answers) answer.abort.abort();
  }

  async ask(question) {
    const asked = { role: "user", content: question };
    const answers = (this.answers = this.sides.map((side) => new Answer(side, [...side.history, asked])));
    const turn = element("div", "turn");
    const title = element("h3", "", shown(question));
    title.dir = "auto";
    const row = element("div", "sides");
    row.style.setProperty("--sides", answers.length);
    row.append(...answers.map((answer) => answer.box));
    turn.append(title, row);
    byId("turns").append(turn);
    turn.scrollIntoView({ block: "nearest" });
    const reference = answers.find((answer) => answer.side.kind === DOCUMENT);
    const histories = answers.map((answer) => JSON.stringify(answer.history));
    let waits = false;
    const draw = () => {
      waits = false;
      answers.forEach((answer, i) => {
        const other = answer === reference ? answers[0] : reference;
        const good = other && !other.error && !answer.error;
        if (good) answer.mark(other, histories[i] === histories[answers.indexOf(other)]);
        answer.tell();
      });
      controls();
    };
    const onChange = () => {
      if (!waits) setTimeout(draw, 80);
      waits = true;
    };
    await Promise.all(answers.map((answer) => answer.run(onChange)));
    draw();
    for (const answer of answers) {
      if (answer.hasFailed) continue; // as if it had not been asked
      answer.side.history.push(asked, { role: "assistant", content: answer.text });
    }
    if (answers.some((answer) => answer.error?.status === 401)) lock("The key is not the server's any more.");
  }
}

function controls() {
  const isRunning = chat !== null && chat.isRunning;
  byId("send").disabled = isRunning;
  byId("stop").hidden = !isRunning;
}

function startChat(entry) {
  chat?.stop();
  chat = new Chat(entry);
  byId("turns").replaceChildren();
  byId("missing").textContent = entry.missing ? `The whole document is not asked here. ${entry.missing}` : "";
  byId("missing").hidden = !entry.missing;
  byId("legend").hidden = Boolean(entry.missing);
  byId("about").textContent =
    `${entry.prompt_length} slots${entry.context_tokens ? ` for ${entry.context_tokens} tokens` : ""}: σ, the whole document and nothing answer side by side. ${entry.base_model}; ${entry.kind}.`;
  controls();
}

async function ask(question) {
  if (!question.trim() || chat.isRunning) return;
  byId("question").value = "";
  const asking = chat.ask(question);
  controls();
  await asking;
}

// The document, with marks where answers were lost.
async function showDocument(entry) {
  const [paper, list] = [byId("document"), byId("lost")];
  paper.replaceChildren();
  list.replaceChildren();
  byId("note").textContent = "";
  byId("paper").hidden = false;
  let found;
  try {
    found = await (await request(`page/prompts/${encodeURIComponent(entry.id)}`)).json();
  } catch (error) {
    byId("note").textContent = error.message;
    return;
  }
  if (chat.entry !== entry) return;
  paper.hidden = !found.passages.length;
  byId("note").textContent = found.note;
  const placed = new Set();
  for (const { text, lost } of found.passages) {
    if (!lost.length) {
      paper.append(text);
      continue;
    }
    const marks = element("sup");
    lost.forEach((number, i) => {
      placed.add(number);
      const link = element("a", "", `${number + 1}`);
      link.href = `#lost-${number + 1}`;
      link.setAttribute("aria-label", `lost answer ${number + 1}`);
      marks.append(...(i ? [", ", link] : [link]));
    });
    paper.append(element("mark", "", text), marks);
  }
  found.lost.forEach((query, i) => {
    const item = element("li");
    item.id = `lost-${i + 1}`;
    const title = element("strong", "", query.query);
    title.dir = "auto";
    const again = element("button", "small", "Ask it");
    again.type = "button";
    again.addEventListener("click", () => {
      ask(query.query);
      byId("ask").scrollIntoView({ block: "nearest" });
    });
    item.append(title, placed.has(i) ? "" : " (no sentence shares enough)", again);
    const said = element("dl", "said");
    for (const [name, text] of [["full context", query.answer_full_context], ["σ", query.answer_prompt]]) {
      const answer = element("dd", "", text || "(nothing)");
      answer.dir = "auto";
      said.append(element("dt", "", name), answer);
    }
    item.append(said);
    list.append(item);
  });
}

function lock(reason = "") {
  key = "";
  byId("chat").hidden = byId("paper").hidden = true;
  byId("locked").hidden = false;
  fail(reason ? new Failure(reason) : null);
  byId("key").focus();
}

async function start() {
  let entries;
  try {
    entries = await (await request("page/prompts")).json();
  } catch (error) {
    if (error.status === 401) lock(key ? "The key is wrong." : "");
    else fail(error);
    return;
  }
  fail(null);
  byId("locked").hidden = true;
  byId("chat").hidden = false;
  const select = byId("prompt");
  select.replaceChildren(...entries.map((entry) => new Option(entry.id, entry.id)));
  const choose = () => {
    const entry = entries.find((one) => one.id === select.value);
    startChat(entry);
    showDocument(entry);
  };
  select.onchange = choose;
  byId("anew").onclick = () => startChat(chat.entry);
  choose();
  if (matchMedia("(hover: hover)").matches) byId("question").focus({ preventScroll: true }); // no keyboard on a phone
}

byId("unlock").addEventListener("submit", (event) => {
  event.preventDefault();
  const given = byId("key").value.trim();
  byId("key").value = "";
  if (/^[\x20-\x7e]+$/.test(given)) {
    key = given;
    start();
  } else fail(new Failure("The key has signs that no key has."));
});
byId("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  ask(byId("question").value);
});
byId("question").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  ask(byId("question").value);
});
byId("stop").addEventListener("click", () => chat.stop());
start();
