// Local training and measuring: "Training" and "Measuring" of docs/protocol.md. Vectors are float32, scalars are doubles.

import { setImmediate } from 'node:timers/promises';

import { epochOrder, portions, range, split } from './order.js';

const f = Math.fround;
const MEASURED_AT_ONCE = 64;
const DIVERGED = 10;
const WHOLE = {
  epochs: [1, 1000],
  batch_size: [1, 4096],
  max_length: [3, 65536],
  max_steps: [0, 1e9],
  patience: [0, 1000],
};
const NUMBERS = {
  learning_rate: [0, 100],
  momentum: [0, 1],
  weight_decay: [0, 100],
  max_grad_norm: [0, Infinity],
  proximal_mu: [0, 1e6],
  warmup: [0, 1],
  label_smoothing: [0, 0.99],
  holdout: [0, 0.9],
};
const WORDS = { optimizer: ['sgd', 'adamw'], schedule: ['constant', 'linear', 'cosine'] };

// Throws what a device says when it declines a configuration that it does not know how to follow.
export function checkConfig(config) {
  for (const [name, [low, high]] of Object.entries({ ...WHOLE, ...NUMBERS }))
    if (!(config[name] >= low && config[name] <= high) || (name in WHOLE && !Number.isInteger(config[name])))
      throw new Error(`${name} is ${config[name]}; this client takes ${low} to ${high}`);
  for (const [name, known] of Object.entries(WORDS))
    if (!known.includes(config[name]))
      throw new Error(`${name} is "${config[name]}"; this client knows ${known.join(', ')}`);
  if (config.patience && !config.holdout) throw new Error(`patience is ${config.patience}, but nothing is held out`);
}

// Of step `step` of `total`, from 0.
export function rateAt(step, total, { learning_rate: rate, warmup, schedule }) {
  const warm = warmup * total;
  if (step < warm) return (rate * (step + 1)) / (Math.floor(warm) + 1);
  const left = 1 - (step - warm) / Math.max(1, total - warm);
  return rate * { constant: 1, linear: left, cosine: 0.5 - 0.5 * Math.cos(Math.PI * left) }[schedule];
}

// A step of the optimizer with its own moments: moves theta in place along the gradient.
export function makeOptimizer({ optimizer, momentum, weight_decay: decay }, size) {
  const [first, second] = [new Float32Array(size), new Float32Array(size)];
  let steps = 0;
  const sgd = (theta, g, rate) => {
    const [keep, lr] = [f(momentum), f(rate)];
    for (let i = 0; i < size; i += 1) {
      first[i] = f(first[i] * keep) + g[i];
      theta[i] -= f(first[i] * lr);
    }
  };
  const adamw = (theta, g, rate) => {
    steps += 1;
    const [c1, c2] = [1 - 0.9 ** steps, 1 - 0.999 ** steps];
    const [keep1, new1, keep2, new2] = [0.9, 1 - 0.9, 0.999, 1 - 0.999].map(f);
    const [small, lr] = [f(1e-8 * Math.sqrt(c2)), f((rate * Math.sqrt(c2)) / c1)];
    const shrink = decay ? f(1 - rate * decay) : 1;
    for (let i = 0; i < size; i += 1) {
      first[i] = f(first[i] * keep1) + f(g[i] * new1);
      second[i] = f(second[i] * keep2) + f(f(g[i] * g[i]) * new2);
      const way = f(f(first[i] / f(f(Math.sqrt(second[i])) + small)) * lr);
      theta[i] = f(theta[i] * shrink) - way;
    }
  };
  return { sgd, adamw }[optimizer];
}

// What FedProx adds and clipping takes away, in place. Throws where loss or gradient is not finite.
export function condition(gradient, theta, start, loss, { proximal_mu: mu, max_grad_norm: most }) {
  let sum = 0;
  for (let i = 0; i < gradient.length; i += 1) {
    if (mu) gradient[i] += f(f(mu) * f(theta[i] - start[i]));
    sum += gradient[i] * gradient[i];
  }
  const norm = Math.sqrt(sum);
  if (!Number.isFinite(loss) || !Number.isFinite(norm))
    throw new Error(`loss ${loss} and gradient norm ${norm} are not both finite; a lower learning rate may help`);
  const scale = most && norm > most ? f(most / norm) : 1;
  if (scale < 1) for (let i = 0; i < gradient.length; i += 1) gradient[i] *= scale;
}

// Train a copy of `start` on all examples. `goOn(progress)` is asked before every step and throws to stop.
export async function train(plans, start, examples, config, seed, goOn) {
  const began = performance.now();
  const [heldPlaces, places] = split(examples.rows.length, config.holdout, seed);
  const [held, own] = [take(examples, heldPlaces), take(examples, places)];
  const theta = start.slice();
  const optimize = makeOptimizer(config, theta.length);
  const perEpoch = Math.ceil(own.rows.length / config.batch_size);
  const total = Math.min(perEpoch * config.epochs, config.max_steps || Infinity);
  const lengths = own.rows.map((row) => row.length);
  let [steps, bad, best, bestLoss, firstLoss, sums] = [0, 0, start, Infinity, null, null];
  for (let epoch = 0; epoch < config.epochs && steps < total; epoch += 1) {
    sums = { loss: 0, weight: 0, right: 0 };
    for (const chosen of epochOrder(lengths, config.batch_size, seed, epoch).slice(0, total - steps)) {
      await setImmediate(); // heartbeats and signals have their turn
      goOn(steps / total);
      const { loss, correct, gradient } = await plans.train(theta, take(own, chosen), config.label_smoothing);
      condition(gradient, theta, start, loss, config);
      optimize(theta, gradient, rateAt(steps, total, config));
      add(sums, loss, chosen.length, correct);
      firstLoss ??= loss;
      steps += 1;
    }
    if (!held.rows.length) continue;
    const { loss } = await measure(plans, theta, held, () => goOn(steps / total));
    if (loss < bestLoss) [best, bestLoss, bad] = [theta.slice(), loss, 0];
    else bad += 1;
    if (config.patience && bad >= config.patience) break;
  }
  const result = held.rows.length && config.patience ? best : theta;
  if (!result.every(Number.isFinite)) throw new Error(`the parameters are not finite after ${steps} steps`);
  const metrics = { ...means(sums), steps, seconds: (performance.now() - began) / 1000 };
  if (metrics.loss > DIVERGED * Math.max(1, firstLoss))
    throw new Error(`the loss grew from ${firstLoss} to ${metrics.loss}; a lower learning rate may help`);
  if (held.rows.length) metrics.holdout_loss = bestLoss;
  if (examples.truncated) metrics.truncated = examples.truncated;
  return { delta: result.map((value, i) => value - start[i]), metrics };
}

// Mean loss and accuracy of theta over the examples.
export async function measure(plans, theta, examples, goOn) {
  const { rows } = examples;
  const order = range(rows.length).sort((a, b) => rows[a].length - rows[b].length);
  const sums = { loss: 0, weight: 0, right: 0 };
  for (const chosen of portions(order, MEASURED_AT_ONCE)) {
    await setImmediate();
    goOn(sums.weight / rows.length);
    const { loss, correct } = await plans.evaluate(theta, take(examples, chosen));
    add(sums, loss, chosen.length, correct);
  }
  return means(sums);
}

function add(sums, loss, weight, right) {
  sums.loss += loss * weight;
  sums.weight += weight;
  sums.right += right;
}

const means = (sums) => ({ loss: sums.loss / sums.weight, accuracy: sums.right / sums.weight });

const take = ({ rows, labels }, places) => ({ rows: places.map((i) => rows[i]), labels: places.map((i) => labels[i]) });
