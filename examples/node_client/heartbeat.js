// Heartbeats: item 3 of "A device's life" of docs/protocol.md.

import { setTimeout as sleep } from 'node:timers/promises';

// Keeps an assignment while the device works on it, and hears when to stop: `signal` is of that, and of `stopping`.
export class Heartbeat {
  #stop = new AbortController();
  #done = new AbortController();

  constructor(link, assignment, stopping) {
    Object.assign(this, { link, id: assignment.id, phase: 'DOWNLOADING', progress: 0 });
    this.signal = AbortSignal.any([this.#stop.signal, stopping]);
    this.#beat(Math.max(0.1, assignment.lease_s / 3));
  }

  get cancelled() {
    return this.#stop.signal.aborted;
  }

  end() {
    this.#done.abort();
  }

  async #beat(everyS) {
    for (;;) {
      await rest(everyS, this.#done.signal);
      if (this.#done.signal.aborted) return;
      const told = { assignment_id: this.id, phase: this.phase, progress: this.progress };
      const { cancelled } = await this.link.call('Heartbeat', told).catch(({ passes }) => ({ cancelled: !passes }));
      if (cancelled) return this.#stop.abort(new Error('the assignment has ended'));
    }
  }
}

// Sleep, or less if the signal comes.
export const rest = (seconds, signal) => sleep(1000 * seconds, null, { signal }).catch(() => null);
