/** Off the page's thread: loads the encoder, indexes sentences, and ranks them for a query. */

import { Encoder } from "./encoder.js";

const PAUSE = 50; // milliseconds of indexing between two looks at what else is asked
let encoder;
let index = { run: -1, vectors: [] };

const handlers = {
  async load() {
    const begin = performance.now();
    encoder = await Encoder.load(new URL("./model/", import.meta.url), (bytes, total) => send("loading", { bytes, total }));
    await encoder.encode("Warm up."); // the first run compiles
    send("loaded", { bytes: encoder.size, seconds: (performance.now() - begin) / 1000 });
  },

  /** A later run takes the place of one that is not finished. */
  async index({ run, sentences }) {
    const own = (index = { run, vectors: [] });
    const begin = performance.now();
    let shown = begin;
    for (const sentence of sentences) {
      own.vectors.push(await encoder.encode(sentence));
      const done = own.vectors.length;
      if (performance.now() - shown < PAUSE && done < sentences.length) continue;
      send("indexed", { run, done, all: sentences.length, milliseconds: (performance.now() - begin) / done });
      await new Promise((resolve) => setTimeout(resolve)); // lets queries and later runs in
      if (index !== own) return;
      shown = performance.now();
    }
  },

  async query({ id, text }) {
    const begin = performance.now();
    const { run, vectors } = index;
    const wanted = await encoder.encode(text);
    const scores = vectors.map((vector) => vector.reduce((sum, value, i) => sum + value * wanted[i], 0));
    send("ranked", { id, run, scores, milliseconds: performance.now() - begin });
  },
};

function send(kind, content) {
  postMessage({ kind, ...content });
}

addEventListener("message", async ({ data: { kind, ...content } }) => {
  try {
    await handlers[kind](content);
  } catch (error) {
    send("failed", { during: kind, message: error.message });
  }
});
