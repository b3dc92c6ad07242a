// The order of training data: "The order of the data" of docs/protocol.md, in 64-bit whole numbers without a sign.

import { createHash } from 'node:crypto';

const BUCKET_BATCHES = 16;
const word = (x) => BigInt.asUintN(64, x);

// A seed for one use of another seed.
export function derive(seed, number, text) {
  return createHash('sha256').update(`${seed}/${number}/${text}`).digest().readBigUInt64BE();
}

// 0 to count - 1, sorted by the numbers that SplitMix64 gives from state `seed`.
export function permutation(count, seed) {
  const keys = Array.from({ length: count }, (_, i) => mix(word(seed + BigInt(i + 1) * 0x9e3779b97f4a7c15n)));
  return range(count).sort((a, b) => (keys[a] < keys[b] ? -1 : 1));
}

function mix(state) {
  let z = word((state ^ (state >> 30n)) * 0xbf58476d1ce4e5b9n);
  z = word((z ^ (z >> 27n)) * 0x94d049bb133111ebn);
  return z ^ (z >> 31n);
}

// The places of each batch's examples in epoch `epoch`; `lengths` in tokens.
export function epochOrder(lengths, batchSize, seed, epoch) {
  const order = permutation(lengths.length, derive(seed, epoch, 'examples'));
  const batches = [];
  for (const piece of portions(order, batchSize * BUCKET_BATCHES))
    batches.push(
      ...portions(
        piece.sort((a, b) => lengths[a] - lengths[b]),
        batchSize,
      ),
    ); // sort() is stable
  return permutation(batches.length, derive(seed, epoch, 'batches')).map((i) => batches[i]);
}

// Places held out, and those to train on.
export function split(count, share, seed) {
  const held = new Set(permutation(count, derive(seed, 0, 'holdout')).slice(0, Math.floor(share * count)));
  return [range(count).filter((i) => held.has(i)), range(count).filter((i) => !held.has(i))];
}

export const range = (count) => Array.from({ length: count }, (_, i) => i);

export function portions(list, size) {
  return range(Math.ceil(list.length / size)).map((i) => list.slice(i * size, (i + 1) * size));
}
