// One training step in Node.js on an artifact's folder; prints JSON.
//
//   node demo.mjs ARTIFACT EXAMPLES.jsonl [--set norms] [--runtime node|web] [--optimizer adamw|sgd]
//                 [--learning-rate 0.003] [--steps 1] [--out theta.safetensors]
//
// EXAMPLES.jsonl has one {"text": ..., "label": ...} a line, with "pair" for a second text.

import { readFile, writeFile } from 'node:fs/promises';
import { resolve } from 'node:path';
import { pathToFileURL } from 'node:url';
import { parseArgs } from 'node:util';

import { adamw, openArtifact, sgd, writeVector } from './pocketfed.js';

const RUNTIMES = { node: 'onnxruntime-node', web: 'onnxruntime-web/wasm' };
const OPTIMIZERS = { adamw, sgd };

async function main() {
  const { values, positionals } = parseArgs({
    allowPositionals: true,
    options: {
      set: { type: 'string' },
      runtime: { type: 'string', default: 'node' },
      optimizer: { type: 'string', default: 'adamw' },
      'learning-rate': { type: 'string', default: '0.003' },
      steps: { type: 'string', default: '1' },
      out: { type: 'string' },
    },
  });
  if (positionals.length !== 2)
    throw new Error('give an artifact folder and a file of examples: node demo.mjs ARTIFACT EXAMPLES.jsonl');
  const [folder, examplesFile] = positionals;
  const rate = Number(values['learning-rate']);
  if (!(rate > 0)) throw new Error(`the learning rate is ${values['learning-rate']}; it must be a number above 0`);
  const optimizer = chosen('optimizer', OPTIMIZERS, values.optimizer)(rate);
  const ort = await import(chosen('runtime', RUNTIMES, values.runtime));
  const lines = (await readFile(examplesFile, 'utf8')).split('\n').filter((line) => line.trim());
  const examples = lines.map((line) => JSON.parse(line));
  const batch = [examples.map((e) => e.text), examples.map((e) => e.label), examples.map((e) => e.pair ?? null)];
  const [texts, labels, pairs] = batch;

  const artifact = await openArtifact(ort, pathToFileURL(resolve(folder)));
  await artifact.readAll();
  const set = values.set ?? Object.keys(artifact.manifest.trainable_sets)[0];
  const trainer = await artifact.trainer(set);
  const encoded = trainer.tokenizer.encode(texts, pairs);
  const predictions = await trainer.predict(texts, pairs);
  const steps = [];
  for (let i = 0; i < Number(values.steps); i += 1) steps.push(await trainer.step(optimizer, texts, labels, pairs));
  const { loss, correct } = await trainer.gradient(texts, labels, pairs);
  if (values.out) await writeFile(values.out, writeVector(trainer.theta));
  return {
    runtime: `${RUNTIMES[values.runtime]} ${ort.env.versions[values.runtime]}`,
    version: artifact.version,
    set,
    ids: rows(encoded),
    predictions,
    steps, // loss and right guesses before each step
    after: { loss, correct },
  };
}

function chosen(what, choices, name) {
  if (!Object.hasOwn(choices, name))
    throw new Error(`there is no ${what} ${name}; choose one of ${Object.keys(choices).join(', ')}`);
  return choices[name];
}

function rows({ ids, mask, shape: [count, width] }) {
  const kept = (row) =>
    Array.from(ids.subarray(row * width, (row + 1) * width), Number).filter((_, i) => mask[row * width + i]);
  return Array.from({ length: count }, (_, row) => kept(row));
}

try {
  console.log(JSON.stringify(await main(), null, 2));
} catch (error) {
  console.error(error.message);
  process.exitCode = 1;
}
