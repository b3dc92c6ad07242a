// The plans of one trainable set on ONNX Runtime: "Examples and batches" of docs/protocol.md.

import { join } from 'node:path';

import './quiet.js'; // before the runtime, which reports to its makers from its first moment
import ort from 'onnxruntime-node';

import { Tokenizer, fields, text } from '../web/tokenizer.js'; // reads the table and the vocabulary inside tokenize.onnx
import { setNamed } from './artifact.js';
import { readBytes } from './disk.js';
import { range } from './order.js';

const OPTIONS = {
  intraOpNumThreads: 1,
  interOpNumThreads: 1,
  logSeverityLevel: 3,
  extra: { session: { disable_quant_qdq: '1' } }, // int8 weights are widened once
};
const CACHE_BYTES = 256e6;

// Opens plans when they are first needed. All files have been checked.
export class Plans {
  #sessions = new Map();
  #kept = new Map(); // what the prefix has made
  #room = CACHE_BYTES;

  constructor(folder, manifest, setName) {
    Object.assign(this, { folder, manifest, set: setNamed(manifest, setName) });
    this.tokenizer = new Tokenizer(new Uint8Array(this.#read(manifest.plans.tokenize)), manifest.max_length);
  }

  // Of examples { text, pair, label }, those with a known label: ids of each, its class, and how many texts were cut.
  encode(examples, maxLength) {
    const { labels } = this.manifest;
    const usable = examples.filter(({ label }) => labels.includes(label));
    const rows = usable.map((example) => this.#row(example, maxLength));
    const whole = (e) =>
      this.tokenizer.pieces(e.text).length + (e.pair === null ? 2 : 3 + this.tokenizer.pieces(e.pair).length);
    const truncated = usable.filter((example, i) => whole(example) > rows[i].length).length;
    return { rows, labels: usable.map(({ label }) => labels.indexOf(label)), truncated };
  }

  #row({ text: first, pair }, maxLength) {
    return Array.from(this.tokenizer.encode([first], [pair], maxLength).ids, Number);
  }

  async train(theta, batch, smoothing) {
    const { loss, correct, gradient } = await this.#run('train', theta, batch, smoothing);
    return { loss: loss.data[0], correct: Number(correct.data[0]), gradient: gradient.data };
  }

  async evaluate(theta, batch) {
    const { loss, correct } = await this.#run('evaluate', theta, batch);
    return { loss: loss.data[0], correct: Number(correct.data[0]) };
  }

  // The label of a text.
  async predict(theta, example) {
    const { logits } = await this.#run('predict', theta, { rows: [this.#row(example, this.manifest.max_length)] });
    return this.manifest.labels[logits.data.indexOf(Math.max(...logits.data))];
  }

  async #run(purpose, theta, { rows, labels }, smoothing = 0) {
    const suffix = this.set.prefix && purpose !== 'predict'; // a text that is predicted is read once
    const file = this.set[suffix ? `${purpose}_suffix` : purpose];
    const width = Math.max(...rows.map((row) => row.length));
    const feeds = { theta: new ort.Tensor('float32', theta, [theta.length]), ...this.#padded(rows, width) };
    if (suffix) feeds.hidden = await this.#hidden(rows, width);
    if (labels) feeds.labels = int64(labels, [rows.length]);
    const session = await this.#open(file, smoothing);
    const unknown = session.inputNames.filter((name) => !feeds[name]);
    if (unknown.length)
      throw new Error(`the plan ${file} takes ${unknown.join(', ')}, which this client does not know`);
    return session.run(Object.fromEntries(session.inputNames.map((name) => [name, feeds[name]])));
  }

  #padded(rows, width) {
    const fill = (value, filler) =>
      rows.flatMap((row) => range(width).map((t) => (t < row.length ? value(row[t]) : filler)));
    const shape = [rows.length, width];
    return {
      input_ids: int64(
        fill((id) => id, this.tokenizer.padId),
        shape,
      ),
      attention_mask: int64(
        fill(() => 1, 0),
        shape,
      ),
    };
  }

  // What the prefix makes of each row, filled up with zeros where it keeps a row a token.
  async #hidden(rows, width) {
    const { hidden_size: size, keeps_tokens: tokens } = this.set;
    const each = (tokens ? width : 1) * size;
    const all = new Float32Array(rows.length * each);
    for (const [r, row] of rows.entries()) all.set(await this.#prefix(row), r * each);
    return new ort.Tensor('float32', all, tokens ? [rows.length, width, size] : [rows.length, size]);
  }

  // Of one row, alone; kept as long as there is room.
  async #prefix(row) {
    const key = row.join();
    if (this.#kept.has(key)) return this.#kept.get(key);
    const session = await this.#open(this.set.prefix, 0);
    const { hidden } = await session.run(this.#padded([row], row.length));
    this.#room -= hidden.data.byteLength;
    if (this.#room >= 0) this.#kept.set(key, hidden.data);
    return hidden.data;
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

const int64 = (values, shape) => new ort.Tensor('int64', BigInt64Array.from(values, BigInt), shape);

// A plan with another default for `label_smoothing`: onnxruntime-node has no way to override an initializer.
function smoothed(plan, value) {
  const graph = fields(fields(plan).get(7)[0]);
  const tensor = graph
    .get(5)
    .map(fields)
    .find((t) => text(t.get(8)[0]) === 'label_smoothing');
  const raw = tensor?.get(9)?.[0]; // a view: what is written to it is in the plan
  if (raw?.length !== 4) throw new Error('the plan has no label_smoothing of four bytes; this client cannot train so');
  new DataView(raw.buffer, raw.byteOffset).setFloat32(0, value, true);
  return plan;
}
