// A pocketfed artifact in JavaScript: checked, tokenized, predicted and trained with any onnxruntime-* package of npm.
// The same file serves a page and Node.js; the runtime is handed in, nothing else is needed. See docs/artifact.md.

import { Tokenizer, fields, text } from './tokenizer.js';

const SCHEMA = 2;
const FILE_NAME = /^[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}$/;

// Open the artifact at `base`, a folder's URL. `ort` is onnxruntime-node or onnxruntime-web; `version` what it must be.
export async function openArtifact(ort, base, version = null) {
  ort.env.wasm.numThreads = 1; // more would need headers that a plain file server does not send
  const folder = new URL(String(base).replace(/\/?$/, '/'));
  const bytes = await download(new URL('manifest.json', folder));
  const found = await sha256(bytes);
  if (version !== null && found !== version)
    throw new Error(`${folder} holds version ${found.slice(0, 12)}, not ${version.slice(0, 12)}`);
  const manifest = JSON.parse(text(bytes));
  if (manifest.schema !== SCHEMA)
    throw new Error(`the manifest has schema ${manifest.schema}; this page reads ${SCHEMA}: update it`);
  if (manifest.task !== 'classification')
    throw new Error(`the artifact is for ${manifest.task}; this page reads classification only`);
  return new Artifact(ort, folder, manifest, found);
}

// Holds what has been read open: bytes and sessions, each once. No byte is used before its digest was checked.
class Artifact {
  #bytes = new Map();
  #sessions = new Map();

  constructor(ort, folder, manifest, version) {
    Object.assign(this, { ort, folder, manifest, version });
  }

  // The bytes of one of its files.
  read(name) {
    return once(this.#bytes, name, async () => {
      const file = Object.hasOwn(this.manifest.files, name) ? this.manifest.files[name] : null;
      if (file === null || !FILE_NAME.test(name)) throw new Error(`the artifact has no file ${JSON.stringify(name)}`);
      const bytes = await download(new URL(name, this.folder));
      if (bytes.length !== file.bytes)
        throw new Error(`${name} has ${bytes.length} bytes, not ${file.bytes}; fetch the artifact again`);
      if ((await sha256(bytes)) !== file.sha256)
        throw new Error(`${name} is damaged: its digest is not the manifest's; fetch the artifact again`);
      return bytes;
    });
  }

  // Read, and so check, every file.
  async readAll() {
    await Promise.all(Object.keys(this.manifest.files).map((name) => this.read(name)));
  }

  async tokenizer() {
    return new Tokenizer(await this.read(this.manifest.plans.tokenize), this.manifest.max_length);
  }

  // A trainer of one trainable set, at the values the artifact starts from.
  async trainer(name) {
    const { trainable_sets: sets } = this.manifest;
    if (!Object.hasOwn(sets, name))
      throw new Error(`the artifact has no trainable set ${name}, only ${Object.keys(sets).join(', ')}`);
    const theta = readVector(await this.read(sets[name].initial), sets[name].size);
    return new Trainer(this, sets[name], await this.tokenizer(), theta);
  }

  // Run a plan. The one place where its inputs are fed: by name, with the types and sizes it states.
  async run(file, values) {
    const session = await once(this.#sessions, file, () => this.#open(file));
    const feeds = {};
    for (const { name, type, shape } of session.inputMetadata) {
      const value = values[name];
      if (value === undefined)
        throw new Error(`the plan ${file} asks for ${name}, which is unknown here; update this page`);
      const fits =
        value.type === type &&
        value.dims.length === shape.length &&
        shape.every((d, i) => typeof d === 'string' || d === value.dims[i]);
      if (!fits)
        throw new Error(`the plan ${file} takes ${name} as ${type} of ${shape}, not ${value.type} of ${value.dims}`);
      feeds[name] = value;
    }
    return session.run(feeds);
  }

  async #open(file) {
    const plan = await this.read(file);
    const externalData = [];
    for (const path of externalFiles(plan)) externalData.push({ path, data: await this.read(path) });
    return this.ort.InferenceSession.create(plan, { externalData, intraOpNumThreads: 1, logSeverityLevel: 3 });
  }
}

// Holds theta, the values that are trained. A step that fails leaves them as they were.
class Trainer {
  constructor(artifact, set, tokenizer, theta) {
    Object.assign(this, { artifact, set, tokenizer, theta });
  }

  // For each text the label, and the probability of every label in the manifest's order.
  async predict(texts, pairs = null) {
    const { logits } = await this.artifact.run(this.set.predict, this.#inputs(texts, pairs));
    const { labels } = this.artifact.manifest;
    return texts.map((_, row) => {
      const probabilities = softmax(logits.data.subarray(row * labels.length, (row + 1) * labels.length));
      return { label: labels[probabilities.indexOf(Math.max(...probabilities))], probabilities };
    });
  }

  // Mean loss, number of right guesses, and the loss's gradient by theta.
  async gradient(texts, labels, pairs = null) {
    const unknown = labels.find((label) => !this.artifact.manifest.labels.includes(label));
    if (unknown !== undefined)
      throw new Error(
        `there is no label ${JSON.stringify(unknown)}; choose one of ${this.artifact.manifest.labels.join(', ')}`,
      );
    if (!texts.length || labels.length !== texts.length)
      throw new Error(
        `there are ${texts.length} texts and ${labels.length} labels; give at least one text, and a label for each`,
      );
    const ids = BigInt64Array.from(labels, (label) => BigInt(this.artifact.manifest.labels.indexOf(label)));
    const inputs = { ...this.#inputs(texts, pairs), labels: new this.artifact.ort.Tensor('int64', ids, [ids.length]) };
    const { loss, correct, gradient } = await this.artifact.run(this.set.train, inputs);
    return { loss: loss.data[0], correct: Number(correct.data[0]), gradient: gradient.data };
  }

  // One step of `optimizer` (`sgd` or `adamw` below) along the batch's gradient. Returns loss and right guesses before it.
  async step(optimizer, texts, labels, pairs = null) {
    const { loss, correct, gradient } = await this.gradient(texts, labels, pairs);
    if (!Number.isFinite(loss) || !gradient.every(Number.isFinite))
      throw new Error(`the loss is ${loss} or its gradient is not finite; take a smaller learning rate`);
    const moved = optimizer(this.theta, gradient);
    if (!moved.every(Number.isFinite))
      throw new Error('a step led to values that are not finite; take a smaller learning rate');
    this.theta = moved;
    return { loss, correct };
  }

  #inputs(texts, pairs) {
    const { Tensor } = this.artifact.ort;
    const { ids, mask, shape } = this.tokenizer.encode(texts, pairs);
    return {
      theta: new Tensor('float32', this.theta, [this.theta.length]),
      input_ids: new Tensor('int64', ids, shape),
      attention_mask: new Tensor('int64', mask, shape),
    };
  }
}

// theta - lr * v, with v = momentum * v + g. Arithmetic in float32, value by value, as client_sdk/optimizers.py has it.
export function sgd(learningRate, momentum = 0) {
  const [rate, keep, f] = [Math.fround(learningRate), Math.fround(momentum), Math.fround];
  let velocity = null;
  return (theta, gradient) => {
    velocity ??= new Float32Array(theta.length);
    velocity = gradient.map((g, i) => f(velocity[i] * keep) + g);
    return theta.map((value, i) => value - f(velocity[i] * rate));
  };
}

// Adam with bias correction and decoupled weight decay (Loshchilov & Hutter 2019, algorithm 2).
export function adamw(learningRate, weightDecay = 0, beta1 = 0.9, beta2 = 0.999, eps = 1e-8) {
  const f = Math.fround;
  const [keep1, new1, keep2, new2] = [beta1, 1 - beta1, beta2, 1 - beta2].map(f);
  const decay = f(1 - learningRate * weightDecay);
  let [steps, first, second] = [0, null, null];
  return (theta, gradient) => {
    first ??= new Float32Array(theta.length);
    second ??= new Float32Array(theta.length);
    steps += 1;
    const [correction1, correction2] = [1 - beta1 ** steps, 1 - beta2 ** steps];
    const small = f(eps * Math.sqrt(correction2));
    const rate = f((learningRate * Math.sqrt(correction2)) / correction1);
    first = first.map((m, i) => f(m * keep1) + f(gradient[i] * new1));
    second = second.map((v, i) => f(v * keep2) + f(f(gradient[i] * gradient[i]) * new2));
    return theta.map((value, i) => f(value * decay) - f(f(first[i] / f(f(Math.sqrt(second[i])) + small)) * rate));
  };
}

// theta as the bytes of a safetensors file.
export function writeVector(theta) {
  const tensor = { dtype: 'F32', shape: [theta.length], data_offsets: [0, 4 * theta.length] };
  const stated = JSON.stringify({ theta: tensor });
  const header = new TextEncoder().encode(stated.padEnd(Math.ceil(stated.length / 8) * 8));
  const bytes = new Uint8Array(8 + header.length + 4 * theta.length);
  new DataView(bytes.buffer).setBigUint64(0, BigInt(header.length), true);
  bytes.set(header, 8);
  bytes.set(new Uint8Array(theta.buffer, theta.byteOffset, 4 * theta.length), 8 + header.length);
  return bytes;
}

// The one float32 tensor `theta` of a safetensors file.
function readVector(bytes, size) {
  const start = 8 + Number(new DataView(bytes.buffer, bytes.byteOffset).getBigUint64(0, true));
  const { theta } = JSON.parse(text(bytes.subarray(8, start)));
  if (theta?.dtype !== 'F32' || String(theta.shape) !== String(size) || start + 4 * size !== bytes.length)
    throw new Error(`the artifact's first values are not ${size} float32 numbers; publish it again`);
  return new Float32Array(bytes.slice(start).buffer);
}

// Names of the files that a plan's tensors lie in: ModelProto.graph.initializer.external_data, entries of `location`.
function externalFiles(plan) {
  const within = (parts, field) => parts.flatMap((part) => fields(part).get(field) ?? []);
  const entries = within(within(within([plan], 7), 5), 13).map(fields);
  return new Set(entries.filter((entry) => text(entry.get(1)[0]) === 'location').map((entry) => text(entry.get(2)[0])));
}

function softmax(logits) {
  const most = Math.max(...logits);
  const powers = Array.from(logits, (x) => Math.exp(x - most));
  const sum = powers.reduce((a, b) => a + b);
  return powers.map((power) => power / sum);
}

// The value made for a key, made once; a failure is not kept.
function once(made, key, make) {
  if (!made.has(key)) {
    const value = make();
    made.set(key, value);
    value.catch(() => made.delete(key));
  }
  return made.get(key);
}

async function download(url) {
  if (url.protocol === 'file:') return new Uint8Array(await (await import('node:fs/promises')).readFile(url));
  const answer = await fetch(url);
  if (!answer.ok) throw new Error(`${url} was answered with ${answer.status}; is an artifact there?`);
  return new Uint8Array(await answer.arrayBuffer());
}

async function sha256(bytes) {
  if (!globalThis.crypto?.subtle)
    throw new Error('a page can only check digests over https or on localhost; open it there');
  const digest = await crypto.subtle.digest('SHA-256', bytes);
  return Array.from(new Uint8Array(digest), (byte) => byte.toString(16).padStart(2, '0')).join('');
}
