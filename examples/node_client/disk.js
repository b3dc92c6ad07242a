// Files that are written whole or not at all, readable by this user only.

import { closeSync, fsyncSync, openSync, readFileSync, renameSync, writeSync } from 'node:fs';

export function writeWhole(path, bytes) {
  const file = openSync(`${path}.partial`, 'w', 0o600);
  try {
    for (let at = 0; at < bytes.length;) at += writeSync(file, bytes, at);
    fsyncSync(file);
  } finally {
    closeSync(file);
  }
  renameSync(`${path}.partial`, path);
}

export const writeJson = (path, value) => writeWhole(path, Buffer.from(JSON.stringify(value)));

// Null where there is none. What is there and cannot be read is an error: to begin anew would be to forget whom to trust.
export function readJson(path) {
  const bytes = readBytes(path);
  try {
    return bytes && JSON.parse(bytes.toString('utf8'));
  } catch {
    throw new Error(`${path} is damaged; give the device a new --home`);
  }
}

export function readBytes(path) {
  try {
    return readFileSync(path);
  } catch (error) {
    if (error.code === 'ENOENT') return null;
    throw error;
  }
}
