// One device of a fleet: "A device's life" of docs/protocol.md.

import { randomBytes } from 'node:crypto';
import { mkdirSync, readdirSync, rmSync } from 'node:fs';
import { join } from 'node:path';

import { fetchFiles, filesOf, parseManifest, setNamed } from './artifact.js';
import { readBytes, readJson, writeJson, writeWhole } from './disk.js';
import { checkForm } from './form.js';
import { Heartbeat, rest } from './heartbeat.js';
import { CallError, Link, isLoopback } from './link.js';
import { derive } from './order.js';
import { Outbox } from './outbox.js';
import { Plans } from './plans.js';
import { checkConfig, measure, train } from './training.js';
import { Trust, Untrusted } from './trust.js';
import { decodeVector, sha256, vectorBytes } from './vector.js';

const PROTOCOL = 1;
const VERSION = '0.3.0 node'; // whose page this follows
const CHECK_IN_S = 20;
const PAUSES_S = { first: 0.2, longest: 30, uploading: 5 };
const LONGEST_WAIT_S = 3600;

// Stays in its home folder. `examples` are { text, pair, label }, oldest first; `say` hears what the device does.
export class Device {
  #refused = { id: 0, why: '' };
  #opened = { key: null, plans: null };

  constructor({ coordinator, home, name, channel, key, ca, publisher, examples, say }) {
    mkdirSync(home, { recursive: true, mode: 0o700 });
    Object.assign(this, { home, channel, key, examples, say });
    this.identity = readJson(this.#path('identity.json')) ?? {
      name: name || `node-${randomBytes(6).toString('hex')}`,
      token: randomBytes(32).toString('base64url'),
      enrolled: false,
    };
    if (name && name !== this.identity.name) throw new Error(`${home} belongs to ${this.identity.name}, not ${name}`);
    writeJson(this.#path('identity.json'), this.identity); // on disk before anybody hears of the token
    this.trust = new Trust(this.#path('trust.json'), publisher, isLoopback(coordinator));
    this.outbox = new Outbox(home);
    this.link = new Link(coordinator, ca);
    this.link.token = this.identity.token;
  }

  #path(...names) {
    return join(this.home, ...names);
  }

  // Take part until `signal` says stop.
  async live(signal) {
    let [pause, failing] = [PAUSES_S.first, false];
    while (!signal.aborted) {
      let waitS = 0;
      try {
        await this.#enrol();
        waitS = await this.#checkIn(failing ? 0 : CHECK_IN_S, signal);
        [pause, failing] = [PAUSES_S.first, false];
      } catch (error) {
        if (signal.aborted) break;
        failing = true;
        this.say(`will try again: ${error.message}`);
        waitS = Math.max(pause * (0.5 + Math.random() / 2), error.waitS ?? 0);
        pause = Math.min(2 * pause, PAUSES_S.longest);
      }
      await rest(Math.min(waitS, LONGEST_WAIT_S), signal);
    }
    this.link.close();
    this.say('stopped');
  }

  async #enrol() {
    if (this.identity.enrolled) return;
    const { name, token } = this.identity;
    const about = { protocol: PROTOCOL, sdk_version: VERSION, channel: this.channel, enrolment_key: this.key };
    await this.link.call('Enrol', { name, token, ...about });
    this.identity.enrolled = true;
    writeJson(this.#path('identity.json'), this.identity);
    this.say(`enrolled as ${name}`);
  }

  // One check-in and what follows from it; how many seconds to wait before the next.
  async #checkIn(waitS, signal) {
    const known = Math.max(this.#release()?.id ?? 0, this.#refused.id);
    const request = {
      protocol: PROTOCOL,
      sdk_version: VERSION,
      examples: this.examples.length,
      wait_s: waitS,
      release_id: known,
      key_list: this.trust.listSequence,
      refused_release: this.#refused.id,
      refusal: this.#refused.why.slice(0, 500),
    };
    const { keys, release, assignment, wait } = await this.link.call('CheckIn', request, {
      seconds: waitS + 30,
      signal,
    });
    if (keys) this.trust.learnKeys(keys);
    if (release && Number(release.id) > known) await this.#consider(release, Boolean(assignment), signal);
    if (!assignment) {
      if (wait?.reason) this.say(wait.reason);
      return wait?.retry_after_s ?? 0;
    }
    await this.#work(assignment, signal);
    return 0;
  }

  // ---- an assignment -----------------------------------------------------------------------------------------------

  async #work(assignment, stopping) {
    const beat = new Heartbeat(this.link, assignment, stopping);
    this.say(`round ${assignment.round} of run ${assignment.run}`);
    try {
      const reply = (await this.outbox.unsent(assignment.id, this.link)) ?? (await this.#perform(assignment, beat));
      await this.#handIn(assignment, reply, beat);
    } catch (error) {
      if (beat.cancelled) return this.say(`round ${assignment.round} wants no more of this device`);
      if (error instanceof CallError && error.passes && !stopping.aborted) throw error; // the assignment is still ours
      const why = stopping.aborted ? 'the app stopped the device' : reasonOf(error);
      this.say(`declines round ${assignment.round}: ${why}`);
      const said = { assignment_id: assignment.id, reason: why.slice(0, 500) };
      await this.link.call('Decline', said).catch((failed) => this.say(`could not decline: ${failed.message}`));
    } finally {
      beat.end();
    }
  }

  async #perform({ id, run, kind, round, config, form, ...asked }, beat) {
    checkForm(form);
    checkConfig(config);
    if (!['TRAIN', 'EVALUATE'].includes(kind)) throw new Error(`an assignment of kind ${kind} is not known here`);
    const plans = await this.#plans(asked.artifact_version, asked.trainable_set, false, beat.signal);
    const start = decodeVector('theta', await this.#parameters(asked, plans.set.size, beat.signal), plans.set.size);
    const examples = plans.encode(this.examples, config.max_length);
    const count = examples.rows.length;
    if (!count) throw new Error('the device has no examples with a label of this artifact');
    beat.phase = 'TRAINING';
    const goOn = (progress) => {
      beat.progress = progress;
      beat.signal.throwIfAborted();
    };
    const seed = derive(config.seed, round, this.identity.name);
    this.say(`${kind === 'TRAIN' ? 'training' : 'measuring'} on ${count} examples`);
    const made =
      kind === 'TRAIN'
        ? await train(plans, start, examples, config, seed, goOn)
        : { delta: null, metrics: await measure(plans, start, examples, goOn) };
    const key = `${run} ${asked.artifact_version} ${asked.trainable_set}`;
    return this.outbox.keep(
      made,
      form,
      { assignment_id: id, num_examples: count },
      `residual-${sha256(key).slice(0, 16)}`,
    );
  }

  async #handIn({ deadline_s: deadlineS, round }, { header, data }, beat) {
    const end = Date.now() + 1000 * deadlineS;
    beat.phase = 'UPLOADING';
    for (let pause = PAUSES_S.first; ; pause = Math.min(2 * pause, PAUSES_S.uploading)) {
      try {
        const tell = (at) => this.say(`uploading from byte ${at} of ${data.length}`);
        const receipt = await this.link.upload(header, data, tell);
        this.outbox.settle(receipt.accepted);
        this.say(receipt.accepted ? `handed in round ${round}` : `round ${round} not taken: ${receipt.reason}`);
        return;
      } catch (error) {
        const again = error.passes || ['OUT_OF_RANGE', 'DATA_LOSS'].includes(error.code);
        if (!again || Date.now() > end) throw error;
        this.say(`the upload broke off: ${error.message}`);
        await rest(Math.max(pause, error.waitS), beat.signal);
        beat.signal.throwIfAborted();
      }
    }
  }

  // ---- artifacts and releases --------------------------------------------------------------------------------------

  // The manifest of a version for which its publisher stands. Not a byte of its files comes before.
  async #vouched(version, asRelease) {
    if (!/^[0-9a-f]{64}$/.test(version)) throw new Error(`${version} is no version`); // it names a folder
    const path = this.#path('artifacts', version, 'manifest.json');
    const held = readBytes(path);
    try {
      if (held) {
        this.trust.check(version, this.channel, asRelease);
        return parseManifest(held, version);
      }
    } catch (error) {
      if (!(error instanceof Untrusted)) throw error; // the publisher may have more to say
    }
    const { manifest, signed, keys } = await this.link.call('GetManifest', { version });
    if (keys) this.trust.learnKeys(keys);
    if (signed) this.trust.learnWord(version, this.channel, signed);
    this.trust.check(version, this.channel, asRelease);
    const parsed = parseManifest(manifest, version);
    mkdirSync(this.#path('artifacts', version), { recursive: true });
    writeWhole(path, manifest);
    return parsed;
  }

  async #plans(version, setName, asRelease, signal) {
    const manifest = await this.#vouched(version, asRelease);
    const key = `${version}/${setName}`;
    if (this.#opened.key !== key) {
      const folder = this.#path('artifacts', version);
      const download = (digest, first) => this.link.download(digest, first, signal);
      const tell = (name, at) => this.say(`fetching ${name} from chunk ${at}`);
      await fetchFiles(manifest, filesOf(manifest, setName), folder, download, tell);
      this.#opened = { key, plans: new Plans(folder, manifest, setName) };
    }
    return this.#opened.plans;
  }

  // The bytes of the parameters, checked; no more of them are taken than there can be.
  async #parameters({ parameters_digest: digest, parameters_bytes: bytes }, size, signal) {
    const chunks = [];
    let left = Math.min(Number(bytes), vectorBytes(size));
    for await (const data of this.link.download(digest, 0, signal)) {
      left -= data.length;
      if (left < 0) throw new Error(`the parameters ${digest} have more bytes than announced; they are not used`);
      chunks.push(data);
    }
    const data = Buffer.concat(chunks);
    if (sha256(data) !== digest) throw new Error(`the parameters that came are not ${digest}; they are not used`);
    return data;
  }

  #release() {
    return readJson(this.#path('release.json'));
  }

  // Adopt a release; one that must not run is named at the next check-in.
  async #consider(release, busy, signal) {
    try {
      await this.#adopt(release, signal);
    } catch (error) {
      this.say(`keeps its model: ${error.message}`);
      if (error instanceof Untrusted) this.#refused = { id: Number(release.id), why: error.message };
      else if (!busy) throw error; // the assignment may be of another
    }
  }

  async #adopt(release, signal) {
    const { artifact_version: version, trainable_set: set, parameters_digest: digest } = release;
    const { size } = (await this.#plans(version, set, true, signal)).set;
    const data = await this.#parameters(release, size, signal);
    decodeVector('theta', data, size);
    writeWhole(this.#path(`theta-${digest}`), data);
    this.trust.adopt(version, this.channel);
    writeJson(this.#path('release.json'), { id: Number(release.id), version, set, digest });
    for (const name of readdirSync(this.#path('artifacts')).filter((other) => other !== version))
      rmSync(this.#path('artifacts', name), { recursive: true });
    for (const name of readdirSync(this.home).filter((other) => /^theta-/.test(other) && other !== `theta-${digest}`))
      rmSync(this.#path(name));
    this.say(`adopted release ${release.id}`);
  }

  // The label of a text by the release in use.
  async predict(text) {
    const held = this.#release();
    if (!held) throw new Error(`${this.home} holds no release; let the device take part first`);
    const plans = await this.#plans(held.version, held.set, true, new AbortController().signal);
    const size = setNamed(plans.manifest, held.set).size;
    const theta = decodeVector('theta', readBytes(this.#path(`theta-${held.digest}`)), size);
    return plans.predict(theta, { text, pair: null });
  }
}

// An unexpected error may quote an example: only its name is told.
const reasonOf = (error) =>
  error.constructor === Error || error instanceof Untrusted || error instanceof CallError ? error.message : error.name;
