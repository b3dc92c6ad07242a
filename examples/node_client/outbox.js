// The update under way and what error feedback has still to send: on disk, so that neither is lost nor sent twice.
// See "Handing in" and "What leaves the device" of docs/protocol.md.

import { existsSync, readdirSync, renameSync, rmSync } from 'node:fs';
import { join } from 'node:path';

import { readBytes, readJson, writeJson, writeWhole } from './disk.js';
import { declared, formed } from './form.js';
import { decodeVector, encodeVector, sha256 } from './vector.js';

export class Outbox {
  constructor(home) {
    this.home = home;
  }

  #path(name) {
    return join(this.home, name);
  }

  // The update in the run's form, on disk before a byte of it is sent: a process that is killed need not train again.
  keep({ delta, metrics }, form, about, kept) {
    const { data, rest } = delta
      ? formed(form, delta, this.#residual(kept, delta))
      : { data: Buffer.alloc(0), rest: null };
    const whole = { total_bytes: data.length, digest: sha256(data) };
    const header = { ...about, ...whole, metrics: declared(form, metrics) };
    if (rest) writeWhole(this.#path('update.residual'), encodeVector('residual', rest));
    writeWhole(this.#path('update.bin'), data);
    writeJson(this.#path('update.json'), { header, kept: rest && kept });
    return { header, data };
  }

  // What error feedback has still to send in this run.
  #residual(kept, { length }) {
    const bytes = readBytes(this.#path(kept));
    return bytes && decodeVector('residual', bytes, length);
  }

  // What was made for this very assignment and has no receipt yet. Of another's update the coordinator knows the end.
  async unsent(assignmentId, link) {
    const [told, data] = [readJson(this.#path('update.json')), readBytes(this.#path('update.bin'))];
    if (!told) return null;
    const { header } = told;
    if (header.assignment_id === assignmentId) return data && sha256(data) === header.digest ? { header, data } : null;
    const { receipt } = await link
      .call('GetUploadStatus', { assignment_id: header.assignment_id })
      .catch((error) => (error.code === 'NOT_FOUND' ? {} : Promise.reject(error)));
    this.settle(Boolean(receipt?.accepted));
    return null;
  }

  // The coordinator has said whether it took the update. Only then is what it left out still to be sent.
  settle(taken) {
    const { kept } = readJson(this.#path('update.json'));
    if (taken && kept && existsSync(this.#path('update.residual'))) {
      for (const name of readdirSync(this.home).filter((other) => other.startsWith('residual-')))
        if (name !== kept) rmSync(this.#path(name)); // a residual ends with its run
      renameSync(this.#path('update.residual'), this.#path(kept));
    }
    for (const name of ['update.json', 'update.bin', 'update.residual']) rmSync(this.#path(name), { force: true });
  }
}
