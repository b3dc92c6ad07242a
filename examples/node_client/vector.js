// Float32 vectors as safetensors bytes: "Parameters as bytes" of docs/protocol.md.

import { createHash } from 'node:crypto';

export const sha256 = (bytes) => createHash('sha256').update(bytes).digest('hex');

// The most bytes that `size` values can have.
export const vectorBytes = (size) => 4 * size + 4096;

export function encodeVector(name, vector) {
  const stated = JSON.stringify({
    [name]: { dtype: 'F32', shape: [vector.length], data_offsets: [0, 4 * vector.length] },
  });
  const header = stated.padEnd(Math.ceil(stated.length / 8) * 8);
  const bytes = Buffer.alloc(8 + header.length + 4 * vector.length);
  bytes.writeBigUInt64LE(BigInt(header.length));
  bytes.write(header, 8, 'ascii');
  vector.forEach((value, i) => bytes.writeFloatLE(value, 8 + header.length + 4 * i));
  return bytes;
}

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
