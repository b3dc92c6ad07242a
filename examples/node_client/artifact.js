// An artifact on disk: the manifest checked, every chunk and file checked before it is used; see docs/artifact.md.

import { appendFileSync, mkdirSync, renameSync, rmSync, truncateSync } from 'node:fs';
import { join } from 'node:path';

import { readBytes, writeWhole } from './disk.js';
import { sha256 } from './vector.js';

const SCHEMA = 2;
const CHUNK_BYTES = 1 << 20;
const MAX_ARTIFACT_BYTES = 2 ** 31;
const DIGEST = /^[0-9a-f]{64}$/;
const FILE_NAME = /^[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}$/;

// The manifest of `version`, if these are its bytes and it is one that this client reads.
export function parseManifest(bytes, version) {
  if (sha256(bytes) !== version) throw new Error(`the manifest that came is not that of ${version}; it is not used`);
  const manifest = JSON.parse(bytes.toString('utf8'));
  if (manifest.schema !== SCHEMA)
    throw new Error(`the manifest has schema ${manifest.schema}; this client reads ${SCHEMA}: update it`);
  if (manifest.task !== 'classification')
    throw new Error(`the artifact is for ${manifest.task}; this client trains classification only`);
  let total = 0;
  for (const [name, file] of Object.entries(manifest.files)) {
    const chunks = Math.ceil(file.bytes / CHUNK_BYTES);
    if (!FILE_NAME.test(name) || !Number.isSafeInteger(file.bytes) || file.bytes < 0 || file.chunks.length !== chunks)
      throw new Error(`the manifest lists a file ${JSON.stringify(name).slice(0, 100)} that cannot be; it is not used`);
    if (![file.sha256, ...file.chunks].every((digest) => DIGEST.test(digest)))
      throw new Error(`the manifest has a digest of ${name} that is none; it is not used`);
    total += file.bytes;
  }
  if (total > MAX_ARTIFACT_BYTES) throw new Error(`the manifest lists ${total} bytes; at most 2 GiB are fetched`);
  return manifest;
}

export function setNamed(manifest, name) {
  if (!Object.hasOwn(manifest.trainable_sets, name)) throw new Error(`the artifact has no trainable set ${name}`);
  return manifest.trainable_sets[name];
}

// The files that are needed to train and predict with one trainable set.
export function filesOf(manifest, setName) {
  const set = setNamed(manifest, setName);
  const training = set.prefix ? [set.prefix, set.train_suffix, set.evaluate_suffix] : [set.train, set.evaluate];
  const named = [...training, set.predict, manifest.plans.tokenize];
  const wanted = manifest.files['backbone.bin'] ? [...named, 'backbone.bin'] : named;
  for (const name of wanted)
    if (!Object.hasOwn(manifest.files, name)) throw new Error(`the manifest uses the file ${name} without listing it`);
  return wanted;
}

// Fetch what is missing of these files into `folder`. download(digest, firstChunk) gives chunks; tell(name, at) hears of each.
export async function fetchFiles(manifest, names, folder, download, tell) {
  mkdirSync(folder, { recursive: true, mode: 0o700 });
  for (const name of names) {
    const file = manifest.files[name];
    const path = join(folder, name);
    if (isWhole(path, file)) continue;
    const partial = `${path}.partial`;
    let at = intactChunks(partial, file);
    if (!readBytes(partial)) writeWhole(partial, Buffer.alloc(0));
    truncateSync(partial, Math.min(at * CHUNK_BYTES, file.bytes));
    tell(name, at);
    if (at < file.chunks.length)
      for await (const data of download(file.sha256, at)) {
        if (sha256(data) !== file.chunks[at])
          throw new Error(`chunk ${at} of ${name} has another digest; it was not kept`);
        appendFileSync(partial, data, { flush: true });
        tell(name, (at += 1));
      }
    if (!isWhole(partial, file)) {
      if (at === file.chunks.length) rmSync(partial);
      throw new Error(`${name} ended after ${at} of ${file.chunks.length} chunks; it will be continued`);
    }
    renameSync(partial, path);
  }
}

function isWhole(path, file) {
  const bytes = readBytes(path);
  return bytes !== null && bytes.length === file.bytes && sha256(bytes) === file.sha256;
}

// How many whole chunks on disk are what they should be.
function intactChunks(path, file) {
  const bytes = readBytes(path) ?? Buffer.alloc(0);
  const wrong = file.chunks.findIndex((digest, i) => {
    const chunk = bytes.subarray(i * CHUNK_BYTES, (i + 1) * CHUNK_BYTES);
    return sha256(chunk) !== digest;
  });
  return wrong < 0 ? file.chunks.length : wrong;
}
