// The plans of one trainable set on ONNX Runtime: "Examples and batches" of docs/protocol.md.

import { join } from 'node:path';

import ort from 'onnxruntime-node';

import { Tokenizer, fields, text } from '../web/tokenizer.js'; // reads the table and the vocabulary inside tokenize.onnx
import { setNamed } from './artifact.js';
import { readBytes } from './disk.js';

const OPTIONS = {
  intraOpNumThreads: 1,
  interOpNumThreads: 1,
  logSeverityLevel: 3,
  extra: { session: { disable_quant_qdq: '1' } }, // int8 weights are widened once
};

// Opens plans when they are first needed. All files have been checked.
export class Plans {
  #sessions = new Map();

  constructor(folder, manifest, setName) {
    Object.assign(this, { folder, manifest, set: setNamed(manifest, setName) });
    this.tokenizer = new Tokenizer(new Uint8Array(this.#read(manifest.plans.tokenize)), manifest.max_length);
  }

  // Of examples { text, pair, label }, those with a known label: ids of each, its class, and how many texts were cut.
  encode(examples, maxLength) {
    const { labels } = this.manifest;
    const usable = examples.filter(({ label }) => labels.includes(label));
    const rows = usable.map((example) => this.#row(example, maxLength));
    const whole = (e) => this.tokenizer.pieces(e.text).length + (e.pair === null ? 2 : 3 + this.tokenizer.pieces(e.pair).length);
    const truncated = usable.filter((example, i) => whole(example) > rows[i].length).length;
    return { rows, labels: usable.map(({ label }) => labels.indexOf(label)), truncated };
  }

  #row({ text: first, pair }, maxLength) {
    return Array.from(this.tokenizer.encode([first], [pair], maxLength).ids);
  }

  async train(theta, batch, smoothing) {
    const { loss, correct, gradient } = await this.#run(this.set.train, theta, batch, smoothing);
    return { loss: loss.data[0], correct: Number(correct.data[0]), gradient: gradient.data };
  }

  async evaluate(theta, batch) {
    const { loss, correct } = await this.#run(this.set.evaluate, theta, batch);
    return { loss: loss.data[0], correct: Number(correct.data[0]) };
  }

  // The label of a text.
  async predict(theta, example) {
    const { logits } = await this.#run(this.set.predict, theta, { rows: [this.#row(example, this.manifest.max_length)] });
    return this.manifest.labels[logits.data.indexOf(Math.max(...logits.data))];
  }

  async #run(file, theta, { rows, labels }, smoothing = 0) {
    const width = Math.max(...rows.map((row) => row.length));
    const ids = new BigInt64Array(rows.length * width).fill(BigInt(this.tokenizer.padId));
    const mask = new BigInt64Array(rows.length * width);
    rows.forEach((row, r) => {
      ids.set(row, r * width);
      mask.fill(1n, r * width, r * width + row.length);
    });
    const feeds = {
      theta: new ort.Tensor('float32', theta, [theta.length]),
      input_ids: new ort.Tensor('int64', ids, [rows.length, width]),
      attention_mask: new ort.Tensor('int64', mask, [rows.length, width]),
    };
    if (labels) feeds.labels = new ort.Tensor('int64', BigInt64Array.from(labels, BigInt), [rows.length]);
    const session = await this.#open(file, smoothing);
    if (session.inputNames.some((name) => !feeds[name]))
      throw new Error(`the plan ${file} takes ${session.inputNames.join(', ')}; this client does not know them all`);
    return session.run(feeds);
  }

  async #open(file, smoothing) {
    const key = `${file} ${smoothing}`;
    if (!this.#sessions.has(key)) {
      const plan = smoothing ? smoothed(this.#read(file), smoothing) : join(this.folder, file);
      const backbone = smoothing && this.manifest.files['backbone.bin'] ? this.#read('backbone.bin') : null;
      const externalData = backbone ? [{ path: 'backbone.bin', data: backbone }] : [];
      this.#sessions.set(key, await ort.InferenceSession.create(plan, { ...OPTIONS, externalData }));
    }
    return this.#sessions.get(key);
  }

  #read(name) {
    return readBytes(join(this.folder, name));
  }
}

// A plan with another default for `label_smoothing`: onnxruntime-node has no way to override an initializer.
function smoothed(plan, value) {
  const graph = fields(fields(plan).get(7)[0]);
  const tensor = graph.get(5).map(fields).find((t) => text(t.get(8)[0]) === 'label_smoothing');
  const raw = tensor?.get(9)?.[0]; // a view: what is written to it is in the plan
  if (raw?.length !== 4) throw new Error('the plan has no label_smoothing of four bytes; this client cannot train so');
  new DataView(raw.buffer, raw.byteOffset).setFloat32(0, value, true);
  return plan;
}
