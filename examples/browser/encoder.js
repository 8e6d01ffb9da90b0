/** The sentence encoder: texts become vectors of length 1, by a graph that ONNX Runtime executes in WebAssembly. */

import * as ort from "./vendor/ort.wasm.bundle.min.mjs";
import { Tokenizer } from "./vendor/tokenizers.min.mjs";

ort.env.wasm.numThreads = 1; // more need a page that is isolated from others by its server
ort.env.wasm.wasmPaths = { wasm: new URL("./vendor/ort-wasm-simd-threaded.wasm", import.meta.url).href };

const GRAPH = "onnx/model_quantized.onnx";

export class Encoder {
  /**
   * @param {URL} folder as `build.py` writes it.
   * @param {(bytes: number, total: number) => void} progress told of the graph while it is fetched.
   * @throws {Error} that says what could not be fetched.
   */
  static async load(folder, progress) {
    const json = async (name) => (await fetched(new URL(name, folder))).json();
    const [tokenizer, tokenizerSettings, settings, graph] = await Promise.all([
      json("tokenizer.json"),
      json("tokenizer_config.json"),
      json("encoder.json"),
      bytesOf(await fetched(new URL(GRAPH, folder)), progress),
    ]);
    const encoder = new Encoder();
    encoder.size = graph.byteLength;
    encoder.tokenizer = new Tokenizer(tokenizer, tokenizerSettings);
    encoder.settings = settings;
    encoder.session = await ort.InferenceSession.create(graph, { executionProviders: ["wasm"] });
    return encoder;
  }

  /** @returns {Promise<Float32Array>} the mean of the last hidden states, or the first of them, of length 1. */
  async encode(text) {
    const { pooling, prompt, max_length: most } = this.settings;
    let { ids } = this.tokenizer.encode(prompt + text);
    if (ids.length > most) ids = [...ids.slice(0, most - 1), ids.at(-1)];
    const tensor = (values) => new ort.Tensor("int64", BigInt64Array.from(values, BigInt), [1, values.length]);
    const feeds = {
      input_ids: tensor(ids),
      attention_mask: tensor(ids.map(() => 1)),
      token_type_ids: tensor(ids.map(() => 0)),
    };
    const wanted = Object.fromEntries(this.session.inputNames.map((name) => [name, feeds[name]]));
    const { last_hidden_state: states } = await this.session.run(wanted, ["last_hidden_state"]);
    const [, length, width] = states.dims;
    const vector = new Float32Array(width);
    for (let i = 0; i < (pooling === "cls" ? 1 : length) * width; i++) vector[i % width] += states.data[i];
    const norm = Math.hypot(...vector);
    return vector.map((value) => value / norm);
  }
}

async function fetched(url) {
  let answer;
  try {
    answer = await fetch(url);
  } catch {
    throw new Error(`${url.pathname} could not be fetched. Is the server running, or are you offline for the first time?`);
  }
  if (!answer.ok) throw new Error(`${url.pathname} is missing on the server (status ${answer.status}). Build the page again.`);
  return answer;
}

async function bytesOf(answer, progress) {
  const total = Number(answer.headers.get("Content-Length"));
  const parts = [];
  let bytes = 0;
  for (const reader = answer.body.getReader(); ; ) {
    const { done, value } = await reader.read();
    if (done) break;
    parts.push(value);
    progress((bytes += value.length), total);
  }
  return new Uint8Array(await new Blob(parts).arrayBuffer());
}
