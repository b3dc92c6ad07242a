// The page: type a text, see the guess, give the right label, watch the loss fall. `?artifact=URL` says where the artifact is.

import * as ort from './node_modules/onnxruntime-web/dist/ort.wasm.bundle.min.mjs';
import { adamw, openArtifact } from './pocketfed.js';

const SHOWN = 6; // most likely labels
const element = Object.fromEntries([...document.querySelectorAll('[id]')].map((e) => [e.id, e]));
const taught = []; // {text, label}
let losses = [];
let artifact, trainer, optimizer, predicted;

async function start() {
  const where = new URLSearchParams(location.search).get('artifact') ?? 'artifact/';
  artifact = await openArtifact(ort, new URL(where, location.href));
  const { labels, trainable_sets: sets } = artifact.manifest;
  element.label.replaceChildren(...labels.map((label) => new Option(label)));
  element.set.replaceChildren(
    ...Object.keys(sets).map((name) => new Option(`${name}: ${sets[name].size} values`, name)),
  );
  await restart();
  element.controls.disabled = false;
}

// Back to the values the artifact starts from; what was taught stays.
async function restart() {
  trainer = await artifact.trainer(element.set.value);
  optimizer = adamw(Number(element.rate.value));
  losses = [];
  draw();
  await predict();
}

async function predict() {
  predicted = element.text.value;
  const [{ probabilities }] = await trainer.predict([predicted]);
  const order = probabilities.map((_, i) => i).sort((a, b) => probabilities[b] - probabilities[a]);
  element.prediction.replaceChildren(
    ...order.slice(0, SHOWN).map((i) => {
      const [meter, item] = [document.createElement('meter'), document.createElement('li')];
      meter.value = probabilities[i];
      item.append(artifact.manifest.labels[i], meter, `${(100 * probabilities[i]).toFixed(1)} %`);
      return item;
    }),
  );
}

// One step on everything that was taught, then its loss with the new values.
async function train() {
  if (!taught.length) return;
  const batch = [taught.map((e) => e.text), taught.map((e) => e.label)];
  const { loss } = await trainer.step(optimizer, ...batch);
  const after = await trainer.gradient(...batch);
  losses = [...losses.slice(0, -1), loss, after.loss];
  draw(after.correct);
  await predict();
}

function draw(correct = 0) {
  const most = Math.max(...losses);
  const x = (i) => (600 * i) / Math.max(1, losses.length - 1);
  element.curve.setAttribute('points', losses.map((loss, i) => `${x(i)},${115 - (110 * loss) / most}`).join(' '));
  const now = losses.at(-1)?.toFixed(4);
  element.loss.textContent = losses.length
    ? `step ${losses.length - 1}: loss ${now}, ${correct} of ${taught.length} right`
    : '';
  element.examples.replaceChildren(
    ...taught.map(({ text, label }) => {
      const item = document.createElement('li');
      item.textContent = `${text} → ${label}`;
      return item;
    }),
  );
}

// One thing after another; what fails is said, and the next may go on.
let queue = Promise.resolve();
function enqueue(work) {
  queue = queue.then(async () => {
    document.body.dataset.state = 'busy';
    try {
      await work();
      const version = artifact.version.slice(0, 12);
      element.status.textContent = `Artifact ${version}, its files checked. Nothing you type leaves this page.`;
      element.status.removeAttribute('data-failed');
    } catch (error) {
      element.status.textContent = error.message;
      element.status.dataset.failed = '';
    }
    document.body.dataset.state = 'ready';
  });
}

element.ask.addEventListener('submit', (event) => event.preventDefault());
// who types faster than the model predicts waits for the last text alone
element.text.addEventListener('input', () => enqueue(async () => element.text.value === predicted || predict()));
element.set.addEventListener('change', () => enqueue(restart));
element.rate.addEventListener('change', () => enqueue(restart));
element.again.addEventListener('click', () => enqueue(train));
element.teach.addEventListener('submit', (event) => {
  event.preventDefault();
  const example = { text: element.text.value, label: element.label.value };
  enqueue(() => {
    taught.push(example);
    return train();
  });
});
enqueue(start);
