// What leaves the device, and in which form: "What leaves the device" of docs/protocol.md.

import { portions, range } from './order.js';
import { encodeTensors } from './vector.js';

const f = Math.fround;
const BLOCK = 256; // 8-bit values that share a scale
const LARGEST_HALF = 65504;
const CODEC = /^(?:(float32|float16|int8)|(topk|ternary):(.+))$/;
const FEEDS_BACK = ['int8', 'topk', 'ternary'];

// Throws what a device says when it declines a form that it does not know.
export function checkForm(form) {
  if (!form) return;
  const { kind, share } = codecOf(form);
  if (!kind || !(share > 0 && share <= 0.5))
    throw new Error(
      `the codec ${form.codec} is not known here, only float32, float16, int8, topk:SHARE, ternary:SHARE`,
    );
  if (!(form.clip_norm >= 0)) throw new Error(`clip_norm is ${form.clip_norm}; this client takes 0 and more`);
  if (form.noise || form.private.length) throw new Error('local noise and private parameters are not known here');
  if (form.frozen?.length || form.lora_rank) throw new Error('frozen parameters and LoRA ranks are not known here');
}

function codecOf(form) {
  const [, whole, sparse, share] = CODEC.exec(form?.codec || 'float32') ?? [];
  return { kind: whole ?? sparse, share: Number(share ?? 0.5) };
}

// Of the metrics those that may be told.
export function declared(form, metrics) {
  return form ? Object.fromEntries(Object.entries(metrics).filter(([name]) => form.metrics.includes(name))) : metrics;
}

// The bytes of an update, and what error feedback has still to send (null where the codec leaves nothing out).
export function formed(form, delta, residual) {
  const codec = codecOf(form);
  const feedsBack = FEEDS_BACK.includes(codec.kind);
  const most = form?.clip_norm || Infinity;
  const whole = feedsBack && residual ? delta.map((value, i) => value + residual[i]) : delta;
  const vector = norm(whole) > most ? scaled(whole, (most * (1 - 1e-7)) / norm(whole)) : whole;
  let [sent, coded] = [vector, CODERS[codec.kind](vector, codec.share)];
  while (norm(coded.said) > most) {
    sent = sent.map((value) => value * f((0.999 * most) / norm(coded.said)));
    coded = CODERS[codec.kind](sent, codec.share);
  }
  const rest = feedsBack ? vector.map((value, i) => value - coded.said[i]) : null;
  return { data: encodeTensors(coded.tensors), rest };
}

const norm = (vector) => Math.sqrt(vector.reduce((sum, value) => sum + value * value, 0));
const scaled = (vector, by) => vector.map((value) => value * by);

// ---- codecs: the tensors of a vector, and the vector that they say -------------------------------------------------

const CODERS = {
  float32: (vector) => ({ tensors: { delta: vector }, said: vector }),
  float16: (vector) => {
    const delta = Uint16Array.from(vector, half);
    return { tensors: { delta }, said: Float32Array.from(delta, fromHalf) };
  },
  int8: (vector) => {
    const { whole, scale, said } = quantized(vector);
    return { tensors: { scale, delta: whole }, said };
  },
  topk: (vector, share) => {
    const { places, bits } = largest(vector, share);
    const { whole, scale, said } = quantized(places.map((place) => vector[place]));
    return { tensors: { scale, values: whole, ...bits }, said: spread(vector.length, places, said) };
  },
  ternary: (vector, share) => {
    const { places, bits } = largest(vector, share);
    const { signs, scale, said } = signed(places.map((place) => vector[place]));
    return { tensors: { scale, ...bits, signs }, said: spread(vector.length, places, said) };
  },
};

// The places of the largest magnitudes, ascending (of equal ones the first), and their Elias-Fano bits.
function largest(vector, share) {
  const count = Math.min(vector.length, Math.max(1, Math.ceil(share * vector.length)));
  const ranked = range(vector.length).sort((a, b) => Math.abs(vector[b]) - Math.abs(vector[a])); // sort() is stable
  const places = ranked.slice(0, count).sort((a, b) => a - b);
  const width = Math.floor(Math.log2(Math.floor(vector.length / count)));
  const high = new Uint8Array(Math.ceil((count + ((vector.length - 1) >> width)) / 8));
  const low = new Uint8Array(Math.ceil((count * width) / 8));
  places.forEach((place, j) => {
    setBit(high, (place >> width) + j);
    for (const bit of range(width)) if ((place >> bit) & 1) setBit(low, j * width + bit);
  });
  return { places, bits: { high, low } };
}

function spread(size, places, values) {
  const all = new Float32Array(size);
  places.forEach((place, j) => (all[place] = values[j]));
  return all;
}

// A bit a value, 1 where it is negative, and each block's mean magnitude.
function signed(values) {
  const signs = new Uint8Array(Math.ceil(values.length / 8));
  values.forEach((value, i) => value < 0 && setBit(signs, i));
  const means = portions(values, BLOCK).map((block) => block.reduce((sum, x) => sum + Math.abs(x), 0) / block.length);
  const scale = Float32Array.from(means);
  const said = Float32Array.from(values, (value, i) => (value < 0 ? -1 : 1) * scale[Math.floor(i / BLOCK)]);
  return { signs, scale, said };
}

const setBit = (bytes, at) => (bytes[at >> 3] |= 1 << (at & 7));

function quantized(vector) {
  const blocks = portions(vector, BLOCK);
  const scale = Float32Array.from(blocks, (block) => block.reduce((most, x) => Math.max(most, Math.abs(x)), 0) / 127);
  const at = (i) => scale[Math.floor(i / BLOCK)];
  const rounded = (x, i) => (at(i) ? Math.min(127, Math.max(-127, even(f(x / at(i))))) : 0);
  const whole = Int8Array.from(vector, rounded);
  return { whole, scale, said: Float32Array.from(whole, (value, i) => value * at(i)) };
}

// The nearest whole number; of two the even one.
function even(x) {
  const down = Math.floor(x);
  const over = x - down;
  return over < 0.5 || (over === 0.5 && down % 2 === 0) ? down : down + 1;
}

// The bits of the nearest half-precision number.
function half(value) {
  const sign = value < 0 || Object.is(value, -0) ? 0x8000 : 0;
  const size = Math.min(LARGEST_HALF, Math.abs(value));
  const exponent = Math.max(-14, Math.floor(Math.log2(size)));
  const steps = even(size / 2 ** (exponent - 10)); // 1024 to 2048; fewer below 2 ** -14
  return sign | ((exponent + 14) * 1024 + steps); // a step too many carries into the exponent
}

function fromHalf(bits) {
  const [exponent, steps] = [(bits >> 10) & 31, bits & 1023];
  const size = exponent ? (1024 + steps) * 2 ** (exponent - 25) : steps * 2 ** -24;
  return bits & 0x8000 ? -size : size;
}
