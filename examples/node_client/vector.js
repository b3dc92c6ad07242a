// Float32 vectors as safetensors bytes: "Parameters as bytes" of docs/protocol.md.

import { createHash } from 'node:crypto';

export const sha256 = (bytes) => createHash('sha256').update(bytes).digest('hex');

// The most bytes that `size` values can have.
export const vectorBytes = (size) => 4 * size + 4096;

const DTYPES = new Map([
  [Float32Array, 'F32'],
  [Uint16Array, 'F16'], // JavaScript has no half-precision numbers: their bits
  [Int8Array, 'I8'],
  [Uint8Array, 'U8'],
]);

// Vectors by name as one file, in the order given: the widest first, so that all are aligned.
export function encodeTensors(tensors) {
  const header = {};
  let end = 0;
  for (const [name, { constructor, length, byteLength }] of Object.entries(tensors))
    header[name] = { dtype: DTYPES.get(constructor), shape: [length], data_offsets: [end, (end += byteLength)] };
  const stated = JSON.stringify(header);
  const padded = Buffer.from(stated.padEnd(Math.ceil(stated.length / 8) * 8), 'ascii');
  const size = Buffer.alloc(8);
  size.writeBigUInt64LE(BigInt(padded.length));
  const values = Object.values(tensors).map((v) => Buffer.from(v.buffer, v.byteOffset, v.byteLength)); // little-endian
  return Buffer.concat([size, padded, ...values]);
}

export const encodeVector = (name, vector) => encodeTensors({ [name]: vector });

// Everything that a peer says of its bytes is checked before a value is read.
export function decodeVector(name, bytes, size) {
  const start = bytes.length < 8 ? Infinity : 8 + Number(bytes.readBigUInt64LE());
  if (!(start <= bytes.length)) throw new Error(`${bytes.length} bytes are no safetensors file; they are not used`);
  const { __metadata__, ...tensors } = JSON.parse(bytes.toString('utf8', 8, start));
  const { dtype, shape, data_offsets: offsets } = tensors[name] ?? {};
  const stated = JSON.stringify([Object.keys(tensors), dtype, shape, offsets]);
  const wanted = JSON.stringify([[name], 'F32', [size], [0, 4 * size]]);
  if (stated !== wanted || bytes.length !== start + 4 * size)
    throw new Error(`the parameters are ${stated.slice(0, 200)}, not ${wanted}; they are not used`);
  return Float32Array.from({ length: size }, (_, i) => bytes.readFloatLE(start + 4 * i));
}
