/** The page: text in, ranked sentences out. The model lives in `worker.js`. */

import { EXAMPLE, QUERIES } from "./example.js";
import { paragraphsOf } from "./sentences.js";

const SHOWN = 8; // results at first, and with each click on "More"
const WAIT = 120; // milliseconds after a key, before the query is run
const LARGEST = 5_000_000; // bytes of a file

const $ = (id) => document.getElementById(id);
const worker = new Worker("worker.js", { type: "module" });
const ask = (kind, content) => worker.postMessage({ kind, ...content });

const state = { ready: false, run: 0, query: 0, sentences: [], places: [], done: 0, scores: null, shown: SHOWN, timer: 0 };

// ---- what the worker says

const heard = {
  loading({ bytes, total }) {
    const part = total ? `${Math.round((100 * bytes) / total)} %` : megabytes(bytes);
    $("status").textContent = `Loading the model: ${part}`;
  },
  loaded({ bytes, seconds }) {
    state.ready = true;
    $("size").textContent = $("model").textContent = megabytes(bytes);
    $("loaded").textContent = `${seconds.toFixed(1)} s`;
    $("query").disabled = false;
    $("status").textContent = "Paste a text and index it, or try the example.";
    $("example").disabled = $("open").disabled = false;
    showSource();
  },
  indexed({ run, done, all, milliseconds }) {
    if (run !== state.run) return;
    state.done = done;
    progress(done / all);
    $("sentences").textContent = done < all ? `${done} of ${all}` : String(all);
    $("pace").textContent = `${milliseconds.toFixed(1)} ms`;
    if (done < all) {
      $("status").textContent = `Reading sentence ${done} of ${all}; you can search what is read already.`;
    } else {
      say();
      search();
    }
  },
  ranked({ id, run, scores, milliseconds }) {
    if (id !== state.query || run !== state.run) return;
    state.scores = scores;
    state.shown = SHOWN;
    $("time").textContent = `${milliseconds.toFixed(1)} ms`;
    showResults();
  },
  failed({ during, message }) {
    fail(during === "load" ? `The model could not be loaded. ${message}` : `Something went wrong (${during}): ${message}`);
  },
};
worker.addEventListener("message", ({ data: { kind, ...content } }) => heard[kind](content));
worker.addEventListener("error", (event) => {
  event.preventDefault();
  fail("The model could not be started. This page needs a browser from 2024 or later, with WebAssembly.");
});

// ---- text

function take(text) {
  clearError();
  $("source").value = text;
  showSource();
}

async function takeFile(file) {
  if (file.size > LARGEST) {
    return fail(`${file.name} has ${megabytes(file.size)}; the page reads up to ${megabytes(LARGEST)}. Give it a part.`);
  }
  let text = "\0";
  try {
    text = new TextDecoder("utf-8", { fatal: true }).decode(await file.arrayBuffer());
  } catch {
    // other bytes than those of a text
  }
  if (text.includes("\0")) {
    return fail(`${file.name} is not plain text in UTF-8. Save it as text, or copy its text and paste it here.`);
  }
  take(text);
  read();
}

function read() {
  clearError();
  const paragraphs = paragraphsOf($("source").value);
  if (!paragraphs.length) return fail("There is no text to index yet. Paste some, drop a file, or try the example.");
  state.sentences = paragraphs.flat();
  state.places = paragraphs.flatMap((group) => group.map((_, i) => ({ first: i === 0, last: i === group.length - 1 })));
  state.scores = null;
  state.done = 0;
  state.run += 1;
  const lines = paragraphs.map((group) => group.flatMap((sentence) => [element("span", {}, sentence), " "]));
  $("pages").replaceChildren(...lines.map((line) => element("p", {}, ...line)));
  showResults();
  show($("source"), false);
  show($("pages"), true);
  show($("read"), false);
  show($("edit"), true);
  progress(0);
  ask("index", { run: state.run, sentences: state.sentences });
}

function showSource() {
  show($("source"), true);
  show($("pages"), false);
  show($("edit"), false);
  show($("read"), true);
  $("read").disabled = !state.ready || !$("source").value.trim();
}

// ---- search

function search() {
  clearTimeout(state.timer);
  const text = $("query").value.trim();
  if (!text || !state.done) {
    state.scores = null;
    state.query += 1;
    return showResults();
  }
  ask("query", { id: ++state.query, text });
}

function showResults() {
  const scores = state.scores ?? [];
  const order = scores.map((_, i) => i).sort((a, b) => scores[b] - scores[a] || a - b);
  $("results").replaceChildren(...order.slice(0, state.shown).map((i) => result(i, scores[i])));
  show($("more"), state.shown < order.length);
  const [best, middle] = [scores[order[0]] ?? 0, scores[order[Math.floor(order.length / 2)]] ?? 0];
  [...$("pages").querySelectorAll("span")].forEach((span, i) => {
    const heat = i in scores && best > middle ? Math.max(0, (scores[i] - middle) / (best - middle)) : 0;
    const strength = heat > 0.35 ? Math.round(75 * heat ** 2) : 0; // the best are marked, and half of all are not
    span.style.background = strength ? `color-mix(in srgb, var(--heat) ${strength}%, transparent)` : "";
    span.classList.remove("shown");
  });
  if (order.length) reveal(order[0], false);
  say();
}

function result(i, score) {
  const { first, last } = state.places[i];
  const passage = element("span", { className: "passage" });
  if (!first) passage.append(element("small", {}, state.sentences[i - 1]), " ");
  passage.append(element("mark", {}, state.sentences[i]));
  if (!last) passage.append(" ", element("small", {}, state.sentences[i + 1]));
  const bar = element("b", {});
  bar.style.width = `${100 * Math.max(0, Math.min(1, score))}%`;
  const number = element("span", { className: "score" }, score.toFixed(2), element("i", {}, bar));
  const button = element("button", { type: "button" }, number, passage);
  button.addEventListener("click", () => reveal(i, true));
  return element("li", {}, button);
}

/** Scroll the text to a sentence; mark it if it was chosen. */
function reveal(i, chosen) {
  const pages = $("pages");
  const span = pages.querySelectorAll("span")[i];
  pages.querySelector(".shown")?.classList.remove("shown");
  if (chosen) span.classList.add("shown");
  const shift = span.getBoundingClientRect().top - pages.getBoundingClientRect().top - pages.clientHeight / 3;
  pages.scrollTo({ top: pages.scrollTop + shift, behavior: "smooth" });
}

function say() {
  if (!state.done || state.done < state.sentences.length) return;
  const number = state.sentences.length.toLocaleString("en");
  $("status").textContent = state.scores
    ? `The nearest of ${number} sentences, by cosine similarity.`
    : `${number} sentences are indexed. Ask in your own words.`;
}

// ---- small things

function element(name, properties, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

function show(node, visible) {
  node.hidden = !visible;
}

function megabytes(bytes) {
  return `${(bytes / 1e6).toFixed(1)} MB`;
}

function progress(share) {
  $("progress").firstElementChild.style.width = `${100 * share}%`;
  $("progress").setAttribute("aria-valuenow", Math.round(100 * share));
}

function fail(message) {
  $("error").textContent = message;
  show($("error"), true);
  if (!state.ready) $("status").textContent = "";
}

function clearError() {
  show($("error"), false);
}

$("source").addEventListener("input", showSource);
$("source").addEventListener("paste", () => setTimeout(() => $("source").scrollTo(0, 0)));
$("read").addEventListener("click", read);
$("edit").addEventListener("click", () => {
  showSource();
  $("source").focus();
});
$("example").addEventListener("click", () => {
  take(EXAMPLE);
  $("suggestions").replaceChildren(
    ...QUERIES.map((query) => {
      const chip = element("button", { type: "button" }, query);
      chip.addEventListener("click", () => {
        $("query").value = query;
        search();
      });
      return chip;
    }),
  );
  read();
});
$("more").addEventListener("click", () => {
  state.shown += SHOWN;
  showResults();
});
$("open").addEventListener("click", () => $("file").click());
$("file").addEventListener("change", () => {
  const [file] = $("file").files;
  $("file").value = "";
  if (file) takeFile(file);
});
$("query").addEventListener("input", () => {
  clearTimeout(state.timer);
  state.timer = setTimeout(search, WAIT);
});
addEventListener("dragover", (event) => {
  event.preventDefault();
  show($("drop"), state.ready);
});
addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) show($("drop"), false);
});
addEventListener("drop", (event) => {
  event.preventDefault();
  show($("drop"), false);
  const [file] = event.dataTransfer.files;
  const text = event.dataTransfer.getData("text/plain");
  if (!state.ready) return;
  if (file) takeFile(file);
  else if (text) {
    take(text);
    read();
  }
});

$("example").disabled = $("open").disabled = $("read").disabled = true;
$("status").textContent = "Loading the model …";
ask("load", {});

if ("serviceWorker" in navigator) {
  navigator.serviceWorker
    .register("sw.js")
    .then(() => navigator.serviceWorker.ready)
    .then(() => ($("offline").textContent = "ready"))
    .catch(() => ($("offline").textContent = "not available"));
} else {
  $("offline").textContent = "not available";
}
