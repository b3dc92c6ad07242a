// What leaves the device, and in which form: "The form of an update" of docs/protocol.md.

import { encodeVector } from './vector.js';

const CODECS = ['', 'float32'];

// Throws what a device says when it declines a form that it does not know.
export function checkForm(form) {
  if (!form) return;
  if (!CODECS.includes(form.codec)) throw new Error(`the codec ${form.codec} is not known here, only float32`);
  if (form.clip_norm || form.noise || form.private.length)
    throw new Error('clipped, noised or partly private updates are not known here');
}

// The bytes of an update (`delta` is null for EVALUATE), and of the metrics those that may be told.
export function formed(form, delta, metrics) {
  const named = form?.metrics.length ? form.metrics : Object.keys(metrics);
  const told = Object.fromEntries(Object.entries(metrics).filter(([name]) => named.includes(name)));
  return { data: delta ? encodeVector('delta', delta) : Buffer.alloc(0), told };
}
