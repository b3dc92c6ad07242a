// Whose artifacts this device runs: "Whose artifacts" of docs/protocol.md.

import { createHash, createPublicKey, verify } from 'node:crypto';

import { readJson, writeJson } from './disk.js';

const KEYS_TYPE = 'pocketfed keys 1';
const ARTIFACT_TYPE = 'pocketfed artifact 1';
const MAX_STATEMENT = 64 << 10;
const MAX_KEYS = 100;
const KEY = /^[0-9a-f]{64}$/;

// What the device must not run. The coordinator is told of a release that ends so.
export class Untrusted extends Error {}

// Holds the pinned root key, the newest list, the words heard and the releases in use, in a file that is replaced whole.
export class Trust {
  #held;

  constructor(path, publisher, unsigned) {
    this.path = path;
    this.unsigned = unsigned; // artifacts of a coordinator without publisher may run
    this.#held = readJson(path) ?? { publisher: '', sequence: 0, keys: {}, words: {}, inUse: {} };
    if (publisher && !KEY.test(publisher))
      throw new Error(`the publisher ${publisher} is not a key of 64 hexadecimal digits; ask the operator for it`);
    if (publisher && ![publisher, ''].includes(this.#held.publisher))
      throw new Error(
        `this home has pinned the publisher ${this.#held.publisher}; to trust another, give a new --home`,
      );
    this.#held.publisher ||= publisher;
  }

  get listSequence() {
    return this.#held.sequence;
  }

  learnKeys(signed) {
    const list = statement(signed, KEYS_TYPE);
    const { publisher, keys } = list;
    if (this.#held.publisher && publisher !== this.#held.publisher)
      throw new Untrusted(`the list of keys is of ${publisher}, but ${this.#held.publisher} is pinned; it is not used`);
    const named = Object.entries(keys ?? {});
    if (named.length > MAX_KEYS || named.some(([id, key]) => !KEY.test(key?.public) || keyId(key.public) !== id))
      throw new Untrusted("the publisher's list of keys names a key wrongly, or too many; it is not used");
    if (!signs(publisher, signed))
      throw new Untrusted(`the list of keys is not signed by ${publisher}; it is not used`);
    if (sequence(list.sequence) <= this.#held.sequence) return;
    const usable = named.filter(([, key]) => key.revoked === false).map(([id, key]) => [id, key.public]);
    Object.assign(this.#held, { publisher, sequence: list.sequence, keys: Object.fromEntries(usable) });
    this.#save();
  }

  learnWord(version, channel, signed) {
    const word = statement(signed, ARTIFACT_TYPE);
    const key = Object.keys(this.#held.keys).find((id) => signs(this.#held.keys[id], signed));
    if (key === undefined)
      throw new Untrusted(`artifact ${version} is signed by no key of its publisher; it is not used`);
    if (word.version !== version || word.channel !== channel)
      throw new Untrusted(
        `the signature is for ${word.version} on ${word.channel}, not for ${version}; it is not used`,
      );
    const known = this.#held.words[version];
    const oldest = Math.min(sequence(word.oldest), sequence(word.sequence));
    if (!known || word.sequence > known.sequence || !(known.key in this.#held.keys))
      this.#held.words[version] = { version, channel, sequence: word.sequence, oldest, key };
    this.#save();
  }

  // Throws unless the version may be used now: as the release, or only in an assignment.
  check(version, channel, asRelease) {
    if (!this.#held.publisher) {
      if (this.unsigned) return;
      throw new Untrusted(`artifact ${version} comes from another machine and no publisher signed it; it is not used`);
    }
    const word = this.#held.words[version];
    if (word?.channel !== channel || !(word.key in this.#held.keys))
      throw new Untrusted(`no valid key of the publisher stands for artifact ${version}; it is not used`);
    const inUse = this.#held.inUse[channel];
    if (inUse && inUse.version !== version && word.sequence < inUse[asRelease ? 'sequence' : 'oldest'])
      throw new Untrusted(`artifact ${version} is older than ${inUse.version}, which this device runs; it is not used`);
  }

  adopt(version, channel) {
    const word = this.#held.words[version];
    if (!word || word.sequence < (this.#held.inUse[channel]?.sequence ?? 0)) return;
    this.#held.inUse[channel] = word;
    this.#save();
  }

  #save() {
    writeJson(this.path, this.#held);
  }
}

const keyId = (key) => createHash('sha256').update(Buffer.from(key, 'hex')).digest('hex').slice(0, 16);

function sequence(value) {
  if (!Number.isSafeInteger(value) || value < 1)
    throw new Untrusted(`${value} is no sequence; the statement is not used`);
  return value;
}

function statement(signed, type) {
  let read = null;
  try {
    read = signed.statement.length <= MAX_STATEMENT ? JSON.parse(signed.statement.toString('utf8')) : null;
  } catch {
    // not JSON: refused below
  }
  if (read?.type !== type) throw new Untrusted(`what should be a publisher's "${type}" is not; it is not used`);
  return read;
}

// Whether the public key (64 hexadecimal digits) signed exactly these bytes.
export function signs(key, signed) {
  if (!KEY.test(key)) return false;
  const jwk = { kty: 'OKP', crv: 'Ed25519', x: Buffer.from(key, 'hex').toString('base64url') };
  return verify(null, signed.statement, createPublicKey({ key: jwk, format: 'jwk' }), signed.signature);
}
